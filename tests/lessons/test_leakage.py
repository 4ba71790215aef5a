"""The attacks of lesson 15 rebuild digits from gradients, and fail against each defence, tuned anew against it."""

import pytest
import torch
from torch.nn import functional as F

from pardist_lib.lessons import leakage
from pardist_lib.lessons.data import digits
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


def medians(scene, messages, settings=leakage.SETTINGS):
    model, x, _, average, _, bounds = scene
    _, _, alike = leakage.strongest(messages, model, x, average, settings, steps=100, **bounds)
    return [s.median().item() for s in alike]


def test_a_message_is_the_gradient_of_its_row(scene):
    model, x, y, _, messages, _ = scene
    for i in (0, 7):
        parts = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        assert torch.allclose(messages[i], torch.cat([g.flatten() for g in parts]), 1e-5, 1e-6)


def test_undefended_digits_are_rebuilt_by_either_attack(scene):
    model, x, _, _, messages, _ = scene
    assert torch.allclose(leakage.read_off(messages, model), x, 1e-3, 1e-3)
    for kind in ("read off", "invert"):
        assert min(medians(scene, messages, [s for s in leakage.SETTINGS if s[0] == kind])) >= 0.8


def test_masked_messages_show_nothing(scene):
    messages = scene[4]
    clients = [Client(c, MANY, MANY // 2 + 1) for c in range(MANY)]
    keys = {c.number: c.keys() for c in clients}
    boxes = {c.number: c.shares(keys) for c in clients}
    seen = [
        c.masked(encode(messages[c.number], MANY), {o: b[c.number] for o, b in boxes.items() if o != c.number})
        for c in clients
    ]
    assert max(medians(scene, torch.stack([decode(s) for s in seen]).float())) <= 0.2


def test_clipped_and_noisy_gradients_show_nothing(scene):
    messages = scene[4]
    clipped = messages / messages.norm(dim=1, keepdim=True).clamp(min=1)
    noise = torch.randn(messages.shape, generator=torch.Generator().manual_seed(0))
    assert max(medians(scene, clipped + noise)) <= 0.2
    assert min(medians(scene, clipped + 0.01 * noise)) >= 0.8  # clipping alone, or hardly any noise, hides nothing


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
