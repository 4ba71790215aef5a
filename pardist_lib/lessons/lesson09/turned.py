"""What the knobs of this lesson show: any schedule with any costs, and a table in which one action was moved."""

from functools import partial

from pardist_lib import pictures
from pardist_lib.mechanisms.pipeline import Schedule, gpipe, interleaved, one_f_one_b, zbv, zero_bubble

from .shown import computed

SCHEDULES = {
    "GPipe": lambda p, m, v: gpipe(p, m),
    "1F1B": lambda p, m, v: one_f_one_b(p, m),
    "interleaved": interleaved,
    "zero bubble": lambda p, m, v: zero_bubble(p, m),
    "ZB-V": lambda p, m, v: zbv(p, m),
}


def chart_of(name, p, m, v, F, I, W, message):  # noqa: E741 - the field's letters
    """The picture of a schedule of SCHEDULES; where it does not exist for m micro-batches, with the nearest m."""
    make, said = partial(SCHEDULES[name], p, v=v), ""
    try:
        schedule = make(m=m)
    except ValueError as error:
        schedule, said = make(m=int(str(error).split()[-1])), f"{error}, which is drawn. "
    each = schedule.stages // p
    held = ", ".join(f"{k / each:.3g}" for k in schedule.in_flight())
    bubble = schedule.bubble(F, I, W, message)
    note = f"{said}Bubble {bubble:.1%}; rank by rank at most {held} micro-batches in flight (computed)."
    note += f" A stage is 1/{each} of a rank's layers, and so is what it keeps." if each > 1 else ""
    m = schedule.micro_batches
    title = f"{name}, {p} ranks, {m} micro-batch{'es' * (m > 1)}: time {schedule.makespan(F, I, W, message):.4g}"
    return pictures.schedule(computed(schedule, F, I, W, message), title=title, note=note, unit="")


def moved(schedule, rank, place, to):
    """The picture of a schedule in which the action of this rank at `place` was moved to place `to`, counted from 0,
    with F = I = W = 1; or what check() says, with each action at its place."""
    rows = [list(row) for row in schedule.rows]
    action = rows[rank].pop(place)
    rows[rank].insert(to, action)
    what = f"{action} of rank {rank} from place {place} to {to}" if place != to else "nothing moved"
    changed = Schedule(rows)
    try:
        changed.check()
    except ValueError as error:
        places = [[(str(a), i, i + 1) for i, a in enumerate(row)] for row in rows]
        note = f"check(): {error}"
        return pictures.schedule(places, title=f"{what}: it cannot run (drawn by place)", note=note, unit="")
    time, before = (s.makespan(1, 1, 1) for s in (changed, schedule))
    held = ", ".join(map(str, changed.in_flight()))
    note = f"check(): it runs. Time {time:g}, as given {before:g}; in flight {held} (computed)."
    return pictures.schedule(computed(changed, 1, 1, 1), title=what, note=note, unit="")
