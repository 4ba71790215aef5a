"""Lesson 12."""

EXERCISES = ("bandwidths", "exposed", "amdahl")  # in the order of the notebook
