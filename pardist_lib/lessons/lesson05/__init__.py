"""Lesson 5; its exercises in the order of the notebook."""

EXERCISES = "average_by_rows", "local_sgd_step", "server_round", "may_proceed", "apply_stale"
