"""A mixture-of-experts layer in one process: what `ExpertParallel` has to equal."""

from torch import nn

from .checks import check_capacity, check_input, check_senders, check_sizes
from .experts import mlp, through_experts
from .routing import Router, combine, kept_visits, sort_by_expert


class Layer(nn.Module):
    """What a layer consists of, in one process or over ranks.

    router: a `Router`; experts: a container of modules (rows, hidden) → (rows, hidden); shared: one that every token
    visits, or None; routing: the `Routing` of the last forward, with its graph, for `load_balancing_loss`.
    """

    def __init__(self, router, experts, shared=None, capacity_factor=None):
        super().__init__()
        self.router, self.experts, self.shared, self.capacity_factor = router, experts, shared, capacity_factor
        self.routing = None

    @property
    def hidden(self):
        return self.router.hidden

    def __getstate__(self):  # a copy is made without the last forward's graph, which cannot be copied
        return self.__dict__ | {"routing": None}

    def extra_repr(self):
        return "" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"


class MoE(Layer):
    """Each token visits `top_k` of `experts` MLPs, and their outputs are added up, weighted.

    hidden, ffn       width of the tokens, and inside an expert
    capacity_factor   an expert takes ⌈factor · T·k/E⌉ visits of each sender's T tokens, and further ones are dropped:
                      first choices come before second ones, earlier tokens before later ones. What a token loses so
                      is not made up for by its other weights. None: nothing is dropped
    shared_experts    experts that every token visits, with weight 1: together one MLP, of that many times ffn
    gated, bias       the kind of MLP: a `GatedMLP`, or nn.Linear, GELU, nn.Linear; whether these have a bias
    routing           score_function, normalize, scaling_factor, bias_update_rate: see `Router`

    `MoE.of(router, experts, shared, capacity_factor)` makes one of given parts, as for experts of your own.
    Raises ValueError for numbers that do not fit together.
    """

    def __init__(
        self,
        hidden,
        ffn,
        experts,
        top_k,
        *,
        capacity_factor=None,
        shared_experts=0,
        gated=False,
        bias=True,
        device=None,
        dtype=None,
        **routing,
    ):
        check_sizes(hidden=hidden, ffn=ffn, experts=experts, top_k=top_k)
        check_sizes(0, shared_experts=shared_experts)
        check_capacity(capacity_factor)
        kind = {"gated": gated, "bias": bias, "device": device, "dtype": dtype}
        router = Router(hidden, experts, top_k, device=device, dtype=dtype, **routing)
        mlps = nn.ModuleList(mlp(hidden, ffn, **kind) for _ in range(experts))
        shared = mlp(hidden, shared_experts * ffn, **kind) if shared_experts else None
        super().__init__(router, mlps, shared, capacity_factor)

    @classmethod
    def of(cls, router, experts, shared=None, capacity_factor=None):
        check_capacity(capacity_factor)
        experts = nn.ModuleList(experts)
        if len(experts) != router.experts:
            raise ValueError(f"the router chooses among {router.experts} experts, but {len(experts)} are given")
        moe = cls.__new__(cls)
        Layer.__init__(moe, router, experts, shared, capacity_factor)
        return moe

    def forward(self, x, senders=None):
        """x: (…, hidden) → the same shape. senders: how many of the tokens each rank would send, one after another, for
        each has a capacity of its own; None: one sender. Without a capacity they make no difference."""
        check_input(self, x)
        rows = x.reshape(-1, self.hidden)  # (T, hidden)
        senders = check_senders(senders, len(rows))
        self.routing = self.router(rows)  # route
        kept = kept_visits(self.routing.chosen, len(self.experts), self.capacity_factor, senders)
        visits = sort_by_expert(self.routing.chosen, len(self.experts), kept)  # sort
        outputs = through_experts(self.experts, rows[visits.token], visits.counts.tolist())  # compute
        y = combine(outputs, self.routing, visits, rows)  # combine
        if self.shared is not None:
            y = y + self.shared(rows)
        return y.view(x.shape)
