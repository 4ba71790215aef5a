"""Any schedule on real ranks: loss and every gradient as one process has them."""

import pytest
import torch
from torch import nn

from pardist_lib.mechanisms.pipeline import Schedule, gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from tests.mechanisms.pipeline.nets import (
    WIDTH,
    agree,
    case,
    language_model,
    linears,
    mlp,
    rows_of,
    seeded,
    word_loss,
    words_of,
)

WORLDS = [1, 2, 3, 4]


def schedules(p):
    """Each kind; m a multiple of p and not."""
    made = [make(p, m) for make in (gpipe, one_f_one_b, zbv) for m in (1, p, 2 * p + 1)]
    made += [zero_bubble(p, m) for m in (p, 2 * p + 1)] + [interleaved(p, 2 * p, v) for v in (2, 3)]
    return made


def split(schedule):
    """The same table with every backward in halves, one right after the other."""
    rows = [[a._replace(kind=k) for a in row for k in ("IW" if a.kind == "B" else a.kind)] for row in schedule.rows]
    return Schedule(rows)


def both(p, m):
    """A whole and a split backward, two stages a rank."""
    return [interleaved(p, p * m, 2), split(interleaved(p, p * m, 2)), zbv(p, m)]


@pytest.mark.parametrize("p", WORLDS)
def test_every_schedule(ranks_of, p):
    """The rows of 23 are more than every m, and a multiple of none."""
    cases = [
        case(f"{s!r}"[:60], lambda n=2 * s.stages + 1: mlp(n), s, (rows_of(23), rows_of(23, 1))) for s in schedules(p)
    ]
    agree(ranks_of, p, cases)


@pytest.mark.parametrize("p", WORLDS)
def test_a_language_model_with_one_weight_for_embedding_and_head(ranks_of, p):
    """On different ranks, on the same one in two stages (ZB-V), in one stage; counted once a step, also where steps
    add up."""
    batches = [(words_of(9, k), words_of(9, k + 10), {"scale": 0.5}) for k in range(3)]
    cases = [
        case(f"{s!r}"[:60], lambda n=s.stages: language_model(n), s, *batches, loss=word_loss) for s in schedules(p)
    ]
    agree(ranks_of, p, cases)


def shared_inside():
    """One layer three times, two of them in one stage where there are few, and a tied weight with another's bias."""
    made = mlp(9)
    made[2] = made[3] = made[8] = made[0]
    made[6].weight = made[5].weight
    return made


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_a_layer_used_several_times(ranks_of, p):
    cases = [
        case(f"cut {cut} {s!r}"[:60], shared_inside, s, (rows_of(8), rows_of(8, 1)), options={"cut": cut})
        for s in both(p, 2)
        for cut in (None, [9 - s.stages + 1] + [1] * (s.stages - 1), [1] * (s.stages - 1) + [9 - s.stages + 1])
    ]
    agree(ranks_of, p, cases)


def freeze(*frozen):
    """Step by step, the layers that are frozen in it; the others are trained."""

    def between(layers, step):
        for i, layer in enumerate(layers):
            layer.requires_grad_(i not in frozen[step])

    return between


@pytest.mark.share(2)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_frozen_stages_and_stages_without_parameters(ranks_of, p):
    """First, middle, last stage; all but one; unfrozen later, and frozen again."""
    cases = []
    for s in both(p, 2):
        n, batches = s.stages, [(rows_of(8, k), rows_of(8, k + 9)) for k in range(3)]
        for frozen in ({0}, {n // 2}, {n - 1}, {*range(n - 1)}, {*range(1, n)}):
            between = freeze(frozen, set(), frozen) if len(frozen) < n else None
            cases.append(case(f"frozen {frozen} {s!r}"[:60], lambda n=n: linears(n), s, *batches, between=between))
        without = lambda n=n: [nn.Identity(), nn.Tanh(), *linears(1), *(nn.Tanh() for _ in range(n - 2)), nn.Identity()]  # noqa: E731
        cases.append(case(f"without {s!r}"[:60], without, s, *batches))
    agree(ranks_of, p, cases)


# ---- what travels -----------------------------------------------------------------------------------------------


class Many(nn.Module):
    """(h, whole numbers, numbers without a gradient, something that nobody uses) → the same, h changed."""

    def __init__(self, first=False, last=False):
        super().__init__()
        self.first, self.last, self.fc = first, last, nn.Linear(WIDTH, WIDTH)

    def forward(self, value):
        if self.first:
            value = value, (value.sum(-1) > 0).long(), value.detach().sum(-1), value * 2
        h, whole, constant, unused = value
        h = torch.tanh(self.fc(h)) * (1 + whole[:, None] % 2) + constant[:, None]
        return h if self.last else (h, whole, constant, self.fc(unused.detach()))


class Halves(nn.Module):
    """One operation's two outputs, of which the next layer uses one more than the other."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        a, b = self.fc(x).chunk(2, -1)
        return a, b, torch.sin(a) * self.fc.bias.sum()


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, value):
        a, b, c = value
        return self.fc(a * b) + a + c


def many(n):
    return seeded([Many(first=i == 0, last=i == n - 1) for i in range(n)])


def halves(n):
    return seeded([Halves() if i % 2 == 0 else Whole() for i in range(n + n % 2)])


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_tuples_between_stages(ranks_of, p):
    cases = []
    for s in both(p, 2) + [zero_bubble(p, p + 1)]:
        for build in (many, halves):
            for options in ({}, {"checkpoint": True}):
                n = max(2, s.stages)
                what = f"{build.__name__} {options} {s!r}"[:70]
                cases.append(case(what, lambda n=n, b=build: b(n), s, (rows_of(9), rows_of(9, 1)), options=options))
    agree(ranks_of, p, cases)


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_unequal_micro_batches_are_weighted_by_their_rows(ranks_of, p):
    """As lists; as sums; the next batch of other sizes and dtypes."""
    lists = [[rows_of(r, 7 * k + r) for r in rows] for k, rows in enumerate([(1, 5, 2, 5), (5, 1, 1, 1)])]
    batches = [(lists[0], lists[1][1:] + lists[0][1:2])]
    batches = [(x, [t * 2 + 1 for t in x]) for x in lists] + [(rows_of(9), rows_of(9, 3))]
    total = lambda y, t: (y - t).square().sum()  # noqa: E731
    cases = []
    for s in both(p, 4 // p if p != 3 else 1):
        if s.micro_batches == 4:
            n = s.stages
            cases.append(case(f"{s!r}"[:60], lambda n=n: mlp(n), s, *batches))
            cases.append(case(f"{s!r}"[:60], lambda n=n: mlp(n), s, *batches, loss=total, options={"reduction": "sum"}))
    agree(ranks_of, p, cases)
