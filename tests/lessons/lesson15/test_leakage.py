"""The attacks of lesson 15 rebuild digits from gradients, and fail against each defence, tuned anew against it."""

import pytest
import torch
from torch.nn import functional as F

from pardist_lib.lessons.data import digits
from pardist_lib.lessons.lesson15 import leakage
from pardist_lib.lessons.models import DigitsMLP
from pardist_lib.mechanisms.private import Client, decode, encode

MANY = 20


@pytest.fixture(scope="module")
def scene():
    """(an untrained network, twenty digits, their labels, the average digit, one gradient each, the pixels' bounds)"""
    data = digits()
    torch.manual_seed(0)
    model = DigitsMLP()
    x, y = data.test_x[:MANY], data.test_y[:MANY]
    bounds = {"low": data.train_x.min().item(), "high": data.train_x.max().item()}
    return model, x, y, data.train_x.mean(0), leakage.messages_of(model, x, y), bounds


def medians(scene, messages, kinds=("read off", "invert")):
    """The two similarities of the strongest attack of these kinds, medians: particular to the digit, whole picture."""
    model, x, _, average, _, bounds = scene
    settings = [s for s in leakage.SETTINGS if s[0] in kinds]
    public = digits().train_x, digits().train_y
    _, _, alike = leakage.strongest(messages, model, x, average, settings, public, steps=100, **bounds)
    return [s.median().item() for s in alike]


def looked_up(scene, messages):
    """(what is particular, whether the whole is liker than the average digit, which needs no message at all)"""
    _, x, _, average, _, bounds = scene
    particular, whole = medians(scene, messages, ["look up"])
    return particular, whole > leakage.similarity(average.expand(MANY, -1), x, average, **bounds)[1].median() + 0.05


def test_a_message_is_the_gradient_of_its_row(scene):
    model, x, y, _, messages, _ = scene
    for i in (0, 7):
        parts = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        assert torch.allclose(messages[i], torch.cat([g.flatten() for g in parts]), 1e-5, 1e-6)


def test_undefended_digits_are_rebuilt_by_either_attack(scene):
    model, x, _, _, messages, _ = scene
    assert torch.allclose(leakage.read_off(messages, model), x, 1e-3, 1e-3)
    for kind in ("read off", "invert"):
        assert min(medians(scene, messages, [kind])) >= 0.8
    particular, more_than_none = looked_up(scene, messages)  # other digits, but very like
    assert particular > 0.5 and more_than_none


def test_masked_messages_show_nothing(scene):
    messages = scene[4]
    clients = [Client(c, MANY, MANY // 2 + 1) for c in range(MANY)]
    keys = {c.number: c.keys() for c in clients}
    boxes = {c.number: c.shares(keys) for c in clients}
    seen = [
        c.masked(encode(messages[c.number], MANY), {o: b[c.number] for o, b in boxes.items() if o != c.number})
        for c in clients
    ]
    seen = torch.stack([decode(s) for s in seen]).float()
    assert max(medians(scene, seen)) <= 0.2
    particular, more_than_none = looked_up(scene, seen)
    assert particular <= 0.2 and not more_than_none


def test_clipped_and_noisy_gradients_show_nothing(scene):
    messages = scene[4]
    clipped = messages / messages.norm(dim=1, keepdim=True).clamp(min=1)
    noise = torch.randn(messages.shape, generator=torch.Generator().manual_seed(0))
    assert max(medians(scene, clipped + noise)) <= 0.2
    particular, more_than_none = looked_up(scene, clipped + noise)
    assert particular <= 0.2 and not more_than_none
    assert min(medians(scene, clipped + 0.01 * noise)) >= 0.8  # clipping alone, or hardly any noise, hides nothing


def test_who_knows_other_digits_sees_through_noise_that_stops_the_rest(scene):
    model, x, y, _, messages, _ = scene
    clipped = messages / messages.norm(dim=1, keepdim=True).clamp(min=1)
    noise = torch.randn(messages.shape, generator=torch.Generator().manual_seed(0))
    assert medians(scene, clipped + 0.1 * noise)[0] <= 0.4 < 0.5 < looked_up(scene, clipped + 0.1 * noise)[0]
    public = digits().train_x, digits().train_y
    kinds = public[1][leakage.likest(clipped + 0.1 * noise, model, public)[:, 0]]
    assert torch.equal(kinds, y)
    found = leakage.look_up(messages, model, (x, y))
    assert torch.allclose(found, x)  # who has the very digit finds it


def test_the_sum_of_eight_gives_them_away_and_the_average_digit_is_no_attack(scene):
    model, x, _, average, messages, bounds = scene
    total = messages[:8].sum(0)
    weight, bias = total[: 64 * 64].view(64, 64), total[64 * 64 : 64 * 65]
    found = leakage.matched((weight / bias[:, None])[bias.abs() > 1e-6].clamp(*bounds.values()), x[:8], average)
    assert leakage.similarity(found, x[:8], average, **bounds)[0].median() >= 0.8
    particular, whole = leakage.similarity(average.expand(MANY, -1), x, average, **bounds)
    assert particular.median() < 0.05 and whole.median() > 0.3  # why the first figure takes the average off


def test_similarity_and_matching(scene):
    _, x, _, average, _, bounds = scene
    assert all(torch.allclose(s, torch.ones(MANY, dtype=s.dtype)) for s in leakage.similarity(x, x, average, **bounds))
    assert torch.equal(leakage.matched(x.flip(0), x, average), x)
