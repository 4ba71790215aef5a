"""Lesson 13: its exercises in the order of the notebook."""

EXERCISES = "ring_pays_from", "bubble_share", "tensor_parallel_bytes", "fewest_ranks"
