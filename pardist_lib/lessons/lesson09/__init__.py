"""Lesson 9: its exercises in the order of the notebook."""

EXERCISES = (
    "in_flight",
    "one_f_one_b_row",
    "last_stage",
    "input_and_weights",
    "tied_gradient",
    "run_row",
    "my_schedule",
)
