"""The exercises of lesson 13: hints, and how an answer is checked."""

import math

from .cases import numbers
from .judge import Wrong, type_of
from .watch import watched


class ring_pays_from:
    hints = (
        "Both take a constant number of seconds (messages · α) and seconds for each byte (bytes sent for each byte of "
        "the tensor / β). Write down the two lines.",
        "Ring: 2(n - 1)·α + 2(n - 1)/n·S/β. Recursive doubling: log2(n)·α + log2(n)·S/β. Set them equal, solve for S.",
        "S = (2(n - 1) - log2 n)·α·β / (log2 n - 2(n - 1)/n). With two ranks both send the same bytes: what is "
        "divided by is 0 then, and the ring, with twice the messages, never wins.",
    )

    @staticmethod
    def check(run):
        inputs = [(4, 1e-4, 1e9), (8, 1e-4, 1e9), (16, 5e-6, 25e9), (2, 1e-4, 1e9), (1024, 1e-5, 5e10), (4, 2e-3, 4e8)]
        labels = [f"{n} ranks, {a * 1e6:g} µs, {b / 1e9:g} GB/s" for n, a, b in inputs]

        def right(n, a, b, steps=None, rounds=None, sent=None):
            steps = 2 * (n - 1) if steps is None else steps
            rounds = math.log2(n) if rounds is None else rounds
            saved = rounds - (steps / n if sent is None else sent)
            return (steps - rounds) * a * b / saved if saved > 0 else math.inf

        mistakes = [
            ("on two ranks both send as many bytes, and the ring more messages: it pays nowhere, math.inf",
             lambda n, a, b: 0.0 if n == 2 else right(n, a, b)),
            ("on two ranks both send as many bytes, and the ring more messages: it pays nowhere, math.inf",
             lambda n, a, b: -math.inf if n == 2 else right(n, a, b)),
            ("bandwidth is divided by: β is bytes a second here, so S/β are seconds",
             lambda n, a, b: right(n, a, 1 / b)),
            ("a ring has 2(n - 1) messages, recursive doubling log2(n): one of the two is off by a factor of two here",
             lambda n, a, b: right(n, a, b, steps=n - 1)),
            ("a ring's messages have S/n bytes: this takes 2(n - 1) messages of S",
             lambda n, a, b: right(n, a, b, sent=2 * (n - 1))),
            ("the doubling's messages are not counted: it has log2(n) of them, which also take α each",
             lambda n, a, b: 2 * (n - 1) * a * b / s if (s := math.log2(n) - 2 * (n - 1) / n) > 0 else math.inf),
            ("recursive doubling has log2(n) messages: this is the natural logarithm",
             lambda n, a, b: right(n, a, b, rounds=math.log(n))),
            ("the sign is wrong: the ring has more messages and fewer bytes", lambda n, a, b: -right(n, a, b)),
            ("this is the size of a ring's message, S/n: the whole tensor's is asked for",
             lambda n, a, b: right(n, a, b) / n),
            ("this is right for 4 ranks only: is a 4 written into it?", lambda n, a, b: right(4, a, b)),
            ("this is in MB: bytes are asked for", lambda n, a, b: right(n, a, b) / 1e6),
            ("these are bits: β is bytes a second, and bytes are asked for", lambda n, a, b: right(n, a, b) * 8),
            ("log2(n) is one too large: n.bit_length() - 1 is it",
             lambda n, a, b: right(n, a, b, rounds=n.bit_length())),
            ("on two ranks both send as many bytes, and the ring more messages: it pays nowhere, math.inf",
             lambda n, a, b: a * b / 1e-12 if n == 2 else right(n, a, b)),
        ]  # fmt: skip
        numbers(run, inputs, [right(*args) for args in inputs], labels, mistakes)


class bubble_share:
    hints = (
        "Count in pieces: how many does a stage work on in a step? How many pieces long does it wait, while the first "
        "one comes to it and the last one goes on without it?",
        "It works on m·v pieces, and waits for p - 1 of them (a forward and a backward together are one here).",
        "The papers' (p - 1)/(v·m) is waiting by work. Here the share of the whole step is asked for: waiting by "
        "(work + waiting).",
    )

    @staticmethod
    def check(run):
        inputs = [(4, 8), (4, 8, 2), (8, 64, 3), (1, 5), (4, 4, 1), (16, 16, 4), (2, 1), (8, 12, 6)]
        labels = [
            f"{p} stage{'s' * (p > 1)}, {m} micro-batch{'es' * (m > 1)}, {(*v, 1)[0]} chunk{'s' * ((*v, 1)[0] > 1)}"
            for p, m, *v in inputs
        ]

        def share(p, m, v=1):
            return (p - 1) / (m * v + p - 1)

        mistakes = [
            ("this is waiting by work, as the papers give it: the share of the whole step has both below the line",
             lambda p, m, v=1: (p - 1) / (m * v)),
            ("the chunks are not used: v pieces each 1/v as long make the waiting 1/v as long",
             lambda p, m, v=1: share(p, m)),
            ("chunks make the bubble smaller, not larger: waiting is p - 1 pieces, each 1/v as long",
             lambda p, m, v=1: v * (p - 1) / (m + v * (p - 1))),
            ("chunks make the bubble smaller, not larger: waiting is p - 1 pieces, each 1/v as long",
             lambda p, m, v=1: (p * v - 1) / (m + p * v - 1)),
            ("a stage waits for the p - 1 others, not for itself too", lambda p, m, v=1: p / (m * v + p)),
            ("stages and micro-batches are exchanged", lambda p, m, v=1: share(m, p, v)),
            ("this is the share in which it works: the rest is asked for", lambda p, m, v=1: 1 - share(p, m, v)),
            ("waiting is counted twice: a piece's forward and backward together are one here",
             lambda p, m, v=1: 2 * (p - 1) / (m * v + 2 * (p - 1))),
            ("this is per cent: a share from 0 to 1 is asked for", lambda p, m, v=1: 100 * share(p, m, v)),
            ("all of the work and p pieces are below the line: work and waiting are m·v + p - 1",
             lambda p, m, v=1: (p - 1) / (m * v + p)),
            ("the whole is divided by v: only the waiting gets shorter, not the work",
             lambda p, m, v=1: share(p, m) / v),
            ("whole numbers are divided here with //, which rounds down", lambda p, m, v=1: (p - 1) // (m * v + p - 1)),
        ]  # fmt: skip
        numbers(run, inputs, [share(*args) for args in inputs], labels, mistakes)


class tensor_parallel_bytes:
    hints = (
        "How many all-reduces? Attention has one forward and one backward, and so has the MLP.",
        "An all-reduce's tensor has batch · sequence · hidden numbers on every rank, whatever n is.",
        "A ring all-reduce sends 2(n - 1)/n times its tensor's bytes from each rank. Run forward again: its two "
        "all-reduces come again.",
    )

    @staticmethod
    def check(run):
        inputs = [(1, 2048, 4096, 8), (4, 128, 256, 4, 4), (1, 2048, 4096, 8, 2, True), (2, 100, 60, 3, 4, True),
                  (3, 10, 10, 1), (2, 64, 64, 2, 8), (1, 5, 7, 3), (1, 5, 7, 4, 2, True)]  # fmt: skip
        labels = [
            f"{b} × {s} tokens, hidden {h}, {n} rank{'s' * (n > 1)}, {(*rest, 2)[0]} bytes a number"
            + ", forward run again" * (len(rest) > 1 and rest[1])
            for b, s, h, n, *rest in inputs
        ]

        def right(b, s, h, n, element=2, again=False, calls=None, ring=None):
            calls = 4 + 2 * again if calls is None else calls
            return calls * (2 * (n - 1) / n if ring is None else ring) * b * s * h * element

        mistakes = [
            ("recompute is not used: forward's two all-reduces come once more",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e)),
            ("this is forward alone: backward all-reduces the gradient of attention's and of the MLP's input",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, calls=2 + 2 * again)),
            ("there are two all-reduces forward and two backward, attention's and the MLP's: this is two in all",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, calls=2)),
            ("this is what is given to the all-reduces: a ring sends 2(n - 1)/n times that",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again, ring=1)),
            ("a ring all-reduce sends 2(n - 1)/n of its tensor, twice what its halves send: this is half of it",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again, ring=(n - 1) / n)),
            ("this is for all ranks together: one rank's is asked for",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again) * n),
            ("2(n - 1) messages of a ring have 1/n of the tensor each: it is not divided by n here",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again, ring=2 * (n - 1))),
            ("activations are whole on every rank between the split products: the tensor is not divided by n",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again) / n),
            ("element is not used: a number need not have 2 bytes", lambda b, s, h, n, e=2, again=False:
             right(b, s, h, n, 2, again)),
            ("these are numbers, not bytes: each has `element` of them", lambda b, s, h, n, e=2, again=False:
             right(b, s, h, n, 1, again)),
            ("with recompute forward's two all-reduces come once more, not all four",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, calls=8 if again else 4)),
            ("the MLP's inner tensor is split and never sent: what is all-reduced has `hidden` features, not 4·hidden",
             lambda b, s, h, n, e=2, again=False: right(b, s, h, n, e, again) * 2.5),
            ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
             lambda b, s, h, n, e=2, again=False: (4 + 2 * again) * 2 * (n - 1) * (b * s * h // n) * e),
            ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
             lambda b, s, h, n, e=2, again=False: (4 + 2 * again) * 2 * (n - 1) * -(-b * s * h // n) * e),
            ("a part of the tensor is rounded to whole numbers: 2(n - 1)/n is meant exactly",
             lambda b, s, h, n, e=2, again=False: math.floor(right(b, s, h, n, e, again) + 1e-9)),
            ("the batch is missing: all of its sequences' activations are sent",
             lambda b, s, h, n, e=2, again=False: right(1, s, h, n, e, again)),
        ]  # fmt: skip
        numbers(run, inputs, [right(*args) for args in inputs], labels, mistakes)


# ---- the smallest number of ranks -----------------------------------------------------------------------------

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


class fewest_ranks:
    hints = (
        "What does a rank hold whatever N is, and what is divided by N? Stage 1: 4 bytes a parameter, and 12/N.",
        "held + shared / N ≤ memory. Solve for N, and round up: -(-a // b) rounds a / b up, exactly.",
        "Where what is held by every rank leaves no room for a share, however small, there is no N: None. At stage 0 "
        "nothing is shared: 1 or None.",
    )

    @staticmethod
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
