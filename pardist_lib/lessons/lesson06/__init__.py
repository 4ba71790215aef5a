"""Lesson 6."""

EXERCISES = (
    "broadcast_model",
    "average_in_hooks",
    "reduce_buckets",
    "accumulate_gradients",
    "sample_indices",
    "weighted_gradients",
    "top_k_step",
)  # in the order of the notebook
