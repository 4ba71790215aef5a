"""Lesson 5."""

EXERCISES = (
    "average_by_rows",
    "local_sgd_step",
    "server_round",
    "may_proceed",
    "apply_stale",
)  # in the order of the notebook
