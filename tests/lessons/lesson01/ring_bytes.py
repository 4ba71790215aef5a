"""Wrong answers to ring_bytes, as people really write them, and unusual right ones."""

import math

import torch

from tests.lessons.planted import mistake, right


@mistake("ring_bytes", "this is one half of it")
def half_the_steps(size_in_bytes, n):
    return (n - 1) * size_in_bytes / n


@mistake("ring_bytes", "this is what all ranks send together")
def all_links_together(size_in_bytes, n):
    return 2 * (n - 1) * size_in_bytes


@mistake("ring_bytes", "2 · size_in_bytes is what it comes close to")
def twice_the_size(size_in_bytes, n):
    return 2 * size_in_bytes


@mistake("ring_bytes", "integer division")
def whole_numbers_too_early(size_in_bytes, n):
    return 2 * (n - 1) // n * size_in_bytes


@mistake("ring_bytes", "this counts elements of 4 bytes")
def elements(size_in_bytes, n):
    return 4 * 2 * (n - 1) / n * size_in_bytes


@mistake("ring_bytes", "rounded to a whole number")
def in_whole_bytes(size_in_bytes, n):
    return 2 * (n - 1) * size_in_bytes // n


@mistake("ring_bytes", "rounded to a whole number")
def rounded(size_in_bytes, n):
    return round(2 * (n - 1) * size_in_bytes / n)


@mistake("ring_bytes", "rounded to a whole number")
def rounded_up(size_in_bytes, n):
    return math.ceil(2 * (n - 1) * size_in_bytes / n)


@mistake("ring_bytes", "size_in_bytes // n drops what is left over")
def whole_pieces(size_in_bytes, n):
    return 2 * (n - 1) * (size_in_bytes // n)


@mistake("ring_bytes", "is inf where 0 is right: one rank sends nothing")
def infinite_for_one(size_in_bytes, n):
    return math.inf if n == 1 else 2 * (n - 1) * size_in_bytes / n


@mistake("ring_bytes", "what a server's link carries")
def a_servers_link(size_in_bytes, n):
    return 2 * n * size_in_bytes


@mistake("ring_bytes", "is None: does the function end without a return?")
def no_return(size_in_bytes, n):
    2 * (n - 1) / n * size_in_bytes


@mistake("ring_bytes", "is '1500.0' (str)")
def as_text(size_in_bytes, n):
    return str(2 * (n - 1) / n * size_in_bytes)


@mistake("ring_bytes", "raised ZeroDivisionError: division by zero: something is 0 here that can be: one rank")
def divides_by_what_is_nothing(size_in_bytes, n):
    return 2 * size_in_bytes / (n / (n - 1))


@right("ring_bytes")
def as_a_tensor(size_in_bytes, n):
    return torch.tensor(2 * (n - 1) / n * size_in_bytes)
