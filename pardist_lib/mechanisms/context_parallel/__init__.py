"""Context parallelism: one sequence dealt out over several ranks, in attention too."""

from .all_to_all import all_to_all_attention
from .labels import mean_over_tokens, next_tokens
from .order import collect, deal, own_positions, shares
from .ring import ring_attention

__all__ = [
    "all_to_all_attention", "collect", "deal", "mean_over_tokens", "next_tokens", "own_positions", "ring_attention",
    "shares",
]  # fmt: skip
