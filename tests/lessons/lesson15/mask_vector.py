"""Answers to mask_vector: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def with_sign(sign, own=1):
    def answer(vector, me, own_mask, pairs):
        total = vector + own * own_mask
        for other, mask in pairs.items():
            total = total + sign(other, me) * mask
        return total % 2**32

    return answer


@mistake("mask_vector", "the signs are the wrong way round")
def wrong_way_round(vector, me, own, pairs):
    return with_sign(lambda o, me: -1 if o > me else 1)(vector, me, own, pairs)


@mistake("mask_vector", "every pair mask is added")
def adds_all(vector, me, own, pairs):
    return (vector + own + sum(pairs.values())) % 2**32


@mistake("mask_vector", "every pair mask is subtracted")
def subtracts_all(vector, me, own, pairs):
    return (vector + own - sum(pairs.values())) % 2**32


@mistake("mask_vector", "the own mask is missing")
def no_own_mask(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else -1, 0)(vector, me, own, pairs)


@mistake("mask_vector", "the own mask is subtracted")
def own_mask_off(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else -1, -1)(vector, me, own, pairs)


@mistake("mask_vector", "only the masks with higher numbers are on it")
def half_of_the_pairs(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else 0)(vector, me, own, pairs)


@mistake("mask_vector", "right modulo 2**32, but some are")
def never_wraps(vector, me, own, pairs):
    total = vector + own
    for other, mask in pairs.items():
        total = total + (mask if other > me else -mask)
    return total


@mistake("mask_vector", "wrapped at 2**31")
def wraps_too_early(vector, me, own, pairs):
    total = vector + own
    for other, mask in pairs.items():
        total = total + (mask if other > me else -mask)
    return total % 2**31


@mistake("mask_vector", "modulo 2**32 - 1")
def wraps_one_short(vector, me, own, pairs):
    total = vector + own
    for other, mask in pairs.items():
        total = total + (mask if other > me else -mask)
    return total % 0xFFFFFFFF


@mistake("mask_vector", "what it was given has changed")
def writes_into_the_vector(vector, me, own, pairs):
    vector += own
    for other, mask in pairs.items():
        vector += mask if other > me else -mask
    return vector % 2**32


@mistake("mask_vector", "whole numbers are asked for")
def goes_through_floats(vector, me, own, pairs):
    return with_sign(lambda o, me: 1.0 if o > me else -1.0)(vector.double(), me, own, pairs)


@mistake("mask_vector", "whole numbers of 32 bits went through float32")
def goes_through_float32_and_back(vector, me, own, pairs):
    return with_sign(lambda o, me: 1 if o > me else -1)(vector, me, own, pairs).float().long()


@right("mask_vector")
def wraps_after_each(vector, me, own, pairs):
    total = (vector + own) % 2**32
    for other in sorted(pairs):
        total = (total + pairs[other] * (1 if me < other else -1)) & (2**32 - 1)
    return total
