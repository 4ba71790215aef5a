"""Lesson 4."""

EXERCISES = (
    "heads_of_rank",
    "split_embedding",
    "split_cross_entropy",
    "sequence_parallel_mlp",
)  # in the order of the notebook
