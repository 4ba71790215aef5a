"""Lesson 3; its exercises in the order of the notebook."""

EXERCISES = "column_forward", "my_copy_to_group", "row_forward", "my_gather_from_group", "order_bytes"
