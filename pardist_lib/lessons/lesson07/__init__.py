"""Lesson 7."""

EXERCISES = (
    "padded_shard",
    "zero_memory",
    "zero1_step",
    "sharded_linear",
    "clip_sharded",
)  # in the order of the notebook
