"""What a run did (`Trace`, `alpha_beta`), what one would do (`fake_trace`), and what a plan would cost (the rest)."""

from .alpha_beta import alpha_beta
from .costs import Plan, Transformer, training_flops, training_memory, training_seconds
from .planner import Link, Machine, best_plans, estimate, why_not
from .trace import Trace

__all__ = [
    "Link", "Machine", "Plan", "Trace", "Transformer", "alpha_beta", "best_plans", "estimate", "fake_trace",
    "training_flops", "training_memory", "training_seconds", "why_not",
]  # fmt: skip


def __getattr__(name):
    if name == "fake_trace":  # brings FSDP along, a second
        from .fake_ranks import fake_trace

        return fake_trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
