"""Wrong answers to bus_bandwidth, as people really write them, and unusual right ones."""

import numpy as np

from tests.lessons.planted import mistake, right


@mistake("bus_bandwidth", "this is the algorithm's bandwidth")
def algorithm_bandwidth(size_in_bytes, seconds, n):
    return size_in_bytes / seconds


@mistake("bus_bandwidth", "this counts one half of the ring")
def half_the_ring(size_in_bytes, seconds, n):
    return (n - 1) / n * size_in_bytes / seconds


@mistake("bus_bandwidth", "in GB per second")
def in_gigabytes(size_in_bytes, seconds, n):
    return 2 * (n - 1) / n * size_in_bytes / seconds / 1e9


@mistake("bus_bandwidth", "the bytes are rounded to a whole number")
def of_whole_bytes(size_in_bytes, seconds, n):
    return 2 * (n - 1) * size_in_bytes // n / seconds


@mistake("bus_bandwidth", "rounded to a whole number")
def whole_bytes_a_second(size_in_bytes, seconds, n):
    return 2 * (n - 1) * size_in_bytes / n // seconds


@mistake("bus_bandwidth", "the factor is upside down")
def upside_down(size_in_bytes, seconds, n):
    return n / (2 * (n - 1)) * size_in_bytes / seconds


@mistake("bus_bandwidth", "seconds per byte")
def inverse(size_in_bytes, seconds, n):
    return seconds / (2 * (n - 1) / n * size_in_bytes)


@mistake("bus_bandwidth", "it has to take (size_in_bytes, seconds, n)")
def two_arguments(size_in_bytes, seconds):
    return size_in_bytes / seconds


@right("bus_bandwidth")
def of_numpy(size_in_bytes, seconds, n):
    return np.float64(size_in_bytes) / seconds * 2 * (n - 1) / n
