"""mask_vector: masks that cancel in the sum of all messages; both sides of a pair add theirs, or signs are reversed."""

from ..exercises.exercise import Exercise
from ..exercises.judge import same
from ..exercises.runs import results
from .shared import FIELD, field_numbers, whole

hints = (
    "Both clients of a pair hold the same mask. If both added it, it would be in the sum twice: one adds, the "
    "other subtracts, and who does which has to be a rule that both know.",
    "The rule here: with a client of a higher number than mine I add, with one of a lower number I subtract.",
    "int64 holds the sum of very many numbers of 32 bits; one % 2**32 at the very end is enough, and in torch it "
    "is never negative.",
)


def message(sign=lambda other, me: 1 if other > me else -1, vector=1, own=1, field=FIELD):
    """What a client sends, right or with one mistake: how often what is in it."""
    return lambda v, me, mask, pairs: (vector * v + own * mask + sum(sign(c, me) * p for c, p in pairs.items())) % field


MISTAKES = [  # (diagnosis, what it would send)
    ("the signs are the wrong way round: with a higher number it adds, with a lower one it subtracts",
     message(lambda c, me: -1 if c > me else 1)),
    ("every pair mask is added: the other side adds it too, and in the sum it stays, doubled",
     message(lambda c, me: 1)),
    ("every pair mask is subtracted: the other side subtracts it too", message(lambda c, me: -1)),
    ("the own mask is missing: without it a client that was declared gone is laid bare", message(own=0)),
    ("the own mask is subtracted: the server will subtract it, so here it is added", message(own=-1)),
    ("the vector itself is missing: this is nothing but masks", message(vector=0)),
    ("the pair masks are missing: only the own mask is on it", message(lambda c, me: 0)),
    ("only the masks with higher numbers are on it: those with lower numbers are to be subtracted",
     message(lambda c, me: int(c > me))),
    ("only the masks with lower numbers are on it: those with higher numbers are to be added",
     message(lambda c, me: -int(c < me))),
    ("the signs alternate with the numbers: both sides of a pair have to see opposite ones",
     message(lambda c, me: -1 if c % 2 else 1)),
    ("the sign depends on the other number alone: both sides of a pair have to see opposite ones",
     message(lambda c, me: 1 if c % 2 else -1)),
    ("wrapped at 2**31: the field has 2**32 elements", message(field=2**31)),
    ("modulo 2**32 - 1: the field has 2**32 elements, from 0 on", message(field=FIELD - 1)),
]  # fmt: skip


def check(run):
    cases = [(4, 2, 3), (4, 0, 3), (4, 3, 5), (8, 4, 1), (3, 1, 6), (50, 20, 4), (1, 0, 2)]
    inputs = []
    for seed, (n, me, size) in enumerate(cases):
        pairs = {o: field_numbers(size, 1000 * seed + 10 + o) for o in reversed(range(n)) if o != me}
        inputs.append((field_numbers(size, 1000 * seed + 1), me, field_numbers(size, 1000 * seed + 2), pairs))
    labels = [f"client {me} of {n}, {size} numbers" for n, me, size in cases]
    got, expected = results(run, inputs, labels, catch=ValueError), [message()(*one) for one in inputs]
    whole(got, expected, labels, "the message")
    same(got, expected, "", mistakes=[(why, [wrong(*one) for one in inputs]) for why, wrong in MISTAKES], labels=labels)


WHY = (
    "Each pair mask is added once and subtracted once, so that all of them cancel in the sum; the own mask "
    "hides a message that comes late. With a thousand clients that is half a million masks: SecAgg+ (Bell et "
    "al. 2020; Flower has it) lets each client agree with a few neighbours only."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
