"""Start ranks, run code on them, and say what went wrong."""

from . import magic
from .ledger import CollectiveMismatch
from .program import torchrun
from .rank import device, progress
from .report import RankError, RankHang, RanksInterrupted
from .session import Ranks, newest

__all__ = [
    "CollectiveMismatch",
    "RankError",
    "RankHang",
    "Ranks",
    "RanksInterrupted",
    "device",
    "newest",
    "progress",
    "torchrun",
]
magic.load()
