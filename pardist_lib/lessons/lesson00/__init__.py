"""Lesson 0."""

EXERCISES = ("shard_rows", "average_gradients", "average_used_gradients")  # in the order of the notebook
