"""The data sets and networks: shapes, ranges, seeds."""

import pytest
import torch
from sklearn.datasets import load_digits

from pardist_lib.lessons import data, models


def test_digits_have_the_promised_shapes_and_scale():
    d = data.digits(torch.float64)
    assert d.train_x.shape == (1440, 64) and d.test_x.shape == (357, 64)
    assert d.train_y.shape == (1440,) and d.test_y.shape == (357,) and d.train_y.dtype == torch.int64
    assert abs(d.train_x.mean()) < 1e-12 and abs(d.train_x.std() - 1) < 1e-12
    assert data.digits().train_x.dtype == torch.float32


def test_digits_are_all_there_once_with_their_labels():
    d, raw = data.digits(torch.float64), load_digits()
    x, y = torch.cat([d.train_x, d.test_x]), torch.cat([d.train_y, d.test_y])
    pixels = x * (16 / (x.max() - x.min()))  # undo the scale, then the shift
    pixels = (pixels - pixels.min()).round().long()
    ours = sorted((tuple(p), label) for p, label in zip(pixels.tolist(), y.tolist(), strict=True))
    raw = zip(raw.data.astype(int).tolist(), raw.target.tolist(), strict=True)
    theirs = sorted((tuple(p), label) for p, label in raw)
    assert ours == theirs


def test_digits_depend_on_the_seed_only():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = data.digits()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.train_x, data.digits().train_x)
    assert not torch.equal(first.train_y, data.digits(seed=1).train_y)
    first.train_x.zero_()
    assert data.digits().train_x.any()  # nobody else's copy


def test_text_is_python_and_the_same_each_time():
    text = data.library_text(20_000)
    assert text.tokens.shape == (20_000,) and text.tokens.dtype == torch.int64
    assert len(text.vocabulary) == 96 == len(set(text.vocabulary)) and text.tokens.max() < 96
    words = text.decode(text.tokens)
    assert "import" in words and "def " in words and "\n" in words
    assert torch.equal(text.tokens[:5000], data.library_text(5000).tokens)


def test_text_outside_ascii_and_tabs(monkeypatch, tmp_path):
    (tmp_path / "b.py").write_bytes("é\r\n".encode())
    (tmp_path / "a.py").write_bytes(b"x\ty\n")
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    text = data.library_text(8)
    assert text.decode(text.tokens) == "x   y\n?\n"
    with pytest.raises(ValueError, match="have 8 characters"):
        data.library_text(9)


def test_networks():
    net = models.ArticleNet(dtype=torch.float64)
    assert sum(p.numel() for p in net.parameters()) == 430
    assert net(torch.randn(3, 10, dtype=torch.float64)).shape == (3, 10)
    mlp = models.DigitsMLP()
    assert sum(p.numel() for p in mlp.parameters()) == 4810
    assert mlp(data.digits().test_x).shape == (357, 10)
