"""fewest_ranks: on how many ranks a training state fits, or None; rounded down, or all is shared at every stage."""

from operator import floordiv

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, type_of
from ..exercises.runs import results

hints = (
    "What does a rank hold whatever N is, and what is divided by N? Stage 1: 4 bytes a parameter, and 12/N.",
    "held + shared / N ≤ memory. Solve for N, and round up: -(-a // b) rounds a / b up, exactly.",
    "Where what is held by every rank leaves no room for a share, however small, there is no N: None. At stage 0 "
    "nothing is shared: 1 or None.",
)

CASES = (  # parameters, memory, stage
    (7_500_000_000, 80_000_000_000, 1), (7_500_000_000, 80_000_000_000, 2), (7_500_000_000, 80_000_000_000, 3),
    (7_500_000_000, 80_000_000_000, 0), (1_000_000, 16_000_000, 0), (1_000, 7_000, 1), (1_000, 4_000, 1),
    (1_000, 4_012, 1), (1_000, 2_000, 2), (3_000, 20_001, 2), (1_000, 100_000, 3),
    (405_853_388_800, 80_000_000_000, 3), (70_553_706_496, 80_000_000_000, 2), (1_000, 1_600, 3),
    (12_000_000, 48_004_800, 1),
)  # fmt: skip


SHARED = (0, 12, 14, 16)  # bytes a parameter that all ranks share at each stage


def up(a, b):
    return -(-a // b)


def fewest(parameters, memory, stage, shared=SHARED, whole=16, over=0, least=1, divide=up):
    """The right number; with other keywords what a mistake gives. whole: bytes a parameter, shared or not."""
    shared = parameters * shared[stage]
    room = memory - (whole * parameters - shared) - over
    if not shared:
        return 1 if room >= 0 else None
    return max(least, divide(shared, room)) if room > 0 else None


MISTAKES = [  # (diagnosis, what it would give)
    ("it returns None where many ranks are needed: is there a largest number that is tried?",
     lambda *case: (n := fewest(*case)) and (n if n <= 1024 else None)),
    ("at stage 0 nothing is shared: more ranks do not help, so it is 1 or None",
     lambda p, m, stage: fewest(p, m, stage) if stage else up(16 * p, m)),
    ("at stage 0 nothing is shared: more ranks do not help, so it is 1 or None",
     lambda p, m, stage: fewest(p, m, stage) if stage else 1),
    ("the number is rounded down, and with so few a rank's share does not fit: round up",
     lambda *case: fewest(*case, divide=floordiv, least=0)),
    ("the number is rounded down, and with so few a rank's share does not fit: round up",
     lambda *case: fewest(*case, divide=floordiv)),
    ("a rank that is exactly full fits: ≤, not <", lambda *case: fewest(*case, over=1)),
    ("one more than is needed: is it rounded up twice, or is 1 added to what is a whole number already?",
     lambda *case: fewest(*case, divide=lambda a, b: a // b + 1)),
    ("only powers of two are tried: any number of ranks will do",
     lambda *case: (n := fewest(*case)) and 1 << (n - 1).bit_length()),
    ("stage 2 shares the gradients as well as the optimizer's part: 14 bytes of 16",
     lambda *case: fewest(*case, shared=(0, 12, 2, 16))),
    ("each stage shares more than the one before: this shares one kind at each",
     lambda *case: fewest(*case, shared=(0, 12, 2, 2))),
    ("everything is divided by N at every stage: only stage 3 does that", lambda p, m, stage: fewest(p, m, 3)),
    ("the stages are one too low: stage 1 shares the optimizer's part already",
     lambda *case: fewest(*case, shared=(0, 0, 12, 14))),
    ("this counts 18 bytes a parameter, with float32 gradients: 2 + 2 + 12 are asked for",
     lambda *case: fewest(*case, shared=(0, 12, 16, 18), whole=18)),
    ("this is float32's 4 + 4 + 8 bytes: 2 + 2 + 12 are asked for",
     lambda *case: fewest(*case, shared=(0, 8, 12, 16))),
    ("the weights that every rank holds at stage 1 and 2 are left out",
     lambda p, m, stage: up(SHARED[stage] * p, m) if stage else fewest(p, m, stage)),
]  # fmt: skip


def check(run):
    labels = [f"{p:,} parameters, {memory:,} bytes a rank, stage {stage}" for p, memory, stage in CASES]
    found = results(run, CASES, labels)
    expected = [fewest(*case) for case in CASES]
    wrong = [i for i, (got, right) in enumerate(zip(found, expected, strict=True)) if not _same(got, right)]
    if not wrong:
        return
    got, right = found[wrong[0]], expected[wrong[0]]
    known = [why for why, mistake in MISTAKES if all(_same(found[i], mistake(*CASES[i])) for i in wrong)]
    raise Wrong(known[0] if known else _trouble(got, right), labels[wrong[0]], str(right), str(got))


def _trouble(got, right):
    if got is not None and (not isinstance(got, int) or isinstance(got, bool)):
        kind = repr(got) if isinstance(got, (int, float)) else type_of(got)
        return f"it returns {kind}: a whole number of ranks, or None, is asked for"
    if right is None:
        return "no number of ranks is enough here: what every rank holds whole leaves no room"
    if got is None:
        return f"it returns None, but {right} ranks are enough"
    return f"with {got} ranks {'fewer would do' if got > right else 'a rank would hold more than its memory'}"


def _same(got, right):
    return type(got) is type(right) and got == right


WHY = (
    "What every rank holds whole is taken off first, and the share of the rest is rounded up. Megatron usually "
    "keeps gradients of bfloat16 in float32, 18 bytes in all, and a real rank needs room besides for "
    "activations, for gathered layers and buckets."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
