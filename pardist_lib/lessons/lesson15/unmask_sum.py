"""unmask_sum: the server takes off what does not cancel; masks of who fell silent stay in, or with the wrong sign."""

from ..exercises.exercise import Exercise
from ..exercises.judge import same
from ..exercises.runs import results
from .shared import FIELD, field_numbers, whole

hints = (
    "Nobody silent: all pair masks have cancelled in the sum of the messages, and only own masks are left to be "
    "taken off.",
    "For a client that fell silent, every other one has a pair mask in its message that nothing cancels. What a "
    "client did because of it depends on the numbers, as in mask_vector: undo that.",
    "client added the mask where gone > client, so subtract it there; it subtracted it where gone < client, so add "
    "it there. One % 2**32 at the end.",
)


def unmasked(sign=lambda gone, client: -1 if gone > client else 1, own=-1, some=slice(None), field=FIELD):
    """The server's sum, right or with one mistake: what it does with the masks, of which silent clients."""

    def answer(messages, masks, pairs):
        left = (sign(g, c) * mask for g, of in list(pairs.items())[some] for c, mask in of.items())
        return (sum(messages.values()) + own * sum(masks.values()) + sum(left)) % field

    return answer


MISTAKES = [  # (diagnosis, what it would give)
    ("the pair masks of those who fell silent are still in it: nothing cancels them", unmasked(lambda g, c: 0)),
    ("the masks of those who fell silent are taken off with the wrong sign: that doubles them",
     unmasked(lambda g, c: 1 if g > c else -1)),
    ("all pair masks are subtracted: a client with a higher number than the silent one had subtracted its mask",
     unmasked(lambda g, c: -1)),
    ("all pair masks are added: a client with a lower number than the silent one had added its mask",
     unmasked(lambda g, c: 1)),
    ("the masks of one client that fell silent are taken off, not those of all", unmasked(some=slice(1))),
    ("the masks of one client that fell silent are taken off, not those of all", unmasked(some=slice(-1, None))),
    ("the own masks are still in it: take them off", unmasked(own=0)),
    ("the own masks are added once more: take them off", unmasked(own=1)),
    ("neither own masks nor pair masks were taken off: this is the sum of the messages",
     unmasked(lambda g, c: 0, own=0)),
    ("wrapped at 2**31: the field has 2**32 elements", unmasked(field=2**31)),
]  # fmt: skip


def check(run):
    cases = [(4, ()), (4, (2,)), (5, (0,)), (5, (4,)), (8, (1, 6)), (9, (0, 3, 8)), (3, ())]  # clients, silent ones
    inputs, expected, labels = [], [], []
    for case, (n, gone) in enumerate(cases):
        there = [c for c in range(n) if c not in gone]

        def numbers(kind, case=case):
            return field_numbers(3 + case % 2, 1000 * case + kind)

        vector, own = ([numbers(kind + c) for c in range(n)] for kind in (0, 100))
        pair = {(a, b): numbers(200 + 20 * min(a, b) + max(a, b)) for a in range(n) for b in range(n) if a != b}
        messages = {
            c: (vector[c] + own[c] + sum(pair[c, o] if o > c else -pair[c, o] for o in range(n) if o != c)) % FIELD
            for c in there
        }
        inputs.append((messages, {c: own[c] for c in there}, {g: {c: pair[g, c] for c in there} for g in gone}))
        expected.append(sum(vector[c] for c in there) % FIELD)
        labels.append(f"{n} clients, " + (f"silent: {', '.join(map(str, gone))}" if gone else "nobody silent"))
    got = results(run, inputs, labels, catch=ValueError)
    whole(got, expected, labels, "the sum")
    same(got, expected, "", mistakes=[(why, [wrong(*one) for one in inputs]) for why, wrong in MISTAKES], labels=labels)


WHY = (
    "What a silent client would have cancelled is undone for each client that stayed, with the sign that this "
    "one had used. In earnest (Bonawitz et al. 2017) masks are not stored: the server restores seeds and keys "
    "from shares and computes the masks anew."
)
exercise = Exercise(hints, check, minutes=20, level="hard", why=WHY)
