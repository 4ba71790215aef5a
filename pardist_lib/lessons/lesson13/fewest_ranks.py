"""The exercise fewest_ranks."""

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.watch import watched

hints = (
    "What does a rank hold whatever N is, and what is divided by N? Stage 1: 4 bytes a parameter, and 12/N.",
    "held + shared / N ≤ memory. Solve for N, and round up: -(-a // b) rounds a / b up, exactly.",
    "Where what is held by every rank leaves no room for a share, however small, there is no N: None. At stage 0 "
    "nothing is shared: 1 or None.",
)


def check(run):
    [seen] = run(_each_case, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
    expected = [_fewest(*case) for case in CASES]
    wrong = [i for i, (a, b) in enumerate(zip(seen.result, expected, strict=True)) if not _same(a, b)]
    if not wrong:
        return
    i = wrong[0]
    parameters, memory, stage = CASES[i]
    where = f"{parameters:,} parameters, {memory:,} bytes a rank, stage {stage}"
    shown = {"expected": str(expected[i]), "got": str(seen.result[i])}
    for diagnosis, mistake in MISTAKES:
        if all(_same(seen.result[k], mistake(*CASES[k])) for k in wrong):
            raise Wrong(diagnosis, where, **shown)
    got = seen.result[i]
    if got is not None and (not isinstance(got, int) or isinstance(got, bool)):
        kind = f"{got!r}" if isinstance(got, (int, float)) else type_of(got)
        raise Wrong(f"it returns {kind}: a whole number of ranks, or None, is asked for", where, **shown)
    if expected[i] is None:
        raise Wrong("no number of ranks is enough here: what every rank holds whole leaves no room", where, **shown)
    if got is None:
        raise Wrong(f"it returns None, but {expected[i]} ranks are enough", where, **shown)
    more = "fewer would do" if got > expected[i] else "a rank would hold more than its memory"
    raise Wrong(f"with {got} ranks {more}", where, **shown)


CASES = (  # parameters, memory, stage
    (7_500_000_000, 80_000_000_000, 1),
    (7_500_000_000, 80_000_000_000, 2),
    (7_500_000_000, 80_000_000_000, 3),
    (7_500_000_000, 80_000_000_000, 0),
    (1_000_000, 16_000_000, 0),
    (1_000, 7_000, 1),
    (1_000, 4_000, 1),
    (1_000, 4_012, 1),
    (1_000, 2_000, 2),
    (3_000, 20_001, 2),
    (1_000, 100_000, 3),
    (405_853_388_800, 80_000_000_000, 3),
    (70_553_706_496, 80_000_000_000, 2),
    (1_000, 1_600, 3),
    (12_000_000, 48_004_800, 1),
)


def _fewest(parameters, memory, stage, shares=(0, 12, 14, 16), whole=16, over=0):
    shared = parameters * shares[stage]
    room = memory - (whole * parameters - shared) - over
    if not shared:
        return 1 if room >= 0 else None
    return max(1, -(-shared // room)) if room > 0 else None


def _each_case(answer):
    return watched(lambda: [answer(*case) for case in CASES])


def _same(got, expected):
    if expected is None or got is None:
        return got is expected
    return isinstance(got, int) and not isinstance(got, bool) and got == expected


def _power(n):
    return None if n is None else 1 << (n - 1).bit_length()


def _rounded_down(parameters, memory, stage):
    n = _fewest(parameters, memory, stage)
    shared, room = parameters * (0, 12, 14, 16)[stage], memory - parameters * (16, 4, 2, 0)[stage]
    return n if n is None or not stage else shared // room


MISTAKES = [  # (diagnosis, what the mistake gives)
    ("it returns None where many ranks are needed: is there a largest number that is tried?",
     lambda *case: (n := _fewest(*case)) and (n if n <= 1024 else None)),
    ("at stage 0 nothing is shared: more ranks do not help, so it is 1 or None",
     lambda p, m, stage: _fewest(p, m, stage) if stage else -(-16 * p // m)),
    ("at stage 0 nothing is shared: more ranks do not help, so it is 1 or None",
     lambda p, m, stage: _fewest(p, m, stage) if stage else 1),
    ("the number is rounded down, and with so few a rank's share does not fit: round up", _rounded_down),
    ("the number is rounded down, and with so few a rank's share does not fit: round up",
     lambda *case: (n := _rounded_down(*case)) and max(n, 1)),
    ("a rank that is exactly full fits: ≤, not <", lambda p, m, stage: _fewest(p, m, stage, over=1)),
    ("one more than is needed: is it rounded up twice, or is 1 added to what is a whole number already?",
     lambda p, m, stage: (n := _fewest(p, m, stage)) and (n if not stage else 1 + p * (0, 12, 14, 16)[stage]
                                                            // (m - p * (16, 4, 2, 0)[stage]))),
    ("only powers of two are tried: any number of ranks will do", lambda *case: _power(_fewest(*case))),
    ("stage 2 shares the gradients as well as the optimizer's part: 14 bytes of 16",
     lambda p, m, stage: _fewest(p, m, stage, shares=(0, 12, 2, 16))),
    ("each stage shares more than the one before: this shares one kind at each",
     lambda p, m, stage: _fewest(p, m, stage, shares=(0, 12, 2, 2))),
    ("everything is divided by N at every stage: only stage 3 does that",
     lambda p, m, stage: _fewest(p, m, 3)),
    ("the stages are one too low: stage 1 shares the optimizer's part already",
     lambda p, m, stage: _fewest(p, m, max(stage - 1, 0))),
    ("this counts 18 bytes a parameter, with float32 gradients: 2 + 2 + 12 are asked for",
     lambda p, m, stage: _fewest(p, m, stage, shares=(0, 12, 16, 18), whole=18)),
    ("this is float32's 4 + 4 + 8 bytes: 2 + 2 + 12 are asked for",
     lambda p, m, stage: _fewest(p, m, stage, shares=(0, 8, 12, 16))),
    ("the weights that every rank holds at stage 1 and 2 are left out",
     lambda p, m, stage: -(-p * (0, 12, 14, 16)[stage] // m) if stage else _fewest(p, m, stage)),
]  # fmt: skip


exercise = Exercise(hints, check)
