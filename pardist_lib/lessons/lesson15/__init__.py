"""Lesson 15: its exercises in the order of the notebook."""

EXERCISES = "average_clients", "fixed_point", "mask_vector", "unmask_sum", "clip_and_add", "noisy_sum", "rate_and_steps"
