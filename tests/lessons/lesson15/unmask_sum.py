"""Answers to unmask_sum: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("unmask_sum", "the pair masks of those who fell silent are still in it")
def forgets_the_silent(messages, own, pairs):
    return (sum(messages.values()) - sum(own.values())) % 2**32


@mistake("unmask_sum", "taken off with the wrong sign")
def doubles_them(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total + mask if gone > client else total - mask
    return total % 2**32


@mistake("unmask_sum", "all pair masks are subtracted")
def subtracts_all_pairs(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for masks in pairs.values():
        total = total - sum(masks.values())
    return total % 2**32


@mistake("unmask_sum", "all pair masks are added")
def adds_all_pairs(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for masks in pairs.values():
        total = total + sum(masks.values())
    return total % 2**32


@mistake("unmask_sum", "the own masks are still in it")
def leaves_own_masks(messages, own, pairs):
    total = sum(messages.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask
    return total % 2**32


@mistake("unmask_sum", "neither own masks nor pair masks were taken off")
def only_adds(messages, own, pairs):
    return sum(messages.values()) % 2**32


@mistake("unmask_sum", "the masks of one client that fell silent are taken off")
def undoes_one(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in list(pairs.items())[:1]:
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask
    return total % 2**32


@mistake("unmask_sum", "right modulo 2**32, but some are")
def never_wraps_the_sum(messages, own, pairs):
    total = sum(messages.values()) - sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total = total - mask if gone > client else total + mask
    return total


@mistake("unmask_sum", "what it was given has changed")
def writes_into_a_message(messages, own, pairs):
    total = next(iter(messages.values()))
    for message in list(messages.values())[1:]:
        total += message
    total -= sum(own.values())
    for gone, masks in pairs.items():
        for client, mask in masks.items():
            total += -mask if gone > client else mask
    return total % 2**32


@right("unmask_sum")
def client_by_client(messages, own, pairs):
    total = 0
    for client, message in messages.items():
        bare = message - own[client]
        for gone in pairs:
            bare = bare + (1 if gone < client else -1) * pairs[gone][client]
        total = (total + bare) % 2**32
    return total
