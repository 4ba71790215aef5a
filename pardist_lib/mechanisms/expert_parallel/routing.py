"""Which experts a token visits, which of its visits are dropped, and in which order they are computed.

Sources: Shazeer et al., "Outrageously Large Neural Networks" (2017), section 2; Lepikhin et al., "GShard" (2020),
section 2.2 and algorithm 1, for capacity; Jiang et al., "Mixtral of Experts" (2024), section 2.1, for softmax;
DeepSeek-AI, "DeepSeek-V3" (2024), section 2.1.2, for sigmoid and the bias.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_router


class Routing(NamedTuple):
    """What a router says of T tokens.

    probabilities  (T, E) of all experts, each row sums to 1: what `load_balancing_loss` is made of
    chosen         (T, k) experts of each token, the best one first
    weights        (T, k) what their outputs are multiplied with
    """

    probabilities: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


class Router(nn.Module):
    """Scores every expert for every token, and chooses the k best.

    score_function    "softmax" over the experts, or "sigmoid" of each one by itself
    normalize         divide the k weights by their sum. With softmax that is the softmax of the k best logits. Leave
                      it out with top_k 1: the only weight would be 1, and the router would learn nothing
    scaling_factor    multiplies the weights (DeepSeek-V3: 2.5)
    bias_update_rate  γ of a bias that is added to the scores for the *choice* and never weights an expert
                      (DeepSeek-V3: 0.001); `update_expert_bias` changes it. None: there is no bias

    Scores are computed in float32 at least, under autocast too. The bias stays float32 whatever the module is cast to:
    steps of 0.001 are lost in 16 bits.
    Raises ValueError for numbers that do not fit together.
    """

    def __init__(
        self,
        hidden,
        experts,
        top_k,
        *,
        score_function="softmax",
        normalize=True,
        scaling_factor=1.0,
        bias_update_rate=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_router(hidden, experts, top_k, score_function, scaling_factor, bias_update_rate)
        self.hidden, self.experts, self.top_k, self.score_function = hidden, experts, top_k, score_function
        self.normalize, self.scaling_factor, self.bias_update_rate = normalize, scaling_factor, bias_update_rate
        self.weight = nn.Parameter(nn.Linear(hidden, experts, bias=False, device=device, dtype=dtype).weight.detach())
        bias = None if bias_update_rate is None else torch.zeros(experts, device=device)
        self.register_buffer("expert_bias", bias)
        # how often each expert was chosen since the last update of the bias
        self.register_buffer("loads", torch.zeros(experts, dtype=torch.int64, device=device), persistent=False)

    def forward(self, rows):
        """rows: (T, hidden). Returns a `Routing`."""
        scores = self._scores(rows)  # (T, E)
        ranked = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
        chosen = ranked.topk(self.top_k).indices  # (T, k)
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        probabilities = scores if self.score_function == "softmax" else scores / (scores.sum(1, keepdim=True) + 1e-20)
        if self.expert_bias is not None and self.training and torch.is_grad_enabled():
            self.loads += count(chosen, self.experts)
        return Routing(probabilities, chosen, self.scaling_factor * weights)

    def _scores(self, rows):
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(wide), self.weight.to(wide))
        return logits.softmax(1) if self.score_function == "softmax" else logits.sigmoid()

    def _apply(self, fn, recurse=True):  # .double(), .bfloat16(), .to(…)
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias.dtype != before.dtype:
            self.expert_bias = before.to(self.expert_bias.device)
        return self

    def extra_repr(self):
        return f"{self.hidden}, {self.experts}, top_k={self.top_k}, score_function={self.score_function!r}"


def count(chosen, experts):
    """(E,) how often each expert is in `chosen`."""
    return chosen.flatten().bincount(minlength=experts)


# ---- dropping -------------------------------------------------------------------------------------------------


def capacity_of(tokens, top_k, experts, factor):
    """Visits that one expert takes from a sender of so many tokens: ⌈factor · T·k/E⌉."""
    return math.ceil(round(factor * tokens * top_k / experts, 9))  # 1.1·10 is a little more than 11


def within_capacity(chosen, experts, factor):
    """(T, k) bool: which visits one sender's tokens make, each expert taking `capacity_of` them. First choices come
    before second ones, and among them earlier tokens before later ones."""
    tokens, top_k = chosen.shape
    slots = chosen.t().flatten()
    order = slots.argsort(stable=True)
    counts = slots.bincount(minlength=experts)
    place = torch.arange(len(slots), device=slots.device) - (counts.cumsum(0) - counts)[slots[order]]
    kept = torch.empty_like(slots, dtype=torch.bool)
    kept[order] = place < capacity_of(tokens, top_k, experts, factor)
    return kept.view(top_k, tokens).t()


def kept_visits(chosen, experts, factor, senders=None):
    """As `within_capacity`, for the tokens of several senders one after another, senders: how many each has, None for
    one. None where nothing is dropped."""
    if factor is None:
        return None
    parts = chosen.split(senders or [len(chosen)])
    return torch.cat([within_capacity(part, experts, factor) for part in parts])


# ---- sorting --------------------------------------------------------------------------------------------------


class Visits(NamedTuple):
    """Visits of tokens to experts, in the order of experts.

    token   (visits,) which token's
    choice  (visits,) which of its k choices it is
    counts  (E,) visits to each expert
    """

    token: torch.Tensor
    choice: torch.Tensor
    counts: torch.Tensor


def sort_by_expert(chosen, experts, kept=None):
    """The `Visits` of tokens that have `chosen` these experts; kept: those that are not dropped, None for all."""
    tokens, top_k = chosen.shape
    slots = chosen.flatten()
    order = slots.argsort(stable=True)
    if kept is not None:
        order = order[kept.flatten()[order]]
    return Visits(order // top_k, order % top_k, count(slots[order], experts))


def combine(outputs, routing, visits, rows):
    """Σ over a token's visits of weight · output. outputs: (visits, hidden), in their order; rows: (T, hidden), the
    layer's input. Returns (T, hidden): zeros for a token whose visits were all dropped."""
    weighted = routing.weights[visits.token, visits.choice].unsqueeze(1) * outputs
    return weighted.new_zeros(rows.shape).index_add(0, visits.token, weighted).to(rows.dtype)
