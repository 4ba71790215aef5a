"""Lesson 3; its exercises in the order of the notebook."""

EXERCISES = "column_forward", "row_forward", "my_copy_to_group", "my_gather_from_group", "order_bytes"
