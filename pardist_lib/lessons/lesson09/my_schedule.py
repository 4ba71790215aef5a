"""my_schedule: a table that beats 1F1B's bubble within its memory, judged by count and run by torch's own runtime."""

from pardist_lib.mechanisms.pipeline import Schedule, one_f_one_b

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, show, type_of
from ..exercises.runs import results

hints = (
    "In 1F1B a rank waits for backwards while the rank behind still computes gradients of weights, for which nobody "
    "waits. So split every B into I and W: what others wait for comes first.",
    "Begin with 1F1B's order, with I in place of B. Where the last rank has F0 I0 F1 I1 …, its W's are what can fill "
    "the end. But each W that is late keeps a micro-batch: at most p.",
    "On rank r do each W r micro-batches after its I. The warm-up is 1F1B's, p - r - 1 forwards; then F, I, and the W "
    "that is r behind, in turn; at the end the W's that are left.",
    "Draw it: Schedule(rows) shows itself; Schedule(rows).check(), .bubble(1, 1, 1), .in_flight() say what the check "
    "looks at.",
)
CASES = [(4, 8), (2, 3), (3, 5), (4, 4), (3, 3), (6, 13)]
REAL = [(4, 8), (3, 5), (2, 3)]  # those that real ranks run


def check(run):
    labels = [f"{p} ranks, {m} micro-batches" for p, m in CASES]
    got = results(run, CASES, labels)
    for case, rows, label in zip(CASES, got, labels, strict=True):
        _judge(*case, rows, label)
    from .torchs import compared  # torch.distributed.pipelining: a second to import

    for case, rows in zip(CASES, got, strict=True):
        if case in REAL:
            p, m = case
            about = f"{p} ranks, {m} micro-batches, run by torch.distributed.pipelining"
            text = "\n".join(",".join(row) for row in rows)
            seen = run(compared, text, m, n=p, about=about)
            for rank, one in enumerate(seen):
                for name, mine, right in one.kept["gradients"]:
                    if mine is None or not (mine - right).abs().max() < 1e-10:
                        told = "no gradient" if mine is None else show(mine)
                        raise Wrong(f"the table runs, and the gradient of {name} is not one process's",
                                    f"rank {rank}, {about}", show(right), told)  # fmt: skip


def _judge(p, m, rows, label):
    if isinstance(rows, str) or not isinstance(rows, (list, tuple)) or not all(
        isinstance(row, (list, tuple)) and all(isinstance(action, str) for action in row) for row in rows
    ):  # fmt: skip
        raise Wrong(f"it returns {type_of(rows)}: {p} lists of texts such as '2F0' are asked for", label)
    if len(rows) != p:
        raise Wrong(f"there are {len(rows)} rows for {p} ranks", label)
    try:
        table = Schedule(rows).check()
    except ValueError as error:
        raise Wrong(f"it cannot run: {error}", label) from None
    if table.rank_of != list(range(p)):
        raise Wrong(f"the stages 0, 1, … are on the ranks {table.rank_of}: one stage a rank is asked for, stage r on r",
                    label)  # fmt: skip
    if table.micro_batches != m:
        raise Wrong(f"it has {table.micro_batches} micro-batches, not {m}", label)
    held = table.in_flight()
    if max(held) > p:
        rank, lines = held.index(max(held)), "each W that comes late, and each F that comes early, keeps one more"
        raise Wrong(f"rank {rank} has {max(held)} micro-batches in flight, more than 1F1B anywhere: {lines}", label,
                    f"at most {p}", str(held))  # fmt: skip
    ours, theirs = table.bubble(1, 1, 1), one_f_one_b(p, m).bubble(1, 1, 1)
    if ours > theirs - 1e-9:
        why = "its bubble is 1F1B's" if abs(ours - theirs) < 1e-9 else "its bubble is larger than 1F1B's"
        if any(action.kind in "IW" for row in table.rows for action in row):
            why += ": which rank waits, and what could it do meanwhile? Schedule(rows) draws itself"
        else:
            why += ": with whole backwards there is nothing to be gained. In halves, I and W, there is"
        raise Wrong(why, label, f"less than {theirs:.3f}", f"{ours:.3f}")


WHY = (
    "What others wait for goes first: I before W is enough to beat 1F1B. W's that wait, but not too long, fill the "
    "end, too. A bubble of 0.111 at p = 4, m = 8 is ZB-H1 (Qi et al. 2023). PyTorch ships relatives of it, "
    "ScheduleInterleavedZeroBubble and ScheduleZBVZeroBubble."
)
exercise = Exercise(hints, check, minutes=30, level="hard", why=WHY)
