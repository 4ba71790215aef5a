"""A schedule as it is computed and as real ranks ran it, in one form: for each rank (action, start, end) in seconds."""


def computed(schedule, F, I, W, message=0):  # noqa: E741 - the field's letters
    """[[(text, start, end), …] of each rank]. Arguments as for Schedule.times."""
    return [[(str(action), start, end) for action, start, end in row] for row in schedule.times(F, I, W, message)]


def traced(trace):
    """The same of a trace: its regions named "pipeline 2F0", as a Pipeline names them, from the first one's start."""
    rows = [[] for _ in range(trace.world_size)]
    for e in trace.regions:
        if e.name.startswith("pipeline "):
            rows[e.rank].append((e.name.removeprefix("pipeline "), e.start, e.end))
    zero = min(start for row in rows for _, start, _ in row)
    return [[(text, start - zero, end - zero) for text, start, end in row] for row in rows]


def idle(rows, work):
    """The bubble of such rows: the share of the longest rank's span, first start to last end, that is not work, as
    Schedule.bubble counts it. work: seconds that a rank computes in all."""
    span = max(row[-1][2] - row[0][1] for row in rows)
    return max(0.0, 1 - work / span)


def columns(schedule, F, B):
    """A schedule of F and B as if all ranks marched in step: the length of each column, that of its longest action.

    No rank begins its next action before all have done this one: how a table is drawn, and not how it runs.
    """
    rows, done, found = [list(row) for row in schedule.check().rows], set(), []

    def ready(action):
        before = action.stage - 1 if action.kind == "F" else action.stage + 1
        return before not in range(schedule.stages) or action._replace(stage=before) in done

    while any(rows):
        now = [row.pop(0) for row in rows if row and ready(row[0])]
        done.update(now)
        found.append(max({"F": F, "B": B}[action.kind] for action in now))
    return found
