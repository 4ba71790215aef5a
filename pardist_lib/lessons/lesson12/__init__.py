"""Lesson 12: its exercises in the order of the notebook."""

EXERCISES = "bandwidths", "exposed", "amdahl"
