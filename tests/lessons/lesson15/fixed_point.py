"""Answers to fixed_point: wrong ones as people write them, and unusual right ones."""

import numpy as np
import torch

from pardist_lib.mechanisms import private
from tests.lessons.planted import mistake, right


def checked(values, clients, fraction_bits, limit=None):
    limit = (2**31 - 1) // clients if limit is None else limit
    if not ((values * 2**fraction_bits).round().abs() <= limit).all():
        raise ValueError("too large")


@mistake("fixed_point", "cut off, not rounded")
def cuts_off(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).long() % 2**32


@mistake("fixed_point", "rounded down, not to the nearest")
def rounds_down(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).floor().long() % 2**32


@mistake("fixed_point", "the numbers are right modulo 2**32, but some are negative")
def leaves_the_sign(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round().long()


@mistake("fixed_point", "modulo 2**31")
def half_a_field(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round().long() % 2**31


@mistake("fixed_point", "multiplied by fraction_bits, not by 2**fraction_bits")
def scales_by_the_bits(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * fraction_bits).round().long() % 2**32


@mistake("fixed_point", "it is not refused: nothing is checked")
def checks_nothing(values, clients, fraction_bits):
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "a value that 8 clients cannot all bring is not refused")
def forgets_the_others(values, clients, fraction_bits):
    checked(values, clients, fraction_bits, 2**31 - 1)
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "a negative value that 4 clients cannot all bring is not refused")
def checks_one_side(values, clients, fraction_bits):
    if values.numel() and not (values * 2**fraction_bits).round().max() <= (2**31 - 1) // clients:
        raise ValueError("too large")
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "NaN is not refused")
def lets_nan_through(values, clients, fraction_bits):
    whole = (values * 2**fraction_bits).round()
    if (whole.abs() > (2**31 - 1) // clients).any():
        raise ValueError("too large")
    return whole.long() % 2**32


@mistake("fixed_point", "cut off silently")
def clamps(values, clients, fraction_bits):
    limit = (2**31 - 1) // clients
    return (values * 2**fraction_bits).round().clamp(-limit, limit).nan_to_num().long() % 2**32


@mistake("fixed_point", "it raises on numbers that are right")
def checks_values_not_whole_numbers(values, clients, fraction_bits):
    if values.numel() and not values.abs().max() < (2**31 - 1) // clients / 2**fraction_bits:
        raise ValueError("too large")
    return (values * 2**fraction_bits).round().long() % 2**32


@mistake("fixed_point", "the range is checked before rounding")
def checks_too_early(values, clients, fraction_bits):
    scaled = values * 2**fraction_bits
    if not (scaled.abs() <= (2**31 - 1) // clients).all():
        raise ValueError("too large")
    return scaled.round().long() % 2**32


@mistake("fixed_point", "negative numbers are one too small")
def one_too_small(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    whole = (values * 2**fraction_bits).round().long()
    return torch.where(whole < 0, whole + 2**32 - 1, whole)


@mistake("fixed_point", "whole numbers are asked for, int64")
def stays_float(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round() % 2**32


@mistake("fixed_point", "shifted by 2**31")
def shifts(values, clients, fraction_bits):
    checked(values, clients, fraction_bits)
    return (values * 2**fraction_bits).round().long() + 2**31


@mistake("fixed_point", "it calls the course's own `encode`")
def takes_the_courses(values, clients, fraction_bits):
    return private.encode(values, clients, fraction_bits).long() % 2**32


@right("fixed_point")
def with_a_mask(values, clients, fraction_bits):
    whole = torch.round(values * (1 << fraction_bits))
    if whole.isnan().any() or (whole.abs() * clients > 2**31 - 1).any():
        raise ValueError("beyond the field")
    return whole.long() & 0xFFFFFFFF


@right("fixed_point")
def by_numpy(values, clients, fraction_bits):
    whole = np.rint(values.numpy() * 2.0**fraction_bits)
    if not np.all(np.abs(whole) <= (2**31 - 1) // clients):
        raise ValueError("beyond the field")
    return torch.from_numpy(np.mod(whole.astype(np.int64), 2**32))
