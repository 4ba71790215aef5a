"""Lesson 4; its exercises in the order of the notebook."""

EXERCISES = "heads_of_rank", "split_embedding", "split_cross_entropy", "sequence_parallel_mlp"
