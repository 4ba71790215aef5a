"""What a schedule must not be, in words that say where and what to do."""

from itertools import count

from .action import Action, read_action
from .simulate import run, waits_for


def check(schedule):
    """Raises ValueError unless the ranks can run the schedule to its end: see Schedule.check."""
    _check_cells(schedule.rows)
    places = _places(schedule.rows)
    _check_stages(places)
    _check_completeness(schedule, places)
    _check_order(places)
    _check_progress(schedule, places)


def _check_cells(rows):
    """Every rank has something to do, and every cell is an action: rows may have been changed since they were read."""
    if not rows:
        raise ValueError("a schedule has at least one rank: this one has no row")
    for rank, row in enumerate(rows):
        if not row:
            raise ValueError(f"rank {rank} has no action: give it a stage, or leave the rank out")
        for place, cell in enumerate(row):
            if read_action(cell, rank, place) is None or not isinstance(cell, Action):
                raise ValueError(f"rank {rank} at place {place} ({cell}): is no Action: Schedule(rows) makes one of it")


def _places(rows):
    """{action: (rank, place)}, each action once and each stage on one rank."""
    places, homes = {}, {}
    for rank, row in enumerate(rows):
        for place, action in enumerate(row):
            here = f"rank {rank} at place {place} ({action})"
            home, first = homes.setdefault(action.stage, (rank, action))
            if home != rank:
                raise ValueError(
                    f"{here}: stage {action.stage} is on rank {home} already ({first} at place {places[first][1]}): "
                    "a stage's weights are on one rank"
                )
            if action in places:
                raise ValueError(f"{here}: {action} was at place {places[action][1]} already: leave one out")
            places[action] = rank, place
    return places


def _check_stages(places):
    there = {action.stage for action in places}
    missing = next(stage for stage in count() if stage not in there)
    if missing < len(there):
        after = next(action for action in places if action.stage > missing)
        raise ValueError(
            f"{_at(after, places)}: there is no stage {missing} before it: stages go from 0 on without a gap"
        )


def _check_completeness(schedule, places):
    """Each stage has each micro-batch: one F, and one B or else one I and one W."""
    for action in places:
        kinds = {kind for kind in "FBIW" if action._replace(kind=kind) in places}
        F, B, I, W = (action._replace(kind=kind) for kind in "FBIW")  # noqa: E741
        here = _at(action, places)
        halves = [str(half) for half in (I, W) if half.kind in kinds]
        if "F" not in kinds:
            raise ValueError(f"{here}: a backward without its forward: {F} is missing")
        if "B" in kinds and halves:
            raise ValueError(
                f"{_at(B, places)}: B is I and W in one, but here is {' and '.join(halves)}, too: leave one out"
            )
        if kinds == {"F"}:
            raise ValueError(f"{here}: a forward without its backward: add {B}, or {I} and {W}")
        if len(halves) == 1 and "B" not in kinds:
            half, missing = (I, W) if "I" in kinds else (W, I)
            raise ValueError(f"{_at(half, places)}: half a backward: {missing} is missing")
    for stage, rank in enumerate(schedule.rank_of):
        own = {action.micro_batch for action in schedule.rows[rank] if action.stage == stage}
        missing = next(i for i in count() if i not in own)
        proof = next((action for action in places if action.micro_batch >= missing), None)
        if proof:
            raise ValueError(
                f"rank {rank} has no micro-batch {missing} on stage {stage}, but there is {_at(proof, places)}: every "
                "stage has every micro-batch, from 0 on without a gap"
            )


def _check_order(places):
    for action, (_, place) in places.items():
        earlier = {"F": "", "B": "F", "I": "F", "W": "I"}[action.kind]
        if earlier and places[action._replace(kind=earlier)][1] > place:
            first = action._replace(kind=earlier)
            later = places[first][1]
            raise ValueError(f"{_at(action, places)}: {first} comes only at place {later}: it has to be before")


def _check_progress(schedule, places):
    """Follows who waits for whom, from the first rank that is stuck, until a rank comes again."""
    reached = [len(row) for row in run(schedule)]
    stuck = next((r for r, row in enumerate(schedule.rows) if reached[r] < len(row)), None)
    if stuck is None:
        return
    finished = {action for row, end in zip(schedule.rows, reached, strict=True) for action in row[:end]}
    chain = {}  # rank: (what it is stuck at, what that waits for)
    while stuck not in chain:
        front = schedule.rows[stuck][reached[stuck]]
        wanted = next(need for need in _awaited(front, schedule.stages, places) if need not in finished)
        chain[stuck] = front, wanted
        stuck = places[wanted][0]
    circle = list(chain.items())[list(chain).index(stuck) :]
    rank, (front, _) = circle[0]
    told = f"rank {rank} at place {places[front][1]} ({front})"
    for _, (_, wanted) in circle:
        rank, place = places[wanted]
        told += f" waits for {wanted} on rank {rank} at place {place}"
        front = chain[rank][0]
        told += ", which" if front == wanted else f", which stands behind {front}, which"
    raise ValueError(
        f"the ranks wait for each other: {told} closes the circle: in one of these rows, "
        "put what another rank waits for before what it stands behind"
    )


def _awaited(action, stages, places):
    """What it waits for, as the actions that the table has: I, or the B in its place."""
    for stage, kind, micro_batch in waits_for(action, stages):
        need = action._replace(stage=stage, kind=kind, micro_batch=micro_batch)
        yield need if need in places else need._replace(kind="B")


def _at(action, places):
    rank, place = places[action]
    return f"rank {rank} at place {place} ({action})"
