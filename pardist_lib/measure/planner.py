"""From what a plan costs to how long a step takes on a described machine; and the search for the fastest plan.

Computed, not measured. The formulas are costs.py's; a message takes α + S/β. Where a number is a judgement (how well
matrix products run, how much communication hides behind them) it is a field of `Machine`, to be measured.

Ranks are laid out as Megatron does: tensor-parallel ones next to each other, then those of a context, then
data-parallel ones, pipeline stages furthest apart. An axis whose groups reach beyond a node uses the links between
nodes.

Sources: Narayanan et al. (SC'21), sections 2.2, 3 and 4.1; Korthikanti et al. (2022), section 4.2.2; Rajbhandari et
al. (2020), section 7; Liu et al., "Ring Attention" (2023), for the context axis.
"""

from dataclasses import dataclass, fields

import numpy as np

from .costs import (
    STATES,
    Plan,
    check,
    forward_flops,
    micro_batches,
    stage_parameters,
    training_flops,
    training_memory,
)


@dataclass(frozen=True)
class Link:
    """What carries messages: `latency` seconds for each, `bandwidth` bytes a second out of one rank."""

    latency: float
    bandwidth: float

    def __post_init__(self):
        if self.latency < 0 or self.bandwidth <= 0:
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
    """

    flops: float
    memory: float
    node: int
    within: Link
    between: Link
    efficiency: float = 0.5
    overlap: float = 0.8

    def __post_init__(self):
        for name in ("flops", "memory", "node"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} of a machine is above 0, not {getattr(self, name)!r}")
        for name, low in (("efficiency", 1e-9), ("overlap", 0)):
            if not low <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)!r}")


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and where they go. The parts add up: what hides behind computing is in none of them.

    compute   matrix products, what is recomputed too
    bubble    waiting for the pipeline to fill and to drain
    tensor, context, expert, pipeline, data   messages of each axis that nothing hides
    hidden    seconds of data-parallel messages behind backward: not in `seconds`
    mfu       model FLOPs, nothing recomputed, by what the GPUs' peak would have allowed
    memory    bytes on the fullest rank, as `training_memory` gives them
    """

    seconds: float
    compute: float
    bubble: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    hidden: float
    mfu: float
    memory: dict

    PARTS = ("compute", "bubble", "tensor", "context", "expert", "pipeline", "data")


def half_all_reduce(ranks, size, latency, bandwidth):
    """Seconds of an all-gather or a reduce-scatter of `size` bytes in all, by a ring: (n − 1)·α + (n − 1)/n·S/β."""
    return (ranks - 1) * latency + (ranks - 1) / ranks * size / bandwidth


def estimate(model, plan, machine, batch, states="mixed"):
    """An `Estimate` for a step on `batch` sequences. Raises ValueError where the plan cannot be; whether it fits
    into memory is for the caller to see.

    The slowest stage is the last one, which has the logits. A step is the time of its m micro-batches, times
    1 + (p − 1)/(vm), and the data-parallel messages that do not hide: behind the last micro-batch's backward, or, with
    ZeRO-2 and 3, which send for every micro-batch, behind each.
    """
    check(model, plan, batch)
    memory = training_memory(model, plan, batch, states)
    parts = {name: float(value) for name, value in _seconds(model, plan, machine, batch, states).items()}
    return Estimate(**parts, memory=memory)


def _seconds(model, plan, machine, batch, states):
    """An Estimate's numbers but for memory; for many plans at once where the plan's fields are arrays."""
    weight, gradient, _ = _bytes_of(states)
    m, layers = micro_batches(plan, batch), model.layers / plan.pp
    tokens = model.sequence * plan.micro / plan.cp
    hidden = weight * tokens * model.hidden  # bytes of a layer's input
    sp, full = np.asarray(plan.sp), np.asarray(plan.recompute) == "full"
    speed = machine.flops * machine.efficiency

    # computing: forward, backward twice that, and what is recomputed
    products, scores, logits = forward_flops(model)
    again = np.where(full, 1, 0), np.where(np.asarray(plan.recompute) == "none", 0, 1)
    a_layer = products * (3 + again[0]) + scores * (3 + again[1])
    compute = m * tokens * (layers * a_layer + 3 * logits) / plan.tp / speed
    backward = tokens * (layers * (a_layer - products - scores) + 2 * logits) / plan.tp / speed

    # tensor: an all-reduce is two halves; 2 forward and 2 backward in a layer, and what is run again. Sequence
    # parallelism has the same halves, and gathers two inputs again
    halves = np.where(sp, 10, 8) + 4 * np.where(full, 1, 0)
    half = half_all_reduce(plan.tp, hidden, *_link(machine, plan.tp))
    tensor = m * half * (layers * halves + 4)  # embedding's output, and the gradient of the logits' input
    # context: keys and values go round forward, and come round again with their gradients
    around = 2 * weight * tokens * model.key / plan.tp
    context = m * layers * (plan.cp - 1) * 3 * _message(around, *_link(machine, plan.tp * plan.cp))
    # expert: each token's copies there and back, forward and backward
    copies = weight * tokens * model.active * model.hidden / np.where(sp, plan.tp, 1)
    there = _message(copies * (plan.ep - 1) / plan.ep, *_link(machine, plan.tp * plan.cp * plan.ep))
    expert = m * layers * 4 * np.where(np.asarray(plan.ep) > 1, there, 0)
    # pipeline: a micro-batch's activations and their gradient cross a stage's edge, v times
    edge = _message(hidden / np.where(sp, plan.tp, 1), *_link(machine, plan.gpus))
    pipeline = np.where(np.asarray(plan.pp) > 1, m * 2 * plan.v * edge, 0)

    # data: gradients summed and weights spread, behind backward as far as it goes
    common, experts = stage_parameters(model, plan, "first")
    sharers = plan.dp * plan.cp
    link = _link(machine, plan.tp * sharers)
    zero = np.asarray(plan.zero)
    summing = half_all_reduce(sharers, gradient * (common + experts / plan.ep), *link)
    spreading = half_all_reduce(sharers, weight * (common + experts / plan.ep), *link)
    times, window = np.where(zero >= 2, m, 1), machine.overlap * backward
    sent = times * (summing + np.where(zero >= 3, 2, 0) * spreading) + np.where(zero >= 3, 0, spreading)
    hidden_behind = np.minimum(sent, times * window)
    data = sent - hidden_behind

    busy = compute + tensor + context + expert + pipeline
    bubble = busy * (plan.pp - 1) / (np.asarray(plan.v) * m)
    seconds = busy + bubble + data
    useful = training_flops(model, batch) / (plan.gpus * machine.flops)
    return {
        "seconds": seconds, "compute": compute, "bubble": bubble, "tensor": tensor, "context": context,
        "expert": expert, "pipeline": pipeline, "data": data, "hidden": hidden_behind, "mfu": useful / seconds,
    }  # fmt: skip


def _message(size, latency, bandwidth):
    return latency + size / bandwidth


def _link(machine, reach):
    """(latency, bandwidth) of the links that `reach` neighbouring ranks need: a node's own where they fit into it."""
    inside = np.asarray(reach) <= machine.node
    return (
        np.where(inside, machine.within.latency, machine.between.latency),
        np.where(inside, machine.within.bandwidth, machine.between.bandwidth),
    )


def _bytes_of(states):
    return STATES[states] if isinstance(states, str) else states


# ---- the search -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranked:
    """A plan, what it is estimated to take, and why it is not the best one ("" for the best)."""

    plan: Plan
    estimate: Estimate
    why: str


def best_plans(model, machine, gpus, batch, *, states="mixed", most=10, max_micro=16):
    """The fastest plans for `gpus` GPUs and a batch of `batch` sequences that fit into memory: a list of `Ranked`.

    Looks at every plan there is: all ways to split the GPUs over the axes, all micro-batches up to max_micro, all
    numbers of chunks, sequence parallelism, ZeRO stages and recomputation. Where two take equally long, the one that
    needs less memory comes first. Raises ValueError where there is none, and says what comes nearest to fitting.
    """
    if gpus < 1 or batch < 1:
        raise ValueError(f"gpus and batch are whole numbers from 1 on, not {gpus!r} and {batch!r}")
    plans = _all_plans(model, gpus, batch, max_micro)
    if not len(plans.dp):
        raise ValueError(
            f"{gpus} GPUs cannot be laid out for {model.heads} heads, {model.layers} layers and a batch of {batch}: "
            f"{_nearest_gpus(model, gpus, batch, max_micro)} can"
        )
    memory = training_memory(model, plans, batch, states)
    seconds = _seconds(model, plans, machine, batch, states)
    fits = memory["total"] <= machine.memory
    if not fits.any():
        least = int(np.argmin(memory["total"]))
        raise ValueError(
            f"no plan for {gpus} GPUs fits into {machine.memory / 1e9:.4g} GB each: {_plan(plans, least)} comes "
            f"nearest with {memory['total'][least] / 1e9:.4g} GB"
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
    worst = max(gap, key=gap.get)
    return f"{more:.1%} slower, most of it {worst}: {gap[worst]:+.3g} s"


def _all_plans(model, gpus, batch, max_micro):
    """Every plan that `check` lets pass, as one Plan of arrays."""
    rows = []
    for tp in _divisors(gpus):
        if model.heads % tp or (tp <= model.kv_heads and model.kv_heads % tp):
            continue
        for pp in _divisors(gpus // tp):
            if model.layers % pp:
                continue
            for cp in _divisors(gpus // tp // pp):
                dp = gpus // tp // pp // cp
                if model.sequence % cp or batch % dp:
                    continue
                experts = [ep for ep in _divisors(dp) if model.experts % ep == 0]
                for micro in (n for n in _divisors(batch // dp) if n <= max_micro):
                    m = batch // dp // micro
                    chunks = [v for v in _divisors(model.layers // pp) if v == 1 or (pp > 1 and m % pp == 0)]
                    rows += [(dp, tp, pp, cp, ep, micro, v) for ep in experts for v in chunks]
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    choices = [(sp, zero, how) for sp in (False, True) for zero in range(4) for how in ("none", "selective", "full")]
    columns = np.repeat(table, len(choices), 0).T
    sp, zero, how = (np.tile(np.array(column), len(table)) for column in zip(*choices, strict=True))
    dp, tp, _, cp = columns[:4]
    keep = (~sp | (tp > 1)) & ((zero == 0) | (dp * cp > 1))
    return Plan(*(column[keep] for column in (*columns, sp, zero, how)))


def _plan(plans, i):
    """The i-th of many plans."""
    values = {f.name: getattr(plans, f.name)[i].item() for f in fields(Plan)}
    return Plan(**values)


def _nearest_gpus(model, gpus, batch, max_micro):
    others = sorted(range(1, 2 * gpus + 1), key=lambda n: (abs(n - gpus), n))
    return next((n for n in others if len(_all_plans(model, n, batch, max_micro).dp)), 1)


def _divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]
