"""ring_pays_from: the size from which a ring beats recursive doubling; a message too few, or the end on two ranks."""

import math

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "Both take a constant number of seconds (messages · α) and seconds for each byte (bytes sent for each byte of "
    "the tensor / β). Write down the two lines.",
    "Ring: 2(n - 1)·α + 2(n - 1)/n·S/β. Recursive doubling: log2(n)·α + log2(n)·S/β. Set them equal, solve for S.",
    "S = (2(n - 1) - log2 n)·α·β / (log2 n - 2(n - 1)/n). With two ranks both send the same bytes: what is "
    "divided by is 0 then, and the ring, with twice the messages, never wins.",
)


def crossing(n, latency, bandwidth, steps=None, rounds=None, sent=None, waits=None):
    """The ring's steps, the doubling's rounds and what it waits for, tensors that the ring sends: each may be wrong."""
    steps = 2 * (n - 1) if steps is None else steps
    rounds = math.log2(n) if rounds is None else rounds
    saved = rounds - (steps / n if sent is None else sent)
    return (steps - (rounds if waits is None else waits)) * latency * bandwidth / saved if saved > 0 else math.inf


NOWHERE = "on two ranks both send as many bytes, and the ring more messages: it pays nowhere, math.inf"
MISTAKES = [  # (diagnosis, what it would give)
    (NOWHERE, lambda n, a, b: 0.0 if n == 2 else crossing(n, a, b)),
    (NOWHERE, lambda n, a, b: -math.inf if n == 2 else crossing(n, a, b)),
    (NOWHERE, lambda n, a, b: a * b / 1e-12 if n == 2 else crossing(n, a, b)),
    ("bandwidth is divided by: β is bytes a second here, so S/β are seconds", lambda n, a, b: crossing(n, a, 1 / b)),
    ("a ring has 2(n - 1) messages, recursive doubling log2(n): one of the two is off by a factor of two here",
     lambda n, a, b: crossing(n, a, b, steps=n - 1)),
    ("a ring's messages have S/n bytes: this takes 2(n - 1) messages of S",
     lambda n, a, b: crossing(n, a, b, sent=2 * (n - 1))),
    ("the doubling's messages are not counted: it has log2(n) of them, which also take α each",
     lambda n, a, b: crossing(n, a, b, waits=0)),
    ("recursive doubling has log2(n) messages: this is the natural logarithm",
     lambda n, a, b: crossing(n, a, b, rounds=math.log(n))),
    ("the sign is wrong: the ring has more messages and fewer bytes", lambda n, a, b: -crossing(n, a, b)),
    ("this is the size of a ring's message, S/n: the whole tensor's is asked for",
     lambda n, a, b: crossing(n, a, b) / n),
    ("this is right for 4 ranks only: is a 4 written into it?", lambda n, a, b: crossing(4, a, b)),
    ("this is in MB: bytes are asked for", lambda n, a, b: crossing(n, a, b) / 1e6),
    ("these are bits: β is bytes a second, and bytes are asked for", lambda n, a, b: crossing(n, a, b) * 8),
    ("log2(n) is one too large: n.bit_length() - 1 is it",
     lambda n, a, b: crossing(n, a, b, rounds=n.bit_length())),
]  # fmt: skip


def check(run):
    inputs = [(4, 1e-4, 1e9), (8, 1e-4, 1e9), (16, 5e-6, 25e9), (2, 1e-4, 1e9), (1024, 1e-5, 5e10), (4, 2e-3, 4e8)]
    labels = [f"{n} ranks, {a * 1e6:g} µs, {b / 1e9:g} GB/s" for n, a, b in inputs]
    numbers(run, inputs, [crossing(*args) for args in inputs], labels, MISTAKES)


WHY = (
    "The two cross where the latencies that the ring pays more equal the bytes that it saves; on two ranks it "
    "saves none. NCCL chooses from a table of latency and bandwidth for each algorithm and protocol; MPI "
    "libraries change over at sizes tuned beforehand."
)
exercise = Exercise(hints, check, minutes=15, level="medium", why=WHY)
