"""Wrong answers to fit_alpha_beta, as people really write them, and unusual right ones."""

import math
import statistics

import numpy as np
import torch

from tests.lessons.planted import mistake, right


def fitted(sizes, seconds):
    """(slope, latency), right as far as it goes."""
    return np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))


@mistake("fit_alpha_beta", "bandwidth and latency are swapped")
def bandwidth_first(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return 1 / slope, latency


@mistake("fit_alpha_beta", "the slope is in seconds per byte")
def slope_itself(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return latency, slope


@mistake("fit_alpha_beta", "slope and latency are swapped")
def as_polyfit_gives_it(sizes, seconds):
    return tuple(fitted(sizes, seconds))


@mistake("fit_alpha_beta", "the line goes through the origin")
def without_latency(sizes, seconds):
    x, y = np.array(sizes), np.array(seconds)
    return 0.0, (x @ x) / (x @ y)


@mistake("fit_alpha_beta", "through the smallest and the largest message only")
def two_points(sizes, seconds):
    (x0, y0), *_, (x1, y1) = sorted(zip(sizes, seconds, strict=True))
    slope = (y1 - y0) / (x1 - x0)
    return y0 - slope * x0, 1 / slope


@mistake("fit_alpha_beta", "through the first and the last measurement only")
def first_and_last(sizes, seconds):
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    return seconds[0] - slope * sizes[0], 1 / slope


@mistake("fit_alpha_beta", "sizes are fitted to seconds")
def the_wrong_axis(sizes, seconds):
    bandwidth, offset = np.polyfit(seconds, sizes, 1)
    return -offset / bandwidth, bandwidth


@mistake("fit_alpha_beta", "fitted on logarithms")
def on_logarithms(sizes, seconds):
    slope, offset = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return math.exp(offset), 1 / slope


@mistake("fit_alpha_beta", "bandwidth is in GB per second")
def bandwidth_in_gigabytes(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return latency, 1e-9 / slope


@mistake("fit_alpha_beta", "latency is in microseconds")
def latency_in_microseconds(sizes, seconds):
    slope, latency = fitted(sizes, seconds)
    return latency * 1e6, 1 / slope


@mistake("fit_alpha_beta", "the latency is taken from the fastest message")
def fastest_message(sizes, seconds):
    slope, _ = fitted(sizes, seconds)
    return min(seconds), 1 / slope


@mistake("fit_alpha_beta", "the pair (latency, bandwidth) is asked for")
def latency_only(sizes, seconds):
    return fitted(sizes, seconds)[1]


@mistake("fit_alpha_beta", "so that the largest messages alone decide")
def absolute_errors(sizes, seconds):
    slope, latency = np.polyfit(sizes, seconds, 1)
    return latency, 1 / slope


@mistake("fit_alpha_beta", "the squares are weighed with 1 / seconds")
def weighs_the_squares(sizes, seconds):
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.sqrt(seconds))
    return latency, 1 / slope


@mistake("fit_alpha_beta", "which time belongs to which size is lost")
def sorts_each_by_itself(sizes, seconds):
    slope, latency = fitted(sorted(sizes), sorted(seconds))
    return latency, 1 / slope


@mistake("fit_alpha_beta", "the lists that it was given have changed")
def sorts_the_callers_list(sizes, seconds):
    pairs = sorted(zip(sizes, seconds, strict=True))
    sizes.sort()
    slope, latency = fitted(*zip(*pairs, strict=True))
    return latency, 1 / slope


@mistake("fit_alpha_beta", "float32 is too short here")
def in_32_bits(sizes, seconds):
    x, y = torch.tensor(sizes), torch.tensor(seconds)
    x, y = x / y, 1 / y
    slope = ((x * x).sum() / (x * y).sum()).float()
    return 1 / slope, slope


@mistake("fit_alpha_beta", "the latency is 0 while the bandwidth is right")
def no_latency_in_the_end(sizes, seconds):
    return 0.0, 1 / fitted(sizes, seconds)[0]


@right("fit_alpha_beta")
def polyfit(sizes, seconds):
    slope, latency = np.polyfit(sizes, seconds, 1, w=1 / np.array(seconds))
    return latency, 1 / slope


@right("fit_alpha_beta")
def by_weighted_means(sizes, seconds):
    weights = [1 / t**2 for t in seconds]
    x0, y0 = (statistics.fmean(values, weights) for values in (sizes, seconds))
    above = sum(w * (x - x0) * (y - y0) for w, x, y in zip(weights, sizes, seconds, strict=True))
    slope = above / sum(w * (x - x0) ** 2 for w, x in zip(weights, sizes, strict=True))
    return [y0 - slope * x0, 1 / slope]


@right("fit_alpha_beta")
def by_lstsq(sizes, seconds):
    x = torch.tensor([[1 / t, s / t] for s, t in zip(sizes, seconds, strict=True)], dtype=torch.float64)
    latency, slope = torch.linalg.lstsq(x, torch.ones(len(sizes), 1, dtype=torch.float64)).solution.flatten()
    return latency, 1 / slope
