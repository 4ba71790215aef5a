"""What training a transformer costs, as formulas: parameters, floating-point operations, bytes on a rank.

Nothing here is measured. The letters are the papers': h hidden, l layers, a heads, V vocabulary, s sequence, b
micro-batch, B batch (both in sequences), t, p, d, c, e: ranks along the tensor-, pipeline-, data-, context- and
expert-parallel axis. All functions also take a `Plan` whose fields are NumPy arrays, and then give arrays: that is how
planner.py looks at thousands of plans at once. Bytes are bytes: 80e9 is 80 GB, 80 * 2**30 is 80 GiB.

Sources: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (SC'21),
section 5.1 and appendix; Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022),
section 4; Rajbhandari et al., "ZeRO" (2020), section 3.
"""

from dataclasses import dataclass

import numpy as np

RECOMPUTE = ("none", "selective", "full")
# Bytes for each parameter: weights, gradients, optimizer. There are 20, too: of "mixed" in Megatron, which holds 16-bit
# gradients in float32 besides, for the step; of "float32" in torch's DDP, whose buckets are a second copy of gradients.
STATES = {
    "mixed": (2, 2, 12),  # 16-bit weights and gradients; float32 master weights and Adam's two moments: 16 in all
    "mixed, float32 gradients": (2, 4, 12),  # 18, as Megatron's
    "float32": (4, 4, 8),  # 16: no master weights
}


@dataclass(frozen=True)
class Transformer:
    """A decoder-only transformer, by the numbers that its cost depends on. Defaults: GPT-2's and Megatron's kind.

    hidden, layers, heads, vocab, sequence   h, l, a, V, s
    ffn        width inside the MLP; None: 4·hidden
    kv_heads   heads of keys and values (grouped-query attention); None: as many as heads
    head_dim   None: hidden / heads
    gated      the MLP has three matrices (SwiGLU), else two
    bias       of the linear layers; "qkv": of queries, keys and values only
    rms_norm   norms with a weight only (RMSNorm), else weight and bias (LayerNorm)
    positions  learned, s·h of them; False: none (rotary)
    tied       the output layer uses the embedding's weights
    dropout    three in each layer: its masks, and the attention's dropped copy, are kept for backward
    fused      attention in one kernel (FlashAttention): the scores are computed again in backward, never kept
    experts    MLPs in each layer, of which every token visits `active` (mixture of experts); ffn is the width of one
    shared     further MLPs of that width that every token visits, beside `active` of the others
    dense_layers, dense_ffn   the first layers that have one MLP instead, of width dense_ffn (DeepSeek). Parameters and
               floating-point operations know of them; memory and times want layers that are alike, and refuse them

    Raises ValueError where heads do not divide what they have to, and for experts that cannot be.
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    sequence: int
    ffn: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    gated: bool = False
    bias: bool | str = True
    rms_norm: bool = False
    positions: bool = True
    tied: bool = True
    dropout: bool = True
    fused: bool = False
    experts: int = 1
    active: int = 1
    shared: int = 0
    dense_layers: int = 0
    dense_ffn: int | None = None

    def __post_init__(self):
        self._whole_numbers("hidden", "layers", "heads", "vocab", "sequence")
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads do not divide hidden {self.hidden}: give head_dim")
        given = {"ffn": 4 * self.hidden, "kv_heads": self.heads, "head_dim": self.hidden // self.heads}
        for name, default in given.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._whole_numbers(*given, "experts", "active")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} heads of keys and values do not divide {self.heads} heads")
        if self.bias not in (True, False, "qkv"):
            raise ValueError(f'bias is True, False or "qkv", not {self.bias!r}')
        if self.active > self.experts:
            raise ValueError(f"a token cannot visit {self.active} of {self.experts} experts")
        self._whole_numbers("shared", "dense_layers", least=0)
        if self.experts == 1 and (self.shared or self.dense_layers):
            raise ValueError("shared and dense_layers are said of a model with several experts, and this one has 1")
        if self.dense_layers > self.layers:
            raise ValueError(f"{self.dense_layers} dense_layers are more than the {self.layers} layers")
        if self.dense_layers or self.dense_ffn is not None:
            self._whole_numbers("dense_ffn")

    def _whole_numbers(self, *names, least=1):
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is a whole number from {least} on, not {value!r}")

    @property
    def query(self):
        """Width of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def key(self):
        """Width of all heads' keys, and of their values."""
        return self.kv_heads * self.head_dim

    def layer_parts(self):
        """Parameters of a layer, as {"split", "whole", "expert"}: what tensor parallelism splits, what every rank
        has (norms, the bias of a row-parallel layer, the router), and the part of "split" that one expert has."""
        expert = self._mlp(self.ffn)
        attention = self.hidden * (2 * self.query + 2 * self.key) + (self.query + 2 * self.key if self.bias else 0)
        norms = 2 * self.hidden * (1 if self.rms_norm else 2)
        mlps = self.experts + self.shared
        rows = self.hidden * (1 + mlps) if self.bias is True else 0
        router = self.hidden * self.experts if self.experts > 1 else 0
        return {"split": attention + mlps * expert, "whole": norms + rows + router, "expert": expert}

    def _mlp(self, ffn):
        """Parameters of an MLP but for the bias of its last layer."""
        fan_in = 2 if self.gated else 1
        return self.hidden * ffn * (fan_in + 1) + (fan_in * ffn if self.bias is True else 0)

    def parameters(self):
        """All parameters. For Megatron's models 12lh²(1 + 13/(12h) + (V + s)/(12lh)) (SC'21, equation 2), and the
        2h of the last norm, which that equation leaves out."""
        norm = self.hidden * (1 if self.rms_norm else 2)
        tables = (1 if self.tied else 2) * self.vocab * self.hidden + self.positions * self.sequence * self.hidden
        return self._in_layers(self.experts) + tables + norm

    def active_parameters(self):
        """Those that a token meets: all but the experts that it does not visit."""
        return self.parameters() - self._in_layers(self.experts) + self._in_layers(self.active)

    def _in_layers(self, experts):
        """Parameters of all layers, with so many of the experts."""
        parts = self.layer_parts()
        last_bias = self.hidden if self.bias is True else 0
        missing = (self.experts - experts) * (parts["expert"] + last_bias)
        sparse = parts["split"] + parts["whole"] - missing
        if not self.dense_layers:
            return self.layers * sparse
        mlps = self.experts + self.shared
        dense = parts["split"] + parts["whole"] - mlps * (parts["expert"] + last_bias) - self.hidden * self.experts
        dense += self._mlp(self.dense_ffn) + last_bias
        return (self.layers - self.dense_layers) * sparse + self.dense_layers * dense


@dataclass(frozen=True)
class Plan:
    """How a batch is trained on dp·tp·pp·cp ranks (ep is inside dp).

    dp, tp, pp, cp, ep   data-, tensor-, pipeline-, context- and expert-parallel ranks
    micro    sequences in a micro-batch
    v        chunks of layers on each pipeline stage (interleaved schedule); 1: 1F1B
    sp       sequence parallelism along the tensor-parallel axis, what is gathered being gathered again in backward
    zero     0 to 3: what the data-parallel ranks share of optimizer (1), gradients (2), weights (3)
    recompute  "none"; "selective": what is as large as heads × sequence²; "full": whole layers
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    micro: int = 1
    v: int = 1
    sp: bool = False
    zero: int = 0
    recompute: str = "none"

    @property
    def gpus(self):
        return self.dp * self.tp * self.pp * self.cp

    def __str__(self):
        axes = [f"{name}{getattr(self, name)}" for name in ("tp", "cp", "ep", "pp", "dp") if getattr(self, name) > 1]
        extra = [f"v{self.v}"] if self.v > 1 else []
        extra += ["sp"] if self.sp else []
        extra += [f"zero{self.zero}"] if self.zero else []
        extra += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        return " ".join([" × ".join(axes) or "one rank", *extra, f"micro {self.micro}"])


def check(model, plan, batch):
    """Raises ValueError where a plan cannot be, with the nearest number that can."""
    for name in ("dp", "tp", "pp", "cp", "ep", "micro", "v"):
        value = getattr(plan, name)
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a whole number from 1 on, not {value!r}")
    if not isinstance(plan.zero, (int, np.integer)) or isinstance(plan.zero, bool) or plan.zero not in range(4):
        raise ValueError(f"zero is a stage, 0 to 3, not {plan.zero!r}: which stage is meant?")
    check_batch(batch)
    rules = [
        ("tp", model.heads, "heads"),
        ("tp", model.kv_heads if plan.tp <= model.kv_heads else model.heads, "heads of keys and values"),
        ("cp", model.sequence, "tokens of a sequence"),
        ("ep", model.experts, "experts"),
        ("ep", plan.dp, "data-parallel ranks"),
        ("dp", batch, "sequences of a batch"),
    ]
    for name, whole, what in rules:
        if whole % getattr(plan, name):
            raise ValueError(f"{name} {getattr(plan, name)} does not divide {whole} {what}: {_near(plan, name, whole)}")
    if plan.tp > model.kv_heads and plan.tp % model.kv_heads:
        near = plan.tp // model.kv_heads * model.kv_heads
        raise ValueError(
            f"tp {plan.tp} does not spread {model.kv_heads} heads of keys and values evenly: tp {near} gives every "
            f"{near // model.kv_heads} ranks a copy of one"
        )
    if model.layers % (plan.pp * plan.v):
        fits = [p for p in range(1, model.layers + 1) if model.layers % (p * plan.v) == 0]
        nearest = min(fits, key=lambda p: abs(p - plan.pp)) if fits else 1
        raise ValueError(
            f"{model.layers} layers do not make {plan.pp} stages of {plan.v} equal chunks: pp {nearest} does"
            + ("" if fits else " with v 1")
        )
    if batch // plan.dp % plan.micro:
        whole = batch // plan.dp
        raise ValueError(f"micro {plan.micro} does not divide {whole} sequences a rank: {_near(plan, 'micro', whole)}")
    if plan.v > 1 and (plan.pp == 1 or micro_batches(plan, batch) % plan.pp):
        raise ValueError(
            f"v {plan.v}: chunks need a pipeline, and pp {plan.pp} has to divide the {micro_batches(plan, batch)} "
            "micro-batches; v 1 needs neither"
        )
    if plan.recompute not in RECOMPUTE:
        raise ValueError(f"recompute is one of {RECOMPUTE}, not {plan.recompute!r}")
    if not isinstance(plan.sp, (bool, np.bool_)):
        raise ValueError(f"sp is True or False, not {plan.sp!r}")
    if plan.sp and plan.tp == 1:
        raise ValueError("sp shares the sequence among tensor-parallel ranks: with tp 1 there are none")
    if plan.sp and model.sequence // plan.cp % plan.tp:
        raise ValueError(
            f"sp: tp {plan.tp} does not divide {model.sequence // plan.cp} tokens of a sequence: without sp it need not"
        )


def check_batch(batch):
    """Raises ValueError unless it is a number of sequences."""
    if not isinstance(batch, (int, np.integer)) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch is a whole number of sequences from 1 on, not {batch!r}")


def _near(plan, name, whole):
    fits = [n for n in range(1, whole + 1) if whole % n == 0]
    return f"{name} {min(fits, key=lambda n: abs(n - getattr(plan, name)))} does"


def micro_batches(plan, batch):
    """m: micro-batches that each pipeline works on in a step."""
    return batch // (plan.dp * plan.micro)


# ---- floating-point operations --------------------------------------------------------------------------------


def training_flops(model, batch, recompute="none"):
    """Floating-point operations of a step on `batch` sequences, by all ranks together; a multiply-add counts two.

    Matrix products only, as is usual. Attention counts all s² scores, as the papers do, though a causal kernel can
    leave out half. Backward is twice forward. With recompute="full" the layers run forward once more, and this is
    96Bslh²(1 + s/(6h) + V/(16lh)) for Megatron's models (SC'21, equation 3); with "selective" the scores do.
    Model FLOPs (for MFU) are those with recompute="none".
    """
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}
    check_batch(batch)
    if recompute not in again:
        raise ValueError(f"recompute is one of {', '.join(again)}, not {recompute!r}")
    products, scores, logits = forward_flops(model)
    more_products, more_scores = again[recompute]
    a_token = model.layers * ((3 + more_products) * products + (3 + more_scores) * scores) + 3 * logits
    return batch * model.sequence * a_token


def forward_flops(model):
    """(a layer's products with weights, its attention's scores and what they weigh, the logits): for one token."""
    matrices = 3 if model.gated else 2
    router = model.hidden * model.experts if model.experts > 1 else 0
    mlps = model.hidden * matrices * model.ffn * (model.active + model.shared) + router
    if model.dense_layers:  # the mean over the layers
        share = model.dense_layers / model.layers
        mlps = (1 - share) * mlps + share * model.hidden * matrices * model.dense_ffn
    weights = model.hidden * (2 * model.query + 2 * model.key) + mlps
    return 2 * weights, 4 * model.sequence * model.query, 2 * model.hidden * model.vocab


def training_seconds(model, tokens, gpus, flops):
    """8TP/(nX): seconds to train on T `tokens` with n `gpus` that each sustain X `flops` a second, layers being
    recomputed (SC'21, equation 4, which leaves attention's scores and the logits out)."""
    if min(tokens, gpus, flops) <= 0:
        raise ValueError(f"tokens, gpus and flops are above 0, not {tokens!r}, {gpus!r}, {flops!r}")
    return 8 * tokens * model.parameters() / (gpus * flops)


# ---- bytes on a rank ------------------------------------------------------------------------------------------


def bytes_of(states):
    """(weight, gradient, optimizer): bytes for each parameter. states: one of STATES, or three numbers."""
    if isinstance(states, str):
        if states not in STATES:
            raise ValueError(f"states is one of {', '.join(map(repr, STATES))}, or three numbers, not {states!r}")
        return STATES[states]
    if not isinstance(states, (tuple, list)) or len(states) != 3 or min(states) < 0:
        raise ValueError(f"states is bytes of a (weight, gradient, optimizer state), each 0 or more, not {states!r}")
    return tuple(states)


def training_memory(model, plan, batch=None, states="mixed", element=None, mask=1):
    """Bytes on the fullest rank: {"parameters", "gradients", "optimizer", "gathered", "activations", "total"}.

    states   one of STATES, or bytes for a parameter's (weight, gradient, optimizer)
    element  bytes of an activation; None: as a weight has. A logit has 4.
    mask     bytes of a dropout mask's element: 1 as the papers count; eager torch on a CPU keeps `element`
    batch    sequences in all: a pipeline holds no more micro-batches than there are

    Adam's kind of optimizer. "gathered": whole weights that ZeRO-3 has for a moment, of two layers (one in use, one
    arriving) and of what is outside the layers. Not counted: a layer's whole gradient on its way (ZeRO-2, 3), the
    gradients of activations, and what a library holds besides (DDP's buckets, unless gradients are views of them,
    buffers of nccl, fragments, the CUDA context).
    """
    weight, gradient, optimizer = bytes_of(states)
    element = weight if element is None else element
    if not isinstance(plan.recompute, np.ndarray):
        check(model, plan, plan.dp * plan.micro * plan.pp if batch is None else batch)
    stages = {}
    for stage in ("first", "last"):
        common, expert = stage_parameters(model, plan, stage)
        sharers = plan.dp * plan.cp  # ZeRO also shares among the ranks of a context, who hold the same weights
        zero, shared = np.asarray(plan.zero), common / sharers + expert / (sharers / plan.ep)
        ends = common - model.layers / plan.pp * (_layer(model, plan) - _experts(model) / plan.ep) / plan.tp
        gathered = np.minimum(2, model.layers / plan.pp) * _layer(model, plan) / plan.tp + ends
        stages[stage] = {
            "parameters": weight * np.where(zero >= 3, shared, common + expert),
            "gradients": gradient * np.where(zero >= 2, shared, common + expert),
            "optimizer": optimizer * np.where(zero >= 1, shared, common + expert),
            "gathered": weight * np.where(zero >= 3, gathered, 0),
            "activations": activations(model, plan, stage, element, batch, mask),
        }
        stages[stage]["total"] = sum(stages[stage].values())
    first, last = stages["first"], stages["last"]
    fuller = first["total"] >= last["total"]
    return {kind: _plain(np.where(fuller, first[kind], last[kind])) for kind in first}


def stage_parameters(model, plan, stage="first"):
    """(parameters outside the experts, parameters of the experts) on a rank of the first or the last stage.

    A single stage is both. A tied output layer has the embedding's weights once more where it is on another stage.
    """
    _check_alike(model)
    parts, layers = model.layer_parts(), model.layers / plan.pp
    experts = layers * _experts(model)
    again = 2 * (model.hidden + bool(model.bias)) * model.key * (copies(model, plan) - 1)
    common = layers * ((parts["split"] + again) / plan.tp + parts["whole"]) - experts / plan.tp
    table, one = model.vocab * model.hidden / plan.tp, np.asarray(plan.pp) == 1
    positions, norm = model.positions * model.sequence * model.hidden, model.hidden * (1 if model.rms_norm else 2)
    if stage == "first":
        common = common + table + positions + np.where(one, norm + (0 if model.tied else table), 0)
    else:
        common = common + table + norm + np.where(one, positions + (0 if model.tied else table), 0)
    return common, experts / (plan.tp * plan.ep)


def _check_alike(model):
    """Raises ValueError where layers differ: what stages hold would be another number for each."""
    if model.dense_layers:
        raise ValueError(
            f"memory and times are computed for layers that are alike, and {model.dense_layers} of {model.layers} are "
            "dense: dense_layers=0, with all layers alike, comes near"
        )


def copies(model, plan):
    """On how many ranks a head of keys and values is: more than one where there are fewer of them than ranks."""
    return np.maximum(1, np.asarray(plan.tp) / model.kv_heads)


def _experts(model):
    """Parameters of all experts of a layer; 0 where it has one MLP only."""
    return model.layer_parts()["expert"] * model.experts if model.experts > 1 else 0


def _layer(model, plan):
    """Weights that are gathered at once: a layer's that are split, with this rank's experts."""
    experts = _experts(model)
    return model.layer_parts()["split"] - experts + experts / plan.ep


def layer_activations(model, plan, element=2, mask=1):
    """Bytes that one layer keeps for backward, of one micro-batch on one rank.

    For Megatron's models with 2-byte elements: sbh(34 + 5as/h) on one rank; sbh(10 + 24/t + 5as/(ht)) with tensor
    parallelism, sbh(34/t + 5as/(ht)) with sequence parallelism too; "selective" leaves out 5as/h; "full" keeps the
    layer's input, 2sbh (Korthikanti et al., table 2, equations 1, 2, 4, 6). Fused attention keeps no scores, whatever
    is recomputed. Eager torch's dropout masks on a CPU are as wide as what they mask: with mask=element
    sbh(18 + 3as/h)·element. A gated MLP is counted as eager torch keeps it: gate, its SiLU, the other half, their
    product.
    """
    _check_alike(model)
    tokens = model.sequence * plan.micro / plan.cp
    mask = mask if model.dropout else 0
    # beside the split layers: inputs of the two norms and what comes out of them, two dropouts' masks
    whole = 4 * element * model.hidden + 2 * mask * model.hidden
    split = (
        element * (2 * model.query + 2 * model.key * copies(model, plan))
        + element * (4 if model.gated else 2) * (model.active + model.shared) * model.ffn
    )
    if model.experts > 1:  # each token's copies on their way to the experts and back
        split = split + 2 * element * model.active * model.hidden * plan.tp
    scores = model.heads * model.sequence * (element + (mask + element if model.dropout else 0))
    scores = 0 if model.fused else scores
    share = np.where(plan.sp, plan.tp, 1)
    kept = whole / share + (split + np.where(_is(plan, "none"), scores, 0)) / plan.tp
    return tokens * np.where(_is(plan, "full"), element * model.hidden / share, kept)


def activations(model, plan, stage="first", element=2, batch=None, mask=1):
    """Bytes of activations on a rank of the first or the last pipeline stage, at its fullest moment.

    The first stage holds p micro-batches of its l/p layers: as much as one micro-batch of all layers; with chunks
    (1 + (p − 1)/(pv)) times that (Korthikanti et al., section 4.2.3). The last holds one, with chunks
    ((v − 1)p + 1)/v: it goes forward through all chunks but one of p micro-batches before its first backward; and
    the logits. With recompute="full" the layer that runs again has all its activations meanwhile.
    """
    layers, share = model.layers / plan.pp, np.where(plan.sp, plan.tp, 1)
    p, v = np.asarray(plan.pp), np.asarray(plan.v)
    held = np.where(v > 1, p + (p - 1) / v, p) if stage == "first" else ((v - 1) * p + 1) / v
    held = np.where(p == 1, 1, held)
    if batch is not None:
        held = np.minimum(held, micro_batches(plan, batch))
    tokens = model.sequence * plan.micro / plan.cp
    working = Plan(micro=plan.micro, tp=plan.tp, cp=plan.cp, sp=plan.sp, ep=plan.ep)
    again = np.where(_is(plan, "full"), layer_activations(model, working, element, mask), 0)
    embedding = (mask if model.dropout else 0) * tokens * model.hidden / share  # its dropout's mask
    head = tokens * (2 * element * model.hidden / share + 4 * model.vocab / plan.tp)
    if stage == "first":
        ends = embedding * held + np.where(p == 1, head, 0)
    else:
        ends = head + np.where(p == 1, embedding, 0)
    return layers * held * layer_activations(model, plan, element, mask) + again + ends


def _is(plan, recompute):
    return np.asarray(plan.recompute) == recompute


def _plain(value):
    """A number as a number, many as an array."""
    return value.item() if np.ndim(value) == 0 else value
