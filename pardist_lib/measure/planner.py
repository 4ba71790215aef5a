"""From what a plan costs to how long a step takes on a described machine; and the search for the fastest plan.

Computed, not measured. The formulas are costs.py's; a message takes α + S/β. Where a number is a judgement (how well
matrix products run, how much communication hides behind them) it is a field of `Machine`, to be measured.

Ranks are laid out as Megatron does: tensor-parallel ones next to each other, then those of a context, then
data-parallel ones, pipeline stages furthest apart. An axis whose groups reach beyond a node uses the links between
nodes; a collective's ring uses those of all its ranks in a node at once, as NCCL's do.

Sources: Narayanan et al. (SC'21), sections 2.2, 3 and 4.1; Korthikanti et al. (2022), section 4.2.2; Rajbhandari et
al. (2020), section 7; Liu et al., "Ring Attention" (2023), for the context axis.
"""

from dataclasses import dataclass, field, fields
from functools import cache
from math import inf

import numpy as np

from .costs import (
    RECOMPUTE,
    Plan,
    activations,
    bytes_of,
    check,
    copies,
    forward_flops,
    layer_activations,
    micro_batches,
    stage_parameters,
    training_flops,
    training_memory,
)


def _numbers(described, *names):
    for name in names:
        if not isinstance(getattr(described, name), (int, float, np.number)):
            raise ValueError(f"{name} is a number, not {getattr(described, name)!r}")


@dataclass(frozen=True)
class Link:
    """What carries messages: `latency` seconds for each, `bandwidth` bytes a second out of one rank."""

    latency: float
    bandwidth: float

    def __post_init__(self):
        _numbers(self, "latency", "bandwidth")
        if not (self.latency >= 0 and self.bandwidth > 0):
            raise ValueError(
                f"a link has a latency of 0 or more seconds and a bandwidth above 0 bytes a second, not "
                f"{self.latency!r} and {self.bandwidth!r}"
            )


@dataclass(frozen=True)
class Machine:
    """What a plan runs on.

    flops       a second, of one GPU, at its peak
    memory      bytes of one GPU that a plan may fill
    node        GPUs in a node
    within, between   links in a node, and between nodes (out of one GPU, all of a node's sending at once)
    efficiency  share of `flops` that a step's matrix products reach
    overlap     share of backward's time behind which data-parallel messages can hide

    What calibration.py measures besides (the defaults leave it out: a GPU's is in its efficiency):

    touch       bytes a second: of activations that are kept for backward, for all that is no matrix product
    layer       seconds of a layer's forward and backward, however small
    update      bytes a second: of weights, gradients and optimizer state, for the optimizer's step
    update_layer  seconds of the optimizer's step for a layer, however small
    calls       {(operation, ranks): Link} where measured, of "all_reduce", "reduce_scatter", "all_gather" of S bytes in
                all, and ("exchange", 2), a message: they count instead of the ring's formula on `within` or `between`
    busy        {ranks at work: seconds of a piece of work by those of all} where ranks share cores: with 2 cores
                {1: 0.5, 2: 0.5, 4: 1}. `flops`, `touch` and `layer` are with all at work; waiting ranks leave
                their share to the others. None: each rank has its own
    """

    flops: float
    memory: float
    node: int
    within: Link
    between: Link
    efficiency: float = 0.5
    overlap: float = 0.8
    touch: float = inf
    layer: float = 0.0
    update: float = inf
    update_layer: float = 0.0
    calls: dict = field(default_factory=dict)
    busy: dict | None = None

    def __post_init__(self):
        _numbers(self, "flops", "memory", "node", "efficiency", "overlap", "touch", "layer", "update", "update_layer")
        for name in ("within", "between"):
            if not isinstance(getattr(self, name), Link):
                raise ValueError(f"{name} is a Link(latency, bandwidth), not {getattr(self, name)!r}")
        for name in ("flops", "memory", "node", "touch", "update"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of a machine is above 0, not {getattr(self, name)!r}")
        if not isinstance(self.node, (int, np.integer)):
            raise ValueError(f"node is a whole number of GPUs, not {self.node!r}")
        for name, low in (("efficiency", 1e-9), ("overlap", 0)):
            if not low <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)!r}")
        if min(self.layer, self.update_layer) < 0:
            raise ValueError(f"layer and update_layer are 0 or more seconds, not {self.layer!r}, {self.update_layer!r}")


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and where they go. The parts add up: what hides behind computing is in none of them.

    compute    forward and backward, what is recomputed too
    optimizer  its step
    bubble     waiting for the pipeline to fill and to drain
    tensor, context, expert, pipeline, data   messages of each axis that nothing hides
    hidden     seconds of data-parallel messages behind backward: not in `seconds`
    mfu        model FLOPs, nothing recomputed, by what the GPUs' peak would have allowed
    memory     bytes on the fullest rank, as `training_memory` gives them
    """

    seconds: float
    compute: float
    optimizer: float
    bubble: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    hidden: float
    mfu: float
    memory: dict

    PARTS = ("compute", "optimizer", "bubble", "tensor", "context", "expert", "pipeline", "data")


def half_all_reduce(ranks, size, latency, bandwidth):
    """Seconds of an all-gather or a reduce-scatter of `size` bytes in all, by a ring: (n − 1)·α + (n − 1)/n·S/β."""
    return (ranks - 1) * latency + (ranks - 1) / ranks * size / bandwidth


def estimate(model, plan, machine, batch=None, states="mixed"):
    """An `Estimate` for a step on `batch` sequences (None: a micro-batch for each pipeline stage).

    Raises ValueError where the plan cannot be; whether it fits into memory is for the caller to see.

    The slowest stage is the last one, which has the logits. A step is the time of its m micro-batches, times
    1 + (p − 1)/(vm), and the data-parallel messages that do not hide: behind the last micro-batch's backward, or, with
    ZeRO-2 and 3, which send for every micro-batch, behind each.
    """
    batch = plan.dp * plan.micro * plan.pp if batch is None else batch
    check(model, plan, batch)
    memory = training_memory(model, plan, batch, states)
    parts = {name: float(value) for name, value in _seconds(model, plan, machine, batch, states).items()}
    return Estimate(**parts, memory=memory)


def _seconds(model, plan, machine, batch, states):
    """An Estimate's numbers but for memory; for many plans at once where the plan's fields are arrays."""
    weight, gradient, optimizer = bytes_of(states)
    m, layers = micro_batches(plan, batch), model.layers / plan.pp
    tokens = model.sequence * plan.micro / plan.cp
    hidden = weight * tokens * model.hidden  # bytes of a layer's input
    sp, full = np.asarray(plan.sp), np.asarray(plan.recompute) == "full"
    kept_all = np.asarray(plan.recompute) == "none"
    piped, zero = np.asarray(plan.pp) > 1, np.asarray(plan.zero)

    # computing: forward, backward twice that, and what is recomputed. Fused attention's backward does 5 products for
    # forward's 2, because the scores are computed again (Dao, "FlashAttention-2", 2023, section 4.1)
    products, scores, logits = forward_flops(model)
    of_scores = 3.5 + 1.0 * full if model.fused else np.where(kept_all, 3, 4)
    a_layer = products * (3 + 1.0 * full) + scores * of_scores
    flops = tokens * (layers * a_layer + 3 * logits) / plan.tp
    touched, visits = _besides(model, plan, layers, weight, full) if machine.touch < inf or machine.layer else (0, 0)
    a_micro_batch = flops / (machine.flops * machine.efficiency) + touched / machine.touch + visits * machine.layer
    compute = m * a_micro_batch
    forward = tokens * (layers * (products + scores) + logits) / plan.tp
    backward = a_micro_batch * (1 - forward / flops)

    # tensor: an all-reduce is two halves; 2 forward and 2 backward in a layer, and what is run again. Sequence
    # parallelism has the same halves, and gathers two inputs again
    whole = layers * (4 + 2 * full) + 2  # … and the embedding's output, the gradient of the logits' input
    scattered, gathered = layers * (4 + 2 * full) + 2, layers * (6 + 2 * full) + 2
    tensor = np.where(
        sp,
        scattered * _call(machine, "reduce_scatter", plan.tp, hidden, plan.tp)
        + gathered * _call(machine, "all_gather", plan.tp, hidden, plan.tp),
        whole * _call(machine, "all_reduce", plan.tp, hidden, plan.tp),
    )
    tensor = m * tensor
    # context: keys and values go round forward, and come round again with their gradients
    around = 2 * weight * tokens * model.key * copies(model, plan) / plan.tp
    context = m * layers * (plan.cp - 1) * (3 + 1 * full) * _message(machine, around, plan.tp * plan.cp)
    # expert: each token's copies there and back, forward and backward
    routed = weight * tokens * model.active * model.hidden / np.where(sp, plan.tp, 1)
    there = _message(machine, routed * (plan.ep - 1) / plan.ep, plan.tp * plan.cp * plan.ep)
    expert = m * layers * (4 + 2 * full) * np.where(np.asarray(plan.ep) > 1, there, 0)
    # pipeline: a micro-batch's activations and their gradient cross a stage's edge, v times; a tied table is on two
    # stages, whose gradients are added up
    edge = _message(machine, hidden / np.where(sp, plan.tp, 1), plan.gpus)
    table = gradient * model.vocab * model.hidden / plan.tp if model.tied else 0
    ends = _call(machine, "all_reduce", 2, table, plan.gpus) if model.tied else 0
    pipeline = np.where(piped, m * 2 * plan.v * edge + ends, 0)

    # data: gradients summed and weights spread, behind backward as far as it goes
    common, experts = stage_parameters(model, plan, "first")
    units = layers + 1  # what ZeRO-2 and 3 send one by one
    sent = _data(machine, plan, common, plan.dp * plan.cp, zero, (weight, gradient), units, m)
    if model.experts > 1:  # an expert's copies are fewer
        sent = sent + _data(machine, plan, experts, plan.dp * plan.cp / plan.ep, zero, (weight, gradient), units, m)
    hides = np.minimum(sent, np.where(zero >= 2, m, 1) * machine.overlap * backward)
    data = sent - hides

    # the optimizer's step, on a share of the parameters where they are shared
    share = np.where(zero >= 1, plan.dp * plan.cp, 1)
    held = common / share + experts / np.where(zero >= 1, plan.dp * plan.cp / plan.ep, 1)
    step = (layers + 1) * machine.update_layer + held * (weight + gradient + optimizer) / machine.update

    busy = compute + tensor + context + expert + pipeline
    bubble = busy * _waiting(machine, plan, m)
    seconds = busy + step + bubble + data
    useful = training_flops(model, batch) / (plan.gpus * machine.flops)
    return {
        "seconds": seconds, "compute": compute, "optimizer": step, "bubble": bubble, "tensor": tensor,
        "context": context, "expert": expert, "pipeline": pipeline, "data": data, "hidden": hides,
        "mfu": useful / seconds,
    }  # fmt: skip


def _besides(model, plan, layers, element, full):
    """(bytes of activations that a micro-batch's forward leaves on the last stage, layers it goes through)."""
    kind = Plan(micro=plan.micro, tp=plan.tp, cp=plan.cp, sp=plan.sp, ep=plan.ep, recompute="none")
    again = 1 + full / 3  # forward is about a third of it
    head = activations(model, kind, "first", element) - model.layers * layer_activations(model, kind, element)
    return again * layers * layer_activations(model, kind, element) + head, again * layers + 1


def _data(machine, plan, parameters, sharers, zero, sizes, units, m):
    """Seconds of the data-parallel messages of a step, for parameters that `sharers` ranks share."""
    weight, gradient = sizes
    reach = plan.tp * plan.dp * plan.cp

    def calls(operation, size, many):
        return many * _call(machine, operation, sharers, size / many, reach)

    summed = calls("all_reduce", gradient * parameters, 1)
    halves = calls("reduce_scatter", gradient * parameters, 1) + calls("all_gather", weight * parameters, 1)
    scattered = m * calls("reduce_scatter", gradient * parameters, units)
    spread = calls("all_gather", weight * parameters, units)
    return np.select(
        [zero == 0, zero == 1, zero == 2], [summed, halves, scattered + spread], scattered + 2 * m * spread
    )


def _waiting(machine, plan, m):
    """The bubble, by the time without it: (p − 1)/(vm); less where those at work get the cores of those who wait.

    Stage by stage the schedule takes vm + p − 1 slots, in which 1, 2, … min(p, vm) … 2, 1 stages are at work.
    """
    if machine.busy is None:
        return (plan.pp - 1) / (np.asarray(plan.v) * m)
    ranks = np.array(sorted(machine.busy), float)
    speed = np.array([machine.busy[k] for k in sorted(machine.busy)])

    def one(p, work, others):
        slots = np.arange(1, work + p)
        at_work = np.minimum(np.minimum(slots, slots[::-1]), min(p, work))
        return np.interp(at_work * others, ranks, speed).sum() / work / np.interp(p * others, ranks, speed) - 1

    others = plan.gpus // plan.pp
    found = {
        key: one(*key)
        for key in set(zip(*map(np.ravel, np.broadcast_arrays(plan.pp, plan.v * m, others)), strict=True))
    }
    return np.vectorize(lambda *key: found[key], otypes=[float])(plan.pp, plan.v * m, others)


def _call(machine, operation, ranks, size, reach):
    """Seconds of a collective on `ranks` ranks among `reach` neighbours: as measured, or a ring's.

    A ring over several nodes leaves each by the cards of all its ranks there, a part of the tensor by each.
    """
    halves = 2 if operation == "all_reduce" else 1
    latency, bandwidth = _link(machine, reach)
    together = np.clip(machine.node * np.asarray(ranks) // reach, 1, ranks)  # of these ranks, in a node
    bandwidth = np.where(
        np.asarray(reach) <= machine.node, bandwidth, np.minimum(machine.within.bandwidth, together * bandwidth)
    )
    seconds = halves * half_all_reduce(ranks, size, latency, bandwidth)
    for (name, n), link in machine.calls.items():
        if name == operation:
            seconds = np.where(np.asarray(ranks) == n, link.latency + size / link.bandwidth, seconds)
    return np.where(np.asarray(ranks) > 1, seconds, 0)


def _message(machine, size, reach):
    """Seconds of a message to a rank `reach` neighbours away."""
    if measured := machine.calls.get(("exchange", 2)):
        return measured.latency + size / measured.bandwidth
    latency, bandwidth = _link(machine, reach)
    return latency + size / bandwidth


def _link(machine, reach):
    """(latency, bandwidth) of the links that `reach` neighbouring ranks need: a node's own where they fit into it."""
    inside = np.asarray(reach) <= machine.node
    return (
        np.where(inside, machine.within.latency, machine.between.latency),
        np.where(inside, machine.within.bandwidth, machine.between.bandwidth),
    )


# ---- the search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """A plan, what it is estimated to take, and why it is not the best one ("" for the best)."""

    plan: Plan
    estimate: Estimate
    why: str


def best_plans(model, machine, gpus, batch, *, states="mixed", most=10, max_micro=16, only=None):
    """The fastest plans for `gpus` GPUs and a batch of `batch` sequences that fit into memory: a list of `Ranked`.

    Looks at every plan there is: all ways to split the GPUs over the axes, all micro-batches up to max_micro, all
    numbers of chunks, sequence parallelism, ZeRO stages and recomputation (fused attention leaves nothing for
    "selective" to do). Where two take equally long, the one that needs less memory comes first.

    only   {field of a plan: the values it may have}, such as {"pp": (1,), "zero": (0, 3)}

    Raises ValueError where there is none, and says what comes nearest to fitting.
    """
    for name, value in (("gpus", gpus), ("batch", batch), ("most", most), ("max_micro", max_micro)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a whole number from 1 on, not {value!r}")
    if unknown := set(only or {}) - {f.name for f in fields(Plan)}:
        raise ValueError(f"a plan has no {', '.join(sorted(unknown))}: {', '.join(f.name for f in fields(Plan))}")
    for name, values in (only or {}).items():
        if not isinstance(values, (tuple, list, set, range)):
            raise ValueError(f"only has several values of {name}, such as ({values!r},), not {values!r}")
    bytes_of(states)
    plans = _all_plans(model, gpus, batch, max_micro, only)
    if not len(plans.dp):
        limits = "".join(f", {name} of {tuple(values)}" for name, values in (only or {}).items())
        near = _nearest_gpus(model, gpus, batch, max_micro, only)
        raise ValueError(
            f"{gpus} GPUs cannot be laid out for {model.heads} heads, {model.layers} layers and a batch of "
            f"{batch}{limits}: " + (f"{near} can" if near else "no number near it can either")
        )
    memory = training_memory(model, plans, batch, states)
    seconds = _seconds(model, plans, machine, batch, states)
    fits = memory["total"] <= machine.memory
    if not fits.any():
        least = int(np.argmin(memory["total"]))
        raise ValueError(
            f"no plan for {gpus} GPUs fits into {machine.memory / 1e9:.4g} GB each: {_plan(plans, least)} comes "
            f"nearest with {memory['total'][least] / 1e9:.4g} GB{_more_gpus(model, machine, gpus, batch, states)}"
        )
    order = np.lexsort((memory["total"], np.where(fits, seconds["seconds"], np.inf)))
    best, ranked = None, []
    for i in order[: min(most, int(fits.sum()))]:
        plan = _plan(plans, i)
        numbers = estimate(model, plan, machine, batch, states)
        best = best or numbers
        ranked.append(Ranked(plan, numbers, "" if numbers is best else _why(numbers, best)))
    return ranked


def why_not(model, plan, machine, batch, states="mixed"):
    """Why a plan is not the best one of as many GPUs, in a sentence; "" where it is, or takes as long."""
    numbers = estimate(model, plan, machine, batch, states)
    if numbers.memory["total"] > machine.memory:
        largest = max((k for k in numbers.memory if k != "total"), key=numbers.memory.get)
        return (
            f"it does not fit: {numbers.memory['total'] / 1e9:.4g} GB of {machine.memory / 1e9:.4g}, most of it "
            f"{largest} ({numbers.memory[largest] / 1e9:.4g})"
        )
    return _why(numbers, best_plans(model, machine, plan.gpus, batch, states=states, most=1)[0].estimate)


def _why(numbers, best):
    more = numbers.seconds / best.seconds - 1
    if more < 5e-4:
        extra = (numbers.memory["total"] - best.memory["total"]) / 1e9
        return f"as fast, with {extra:.3g} GB more" if extra > 0.005 else ""
    gap = {name: getattr(numbers, name) - getattr(best, name) for name in Estimate.PARTS}
    worst, saved = max(gap, key=gap.get), min(gap, key=gap.get)
    though = f", though {saved} is {-gap[saved]:.3g} s less" if -gap[saved] > 0.1 * gap[worst] else ""
    return f"{more:.1%} slower, most of it {worst}: {gap[worst]:+.3g} s{though}"


def _all_plans(model, gpus, batch, max_micro, only=None):
    """Every plan that `check` lets pass, as one Plan of arrays."""
    rows, only = [], {name: set(values) for name, values in (only or {}).items()}

    def some(name, values):
        return [n for n in values if name not in only or n in only[name]]

    for tp in some("tp", _divisors(gpus)):
        if model.heads % tp or (model.kv_heads % tp if tp <= model.kv_heads else tp % model.kv_heads):
            continue
        for pp in some("pp", _divisors(gpus // tp)):
            if model.layers % pp:
                continue
            for cp in some("cp", _divisors(gpus // tp // pp)):
                dp = gpus // tp // pp // cp
                if model.sequence % cp or batch % dp or not some("dp", [dp]):
                    continue
                experts = some("ep", [ep for ep in _divisors(dp) if model.experts % ep == 0])
                for micro in some("micro", [n for n in _divisors(batch // dp) if n <= max_micro]):
                    m = batch // dp // micro
                    chunks = [v for v in _divisors(model.layers // pp) if v == 1 or (pp > 1 and m % pp == 0)]
                    rows += [(dp, tp, pp, cp, ep, micro, v) for ep in experts for v in some("v", chunks)]
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    recompute = [how for how in RECOMPUTE if not (model.fused and how == "selective")]
    choices = [
        (sp, zero, how)
        for sp in some("sp", (False, True))
        for zero in some("zero", range(4))
        for how in some("recompute", recompute)
    ]
    columns = np.repeat(table, len(choices), 0).T
    kinds = zip(*choices, strict=True) if choices else ([], [], [])
    sp, zero, how = (np.tile(np.array(column), len(table)) for column in kinds)
    dp, tp, _, cp = columns[:4]
    shares = (tp > 1) & (model.sequence // cp % tp == 0)
    keep = (~sp.astype(bool) | shares) & ((zero == 0) | (dp * cp > 1))
    return Plan(*(column[keep] for column in (*columns, sp, zero, how)))


def _plan(plans, i):
    """The i-th of many plans."""
    values = {f.name: getattr(plans, f.name)[i].item() for f in fields(Plan)}
    return Plan(**values)


def _nearest_gpus(model, gpus, batch, max_micro, only, tries=100):
    """The number of GPUs nearest to `gpus` for which there is a plan; None where `tries` of them have none."""
    whole = {"tp": model.heads, "pp": model.layers, "cp": model.sequence, "dp": batch}
    counts = {1}
    for axis, divided in whole.items():
        ways = [n for n in _divisors(divided) if n in (only or {}).get(axis, (n,))]
        counts = {c * n for c in counts for n in ways if c * n <= 2 * gpus}
    near = sorted(counts, key=lambda n: (abs(n - gpus), n))[:tries]
    return next((n for n in near if len(_all_plans(model, n, batch, max_micro, only).dp)), None)


def _more_gpus(model, machine, gpus, batch, states, most=64):
    """': twice as many would do', where some multiple of them would."""
    times = 2
    while times <= most:
        plans = _all_plans(model, times * gpus, batch, 1)
        if len(plans.dp) and training_memory(model, plans, batch, states)["total"].min() <= machine.memory:
            return f"; {times * gpus} GPUs would do"
        times *= 2
    return ""


@cache
def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]
