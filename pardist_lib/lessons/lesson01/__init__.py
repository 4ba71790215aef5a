"""Lesson 1. EXERCISES: in the order of the notebook."""

BY_HAND = ("my_broadcast", "exchange", "my_all_gather", "my_ring_all_reduce")
EXERCISES = (*BY_HAND, "ring_bytes", "bus_bandwidth", "fit_alpha_beta")
