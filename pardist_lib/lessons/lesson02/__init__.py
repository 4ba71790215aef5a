"""Lesson 2. EXERCISES: in the order of the notebook."""

EXERCISES = ("column_split", "inner_split", "summa_step", "split_bytes", "halo_exchange")
