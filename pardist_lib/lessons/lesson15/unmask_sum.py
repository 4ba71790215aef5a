"""The exercise unmask_sum."""

import torch

from ..exercises.exercise import Exercise
from ..exercises.judge import same
from .shared import FIELD, in_one_process, numbers, whole

hints = (
    "Nobody silent: all pair masks have cancelled in the sum of the messages, and only own masks are left to be "
    "taken off.",
    "For a client that fell silent, every other one has a pair mask in its message that nothing cancels. What a "
    "client did because of it depends on the numbers, as in mask_vector: undo that.",
    "client added the mask where gone > client, so subtract it there; it subtracted it where gone < client, so add "
    "it there. One % 2**32 at the end.",
)


def check(run):
    cases = [(4, ()), (4, (2,)), (5, (0,)), (5, (4,)), (8, (1, 6)), (9, (0, 3, 8)), (3, ())]
    inputs, vectors = [], []
    for seed, (n, gone) in enumerate(cases):
        size, there = 3 + seed % 2, [c for c in range(n) if c not in gone]
        vector = {c: numbers(size, 1000 * seed + c) for c in range(n)}
        own = {c: numbers(size, 1000 * seed + 100 + c) for c in range(n)}
        pair = {frozenset((a, b)): numbers(size, 1000 * seed + 200 + 20 * a + b) for a in range(n)
                for b in range(a + 1, n)}  # fmt: skip
        messages = {
            c: (vector[c] + own[c]
                + sum((1 if o > c else -1) * pair[frozenset((c, o))] for o in range(n) if o != c)) % FIELD
            for c in there
        }  # fmt: skip
        pairs = {g: {c: pair[frozenset((g, c))] for c in there} for g in gone}
        inputs.append((messages, {c: own[c] for c in there}, pairs))
        vectors.append(sum(vector[c] for c in there) % FIELD)
    labels = [f"{n} clients, " + (f"silent: {', '.join(map(str, gone))}" if gone else "nobody silent")
              for n, gone in cases]  # fmt: skip
    got = in_one_process(run, inputs, labels)

    def each(own=-1, sign=lambda gone, c: -1 if gone > c else 1, wrap=FIELD, some=slice(None)):
        return [
            (sum(m.values()) + own * sum(o.values())
             + sum(sign(g, c) * p for g, masks in list(pairs.items())[some] for c, p in masks.items())) % wrap
            for m, o, pairs in inputs
        ]  # fmt: skip

    expected = each()
    for one, other in zip(expected, vectors, strict=True):
        assert torch.equal(one, other)
    whole(got, expected, labels, "the sum")
    mistakes = [
        ("the pair masks of those who fell silent are still in it: nothing cancels them",
         each(sign=lambda g, c: 0)),
        ("the masks of those who fell silent are taken off with the wrong sign: that doubles them",
         each(sign=lambda g, c: 1 if g > c else -1)),
        ("all pair masks are subtracted: a client with a higher number than the silent one had subtracted its mask",
         each(sign=lambda g, c: -1)),
        ("all pair masks are added: a client with a lower number than the silent one had added its mask",
         each(sign=lambda g, c: 1)),
        ("the masks of one client that fell silent are taken off, not those of all", each(some=slice(1))),
        ("the masks of one client that fell silent are taken off, not those of all", each(some=slice(-1, None))),
        ("the own masks are still in it: take them off", each(own=0)),
        ("the own masks are added once more: take them off", each(own=1)),
        ("neither own masks nor pair masks were taken off: this is the sum of the messages",
         each(own=0, sign=lambda g, c: 0)),
        ("wrapped at 2**31: the field has 2**32 elements", each(wrap=2**31)),
    ]  # fmt: skip
    same(got, expected, "", mistakes=mistakes, labels=labels)


exercise = Exercise(hints, check)
