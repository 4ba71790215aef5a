"""Lesson 1."""

EXERCISES = (
    "my_broadcast",
    "exchange",
    "my_all_gather",
    "my_ring_all_reduce",
    "ring_bytes",
    "bus_bandwidth",
    "fit_alpha_beta",
)  # in the order of the notebook
