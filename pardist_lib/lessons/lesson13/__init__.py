"""Lesson 13."""

EXERCISES = ("ring_pays_from", "bubble_share", "tensor_parallel_bytes", "fewest_ranks")  # in the order of the notebook
