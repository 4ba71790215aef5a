"""Answers to ring_pays_from: wrong ones as people write them, and unusual right ones."""

import math

from tests.lessons.planted import mistake, right


@mistake("ring_pays_from", "S/β are seconds")
def seconds_times_bandwidth(n, latency, bandwidth):
    saved = math.log2(n) - 2 * (n - 1) / n
    return (2 * (n - 1) - math.log2(n)) * latency / bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "one of the two is off by a factor of two")
def half_a_ring(n, latency, bandwidth):
    steps, rounds = n - 1, math.log2(n)
    saved = rounds - steps / n
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "a ring's messages have S/n bytes")
def a_ring_of_whole_tensors(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), math.log2(n)
    return (steps - rounds) * latency * bandwidth / (rounds - steps) if rounds > steps else math.inf


@mistake("ring_pays_from", "the doubling's messages are not counted")
def only_the_rings_latency(n, latency, bandwidth):
    saved = math.log2(n) - 2 * (n - 1) / n
    return 2 * (n - 1) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "this is the natural logarithm")
def natural(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), math.log(n)
    saved = rounds - steps / n
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "a ring has 2(n - 1) messages, recursive doubling log2(n)")
def a_tree(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), 2 * math.log2(n)
    saved = rounds - steps / n
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "ZeroDivisionError")
def divides_by_nothing(n, latency, bandwidth):
    return (2 * (n - 1) - math.log2(n)) * latency * bandwidth / (math.log2(n) - 2 * (n - 1) / n)


@mistake("ring_pays_from", "it pays nowhere, math.inf")
def always_on_two(n, latency, bandwidth):
    if n == 2:
        return 0.0
    return (2 * (n - 1) - math.log2(n)) * latency * bandwidth / (math.log2(n) - 2 * (n - 1) / n)


@mistake("ring_pays_from", "is a 4 written into it?")
def for_four(n, latency, bandwidth):
    return (6 - 2) * latency * bandwidth / (2 - 1.5)


@mistake("ring_pays_from", "these are bits")
def in_bits(n, latency, bandwidth):
    return 8 * by_bisection(n, latency, bandwidth)


@mistake("ring_pays_from", "n.bit_length() - 1 is it")
def one_round_more(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), n.bit_length()
    return (steps - rounds) * latency * bandwidth / (rounds - steps / n)


@mistake("ring_pays_from", "it pays nowhere, math.inf")
def nearly_nothing_saved(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), math.log2(n)
    return (steps - rounds) * latency * bandwidth / max(rounds - steps / n, 1e-12)


@right("ring_pays_from")
def by_bisection(n, latency, bandwidth):
    def ahead(size):
        ring = 2 * (n - 1) * (latency + size / n / bandwidth)
        return math.log2(n) * (latency + size / bandwidth) - ring

    low, high = 0.0, 1e18
    if ahead(high) <= 0:
        return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if ahead(middle) > 0 else (middle, high)
    return high
