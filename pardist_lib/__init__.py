"""pardist_lib: the small library under the pardist course."""

from .ranks import RankError, RankHang, Ranks, device, progress, torchrun

__all__ = ["RankError", "RankHang", "Ranks", "device", "progress", "torchrun"]
