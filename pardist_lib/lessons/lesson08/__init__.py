"""Lesson 8: its exercises in the order of the notebook."""

EXERCISES = "next_scale", "step_or_skip", "unscale_and_clip", "shares_by_speed", "mean_by_rows", "mean_without_late"
