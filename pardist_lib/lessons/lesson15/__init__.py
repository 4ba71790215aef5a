"""Lesson 15."""

EXERCISES = (
    "average_clients",
    "fixed_point",
    "mask_vector",
    "unmask_sum",
    "clip_and_add",
    "noisy_sum",
    "rate_and_steps",
)  # in the order of the notebook
