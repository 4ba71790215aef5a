"""Lesson 2."""

EXERCISES = (
    "column_split",
    "inner_split",
    "summa_step",
    "split_bytes",
    "halo_exchange",
)  # in the order of the notebook
