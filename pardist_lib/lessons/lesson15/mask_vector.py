"""The exercise mask_vector."""

from ..exercises.exercise import Exercise
from ..exercises.judge import same
from .shared import FIELD, in_one_process, numbers, whole

hints = (
    "Both clients of a pair hold the same mask. If both added it, it would be in the sum twice: one adds, the "
    "other subtracts, and who does which has to be a rule that both know.",
    "The rule here: with a client of a higher number than mine I add, with one of a lower number I subtract.",
    "int64 holds the sum of very many numbers of 32 bits; one % 2**32 at the very end is enough, and in torch it "
    "is never negative.",
)


def check(run):
    cases = [(4, 2, 3), (4, 0, 3), (4, 3, 5), (8, 4, 1), (3, 1, 6), (50, 20, 4), (1, 0, 2)]
    inputs = []
    for seed, (n, me, size) in enumerate(cases):
        pairs = {o: numbers(size, 1000 * seed + 10 + o) for o in reversed(range(n)) if o != me}
        inputs.append((numbers(size, 1000 * seed + 1), me, numbers(size, 1000 * seed + 2), pairs))
    labels = [f"client {me} of {n}, {size} numbers" for n, me, size in cases]
    got = in_one_process(run, inputs, labels)

    def each(vector=1, own=1, sign=lambda other, me: 1 if other > me else -1, wrap=FIELD):
        return [
            (vector * v + own * o + sum(sign(c, me) * p for c, p in pairs.items())) % wrap for v, me, o, pairs in inputs
        ]

    expected = each()
    whole(got, expected, labels, "the message")
    mistakes = [
        ("the signs are the wrong way round: with a higher number it adds, with a lower one it subtracts",
         each(sign=lambda c, me: -1 if c > me else 1)),
        ("every pair mask is added: the other side adds it too, and in the sum it stays, doubled",
         each(sign=lambda c, me: 1)),
        ("every pair mask is subtracted: the other side subtracts it too", each(sign=lambda c, me: -1)),
        ("the own mask is missing: without it a client that was declared gone is laid bare", each(own=0)),
        ("the own mask is subtracted: the server will subtract it, so here it is added", each(own=-1)),
        ("the vector itself is missing: this is nothing but masks", each(vector=0)),
        ("the pair masks are missing: only the own mask is on it", each(sign=lambda c, me: 0)),
        ("only the masks with higher numbers are on it: those with lower numbers are to be subtracted",
         each(sign=lambda c, me: int(c > me))),
        ("only the masks with lower numbers are on it: those with higher numbers are to be added",
         each(sign=lambda c, me: -int(c < me))),
        ("the signs alternate with the numbers: both sides of a pair have to see opposite ones",
         each(sign=lambda c, me: 1 if c % 2 == 0 else -1)),
        ("the sign depends on the other number alone: both sides of a pair have to see opposite ones",
         each(sign=lambda c, me: 1 if c % 2 else -1)),
        ("wrapped at 2**31: the field has 2**32 elements", each(wrap=2**31)),
        ("modulo 2**32 - 1: the field has 2**32 elements, from 0 on", each(wrap=FIELD - 1)),
    ]  # fmt: skip
    same(got, expected, "", mistakes=mistakes, labels=labels)


exercise = Exercise(hints, check)
