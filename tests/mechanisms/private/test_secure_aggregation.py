"""Secure aggregation: the sum to the last bit, whoever falls silent; and that nothing else can be read."""

import itertools

import pytest
import torch
from Crypto.Protocol.SecretSharing import Shamir
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from pardist_lib.mechanisms.private import Client, TooFewClients, decode, encode, largest, unmask
from pardist_lib.mechanisms.private.secure_aggregation import MESSAGES, add, negative, own_mask, pair_mask
from tests.mechanisms.private.vectors import N, rounded_sum, vector

T = 5  # the threshold


def one_round(vectors, silent=None, threshold=T):
    """A whole round in one process; what the server has seen, and the clients."""
    n, silent = len(vectors), silent or {}

    def speak(message):
        return [c for c in range(n) if MESSAGES.index(silent.get(c, MESSAGES[-1])) > MESSAGES.index(message)
                or c not in silent]  # fmt: skip

    clients = [Client(c, n, threshold) for c in range(n)]
    keys = {c: clients[c].keys() for c in speak("keys")}
    boxes = {c: clients[c].shares(keys) for c in speak("shares")}
    masked = {
        c: clients[c].masked(vectors[c], {o: box[c] for o, box in boxes.items() if o != c}) for c in speak("masked")
    }
    answers = {c: clients[c].answers(set(masked)) for c in speak("answers")}
    return clients, keys, boxes, masked, answers


# ---- the sum --------------------------------------------------------------------------------------------------


SILENT = [
    {},
    *({3: message} for message in MESSAGES),
    *({0: a, 7: b} for a, b in itertools.product(MESSAGES, MESSAGES)),
    {1: "masked", 2: "masked", 6: "masked"},
]


@pytest.mark.parametrize("silent", SILENT, ids=str)
def test_the_sum_is_exact_whoever_falls_silent(silent):
    vectors = [encode(vector(c), N) for c in range(N)]
    _, keys, boxes, masked, answers = one_round(vectors, silent)
    total = unmask(masked, keys, boxes, answers, T)
    there = [c for c in range(N) if silent.get(c, "answers") == "answers"]
    assert sorted(masked) == there
    assert torch.equal(decode(total), rounded_sum(there))


def test_weights_up_to_the_bound_do_not_wrap():
    for n, bits in ((3, 16), (8, 16), (8, 24), (100, 12), (5, 0)):
        most = largest(n, bits)
        for sign in (1.0, -1.0):
            encoded = [encode(torch.full((2,), sign * most, dtype=torch.float64), n, bits) for _ in range(n)]
            assert torch.equal(decode(add(*encoded), bits), torch.full((2,), n * sign * most, dtype=torch.float64))
        with pytest.raises(ValueError, match="cannot be encoded"):
            encode(torch.tensor([most * (1 + 1e-6) + 2.0**-bits]), n, bits)


def test_masked_weights_at_the_bound():
    vectors = [encode(torch.tensor([largest(N), -largest(N)], dtype=torch.float64), N) for _ in range(N)]
    _, keys, boxes, masked, answers = one_round(vectors, {2: "masked"})
    want = torch.tensor([7.0, -7.0], dtype=torch.float64) * largest(N)
    assert torch.equal(decode(unmask(masked, keys, boxes, answers, T)), want)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(3, 50), st.integers(0, 24), st.integers(0, 1000), st.sampled_from([torch.float32, torch.float64]))
def test_fixed_point(clients, bits, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    values = ((2 * torch.rand(7, generator=generator, dtype=torch.float64) - 1) * largest(clients, bits)).to(dtype)
    values = values.clamp(-largest(clients, bits), largest(clients, bits))
    encoded = encode(values, clients, bits)
    assert encoded.dtype == torch.int32
    assert ((decode(encoded, bits) - values.double()).abs() <= 2.0 ** -(bits + 1) + 2.0**-bits * 1e-9).all()
    assert encoded.long().abs().max() * clients < 2**31


# ---- what can be read -----------------------------------------------------------------------------------------


def looks_uniform(numbers):
    """Chi-square of the bytes, each of the four places by itself. The masks are truly random: for uniform bytes this
    fails with a probability of 1e-9 · 8 / 10 (two tails of 1e-10 in each of four places)."""
    for place in numbers.numpy().view("uint8").reshape(-1, 4).T:
        counts = torch.bincount(torch.from_numpy(place.copy()).long(), minlength=256).double()
        expected = len(place) / 256
        found = ((counts - expected) ** 2 / expected).sum().item()
        if not chi2.isf(1 - 1e-10, 255) < found < chi2.isf(1e-10, 255):
            return False
    return True


BIG = 1 << 16


def test_one_message_is_indistinguishable_from_uniform():
    vectors = [encode(vector(c, BIG, 0.01), 3) for c in range(3)]  # small values: unmasked they are far from uniform
    assert not looks_uniform(vectors[1])
    clients, keys, boxes, masked, answers = one_round(vectors, threshold=2)
    for c in range(3):
        assert looks_uniform(masked[c])
        assert looks_uniform(add(masked[c], negative(vectors[c])))  # the mask itself, and it is another one each time
    assert looks_uniform(add(masked[0], negative(masked[1])))
    assert looks_uniform(add(masked[0], masked[1]))  # the pair's masks cancel, own masks and those with client 2 stay
    again = one_round(vectors, threshold=2)[3]
    assert looks_uniform(add(masked[0], negative(again[0])))
    assert not looks_uniform(unmask(masked, keys, boxes, answers, 2))


def test_a_slow_client_that_was_declared_gone_stays_hidden():
    vectors = [encode(vector(c, BIG, 0.01), 3) for c in range(3)]
    clients = [Client(c, 3, 2) for c in range(3)]
    keys = {c: clients[c].keys() for c in range(3)}
    boxes = {c: clients[c].shares(keys) for c in range(3)}
    masked = {c: clients[c].masked(vectors[c], {o: boxes[o][c] for o in range(3) if o != c}) for c in range(3)}
    late = masked.pop(2)
    answers = {c: clients[c].answers({0, 1}) for c in (0, 1)}
    assert torch.equal(unmask(masked, keys, boxes, answers, 2), add(vectors[0], vectors[1]))

    # now it arrives, and the server has what it takes to remove its pair masks
    halves = [Shamir.combine([(c + 1, answers[c][2][at : at + 16]) for c in (0, 1)]) for at in (0, 16)]
    assert b"".join(halves) == clients[2].private
    for other in (0, 1):
        late = add(late, negative(pair_mask(clients[2].private, keys[other][32:], 2, other, BIG)))
    assert looks_uniform(late)  # the own mask is still there …
    assert torch.equal(add(late, negative(own_mask(clients[2].seed, BIG))), vectors[2])
    assert all(len(answers[c][2]) == 32 for c in (0, 1))  # … and nobody gave a share of its seed
    for c in (0, 1):
        with pytest.raises(RuntimeError, match="has sent its answers"):
            clients[c].answers({0, 1, 2})


def test_fewer_shares_than_the_threshold_restore_another_secret():
    clients, keys, boxes, masked, answers = one_round([encode(vector(c), N) for c in range(N)])
    for helpers in ([0, 1, 2, 3], [4, 5, 6, 7]):
        found = Shamir.combine([(h + 1, answers[h][6]) for h in helpers])
        assert found != clients[6].seed  # the same with a probability of 2**-128
    assert Shamir.combine([(h + 1, answers[h][6]) for h in range(5)]) == clients[6].seed


def test_a_box_opens_for_its_receiver_only_and_only_unaltered():
    clients = [Client(c, 3, 2) for c in range(3)]
    keys = {c: clients[c].keys() for c in range(3)}
    boxes = {c: clients[c].shares(keys) for c in range(3)}
    assert len({box for c in range(3) for box in boxes[c].values()}) == 6
    with pytest.raises(ValueError, match="client 0: the shares from client 1 were altered"):
        clients[0].masked(encode(vector(0), 3), {1: boxes[1][2], 2: boxes[2][0]})
    bent = bytes([boxes[2][1][0] ^ 1]) + boxes[2][1][1:]
    with pytest.raises(ValueError, match="client 1: the shares from client 2 were altered"):
        clients[1].masked(encode(vector(1), 3), {0: boxes[0][1], 2: bent})


def test_no_second_vector_under_the_same_masks():
    clients, _, boxes, *_ = one_round([encode(vector(c), N) for c in range(N)])
    with pytest.raises(RuntimeError, match="client 3 has sent its masked: a second vector under the same masks"):
        clients[3].masked(encode(vector(9), N), {o: boxes[o][3] for o in range(N) if o != 3})


def test_a_client_sends_each_message_once_and_in_order():
    client = Client(0, 3, 2)
    with pytest.raises(RuntimeError, match="client 0 sends its keys before its masked: keys, shares, masked, answers"):
        client.masked(encode(vector(0), 3), {})
    keys = {0: client.keys()} | {c: Client(c, 3, 2).keys() for c in (1, 2)}
    with pytest.raises(RuntimeError, match="client 0 sends its shares before its answers"):
        client.answers({0, 1, 2})
    client.shares(keys)
    with pytest.raises(RuntimeError, match="has sent its shares: two letters under one key"):
        client.shares(keys)


@pytest.mark.parametrize("bad", [torch.ones(4), torch.tensor([2**40]), torch.ones(2, 3, dtype=torch.int32)], ids=str)
def test_only_what_the_masks_cover_is_masked(bad):
    """A float would lose its fraction, a long integer its upper half, and rows would share one mask."""
    client = Client(0, 3, 2)
    client.shares({0: client.keys()} | {c: Client(c, 3, 2).keys() for c in (1, 2)})
    with pytest.raises(ValueError, match="client 0 masks a flat vector of int32, as encode gives it"):
        client.masked(bad, {})


# ---- bad input ------------------------------------------------------------------------------------------------


def test_too_many_silent_is_refused_by_name():
    vectors = [encode(vector(c), N) for c in range(N)]
    for message, did in [("keys", "sent keys"), ("shares", "sent shares"), ("masked", "sent their vectors")]:
        with pytest.raises(TooFewClients, match=rf"4 clients {did} \(3, 4, 5, 7\), 5 are needed; gone: 0, 1, 2, 6"):
            one_round(vectors, dict.fromkeys([0, 1, 2, 6], message))
    _, keys, boxes, masked, answers = one_round(vectors, dict.fromkeys([0, 1, 2, 6], "answers"))
    with pytest.raises(TooFewClients, match=r"4 clients answered \(3, 4, 5, 7\), 5 are needed; gone: 0, 1, 2, 6"):
        unmask(masked, keys, boxes, answers, T)


@pytest.mark.parametrize("clients, threshold", [(8, 4), (8, 9), (7, 3), (8, 0), (3, 1)])
def test_a_threshold_that_is_not_above_half(clients, threshold):
    with pytest.raises(ValueError, match="more than half of them"):
        Client(0, clients, threshold)


def test_values_that_cannot_be_encoded_are_named():
    for bad in (float("nan"), float("inf"), 5000.0):
        with pytest.raises(
            ValueError, match="cannot be encoded: with 16 bits for the fraction and 8 clients a value is "
        ):
            encode(torch.tensor([0.0, bad]), 8)
