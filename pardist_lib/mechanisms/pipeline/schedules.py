"""The five schedules of the course: who computes what in which order, so that p ranks wait for each other little.

In all of them p is the number of ranks, m that of micro-batches. Times are one micro-batch's on a rank: F for its
forward, B = I + W for its backward, to the input and to the weights. The ideal is m·(F + B); what is beyond it is the
bubble.
"""

from collections import Counter
from operator import index

from .action import Action
from .schedule import Schedule


def gpipe(p, m):
    """All forwards, then all backwards. Time: (m + p − 1)·(F + B); in flight: m on every rank.

    p: ranks, of one stage each; m: micro-batches. Raises ValueError where one is no whole number from 1 on.
    Source: Huang et al., "GPipe" (2019), section 2; backward in the order of forward, as torch does.
    """
    p, m = _whole(p=p, m=m)
    rows = []
    for stage in range(p):
        forwards = [Action(stage, "F", i) for i in range(m)]
        backwards = [Action(stage, "B", i) for i in range(m)]
        rows.append(forwards + backwards)
    return Schedule(rows)


def one_f_one_b(p, m):
    """One forward, one backward: as GPipe in (m + p − 1)·(F + B), but min(m, p − rank) in flight, however large m is.

    A micro-batch comes back to a rank after it has been through the p − rank − 1 ranks behind it. So many forwards
    warm the rank up; from then on each further one is followed by the backward of an earlier micro-batch.

    p: ranks, of one stage each; m: micro-batches. Raises ValueError where one is no whole number from 1 on.
    Source: Narayanan et al., "PipeDream" (2019), there without a flush; "Memory-Efficient Pipeline-Parallel DNN
    Training" (2021), PipeDream-Flush; "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM"
    (2021), section 2.2.1.
    """
    p, m = _whole(p=p, m=m)
    rows = []
    for stage in range(p):
        forwards = [Action(stage, "F", i) for i in range(m)]
        backwards = [[Action(stage, "B", i)] for i in range(m)]
        rows.append(_warm_up_steady_cool_down(forwards, backwards, warm_up=p - stage - 1))
    return Schedule(rows)


def interleaved(p, m, v):
    """1F1B with v stages on a rank: r, r + p, r + 2p, … Time: (m + (p − 1)/v)·(F + B).

    A stage is 1/v as long, and so is the time in which the pipeline fills. p micro-batches go together, first all
    through stage r, then all through stage r + p, and so on; backward the other way round. The price: v times the
    messages, and 2·(p − rank − 1) + (v − 1)·p + 1 of a stage's micro-batches in flight, at most m·v.

    p: ranks; m: micro-batches, with v > 1 a multiple of p; v: stages on a rank, 1 for one_f_one_b.
    Raises ValueError for other m, with the nearest one, and where one is no whole number from 1 on.
    Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM" (2021),
    section 2.2.2.
    """
    p, m, v = _whole(p=p, m=m, v=v)
    if v == 1:
        return one_f_one_b(p, m)
    if m % p:
        nearest = p * max(1, (2 * m + p) // (2 * p))
        raise ValueError(
            f"interleaved: m is {m}, but micro-batches go in groups of p = {p}: the nearest m is {nearest}"
        )
    turns = [(k // p % v, k // (p * v) * p + k % p) for k in range(m * v)]  # (which of the rank's stages, micro-batch)
    rows = []
    for rank in range(p):
        forwards = [Action(rank + p * turn, "F", i) for turn, i in turns]
        backwards = [[Action(rank + p * (v - 1 - turn), "B", i)] for turn, i in turns]
        rows.append(_warm_up_steady_cool_down(forwards, backwards, warm_up=2 * (p - rank - 1) + (v - 1) * p))
    return Schedule(rows)


def zero_bubble(p, m):
    """ZB-H1: 1F1B with the backward in halves, of which W, for which nobody waits, fills what would be bubble.

    Time: m·(F + B) + (p − 1)·(F + I − W), where W is neither longer than F nor than I. Rank r does its W r
    micro-batches late: the backward to the input comes to the ranks before it so much earlier, and what is left over
    at the end fills the time in which it would wait. In flight: p on every rank, the most that 1F1B has on any.

    p: ranks, of one stage each; m: micro-batches, at least p. Raises ValueError for fewer, with the nearest m, and
    where one is no whole number from 1 on.
    Source: Qi et al., "Zero Bubble Pipeline Parallelism" (2023), section 2.
    """
    p, m = _whole(p=p, m=m)
    if m < p:
        raise ValueError(f"zero_bubble: m is {m}, too few micro-batches to fill p = {p} ranks: the nearest m is {p}")
    rows = []
    for stage in range(p):
        late = stage
        forwards = [Action(stage, "F", i) for i in range(m)]
        backwards = [[Action(stage, "I", i), Action(stage, "W", i - late)] for i in range(late, m)]
        backwards = [[Action(stage, "I", i)] for i in range(late)] + backwards
        left_over = [Action(stage, "W", i) for i in range(m - late, m)]
        rows.append(_warm_up_steady_cool_down(forwards, backwards, warm_up=p - stage - 1) + left_over)
    return Schedule(rows)


def _warm_up_steady_cool_down(forwards, backwards, warm_up):
    """One rank's row: `warm_up` forwards; then one forward and one backward in turn; then the backwards that are left.

    forwards: [action, …] in their order; backwards: [[action, …] of each, …], as many.
    """
    warm_up = min(warm_up, len(forwards))
    steady = len(forwards) - warm_up
    row = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards[:steady], strict=True):
        row += [forward, *backward]
    for backward in backwards[steady:]:
        row += backward
    return row


def zbv(p, m):
    """ZB-V: two stages on a rank, r and 2p − 1 − r, so that a micro-batch goes down the ranks and up again, as in a V.

    Where F = I = W and m ≥ 2p − 1, no rank waits between its first action and its last: the whole takes
    (m + (p − 1)/6)·(F + B), in which the last rank starts p − 1 stages late. In flight: at most 2p of a stage's
    micro-batches, as many as p whole ones, the most of 1F1B. The loss is on rank 0, where the input is.

    Smaller m take the table of m = 2p − 1, and leave out what they have not.

    p: ranks; m: micro-batches. Raises ValueError where one is no whole number from 1 on.
    Source: Qi et al., "Zero Bubble Pipeline Parallelism" (2023), section 6; "Pipeline Parallelism with Controllable
    Memory" (2024).
    """
    p, m = _whole(p=p, m=m)
    full = max(m, 2 * p - 1)
    rows = []
    for rank in range(p):
        F, I, W = (Action(rank, kind, 0) for kind in "FIW")  # noqa: E741 - the stage on the way down
        f, i, w = (Action(2 * p - 1 - rank, kind, 0) for kind in "FIW")  # and the one on the way up
        row = [F] * (2 * (p - rank) - 1)  # warm-up: down, until the first micro-batch comes up again;
        row += [f, F] * rank  # up and down in turn, until its first gradient comes;
        row += [f, i, w] * (p - rank)  # one up, one back, until that gradient has been to the last rank and back
        row += [F, I, W, f, i, w] * (full - 2 * p + 1 + rank)  # steady: one forward, one backward on each stage
        row += [I, W, f, i, w] * (p - rank - 1)  # all micro-batches have been down: the last ones come up
        row += [I, i] * rank  # cool-down: first what others wait for,
        row += [I, W] * (p - rank)
        row += [w] * rank + [W] * rank  # then what nobody waits for
        rows.append([action for action in _numbered(row) if action.micro_batch < m])
    return Schedule(rows)


def _numbered(row):
    """The actions with their micro-batches: of each stage and kind from 0 on."""
    done = Counter()
    for action in row:
        yield action._replace(micro_batch=done[action])
        done[action] += 1


def _whole(**numbers):
    """The numbers as int. Raises ValueError, naming it, for one that is no whole number from 1 on."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not hasattr(number, "__index__") or index(number) < 1:
            raise ValueError(f"{name} is {number!r}, but has to be a whole number from 1 on")
    return [index(number) for number in numbers.values()]
