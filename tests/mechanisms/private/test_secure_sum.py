"""Secure aggregation on ranks: the sum to the last bit, whoever falls silent and wherever clients are hosted; bytes."""

import pytest
import torch
import torch.distributed as dist

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.private import secure_sum
from pardist_lib.mechanisms.private.secure_aggregation import MESSAGES
from tests.mechanisms.private.vectors import D, N, rounded_sum, vector
from tests.mechanisms.refusals import refused


def on_a_rank(n, size, silent=None, dealt=None, server=0, group=None, **options):
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = {c: vector(c, size) for c in range(n) if (dealt[c] if dealt else c % world) == rank}
    return secure_sum(mine, n, silent=silent, server=server, group=group, **options)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("gone", [{}, {3: "masked"}, {0: "shares", 5: "masked"}, {6: "keys", 7: "answers"}], ids=str)
def test_on_ranks(ranks_of, world, gone):
    for total, there in ranks_of(4).run(in_world, world, on_a_rank, N, D, gone, quiet=True)[:world]:
        assert there == [c for c in range(N) if gone.get(c, "answers") == "answers"]
        assert torch.equal(total, rounded_sum(there))


def test_on_ranks_that_host_many_few_or_none(ranks_of):
    def several():
        yield on_a_rank(8, D, {1: "masked"}, [3] * 8)  # all on a rank that does not serve
        yield on_a_rank(9, D, None, [0, 0, 0, 2, 2, 2, 2, 3, 0], server=2)
        yield on_a_rank(12, D, {11: "masked", 0: "masked"}, threshold=10, server=3)
        group = [group_of([0, 2]), group_of([3, 1])][dist.get_rank() % 2]
        yield on_a_rank(5, D, {2: "masked"}, group=group, server=[2, 3][dist.get_rank() % 2], fraction_bits=20)
        yield on_a_rank(3, 0)

    for found in ranks_of(4).run(lambda: list(several()), quiet=True):
        wanted = [(8, [1], 16), (9, [], 16), (12, [0, 11], 16), (5, [2], 20)]
        for (n, gone, bits), (total, there) in zip(wanted, found, strict=False):
            assert there == [c for c in range(n) if c not in gone]
            assert torch.equal(total, rounded_sum(there, bits=bits))
        assert found[-1][0].shape == (0,)


def test_payload(ranks_of):
    trace = ranks_of(4).trace(on_a_rank, N, D, quiet=True)
    for rank in range(4):
        up = 2 * (64 + 64 * (N - 1) + 4 * D + 16 * N)
        down = 3 * (64 * N + 2 * 64 * (N - 1))
        assert trace.bytes("send", rank) == (up if rank else down)
        assert trace.bytes("all_reduce", rank) == 4 * 4 * N + 8 * N + 16
        assert trace.bytes("broadcast", rank) == 4 * D
        assert trace.bytes(None, rank) == sum(trace.bytes(k, rank) for k in ("send", "recv", "all_reduce", "broadcast"))
    trace = ranks_of(4).trace(on_a_rank, N, D, {5: "masked"}, quiet=True)  # rank 1 hosts clients 1 and 5
    assert trace.bytes("send", 1) == 2 * (64 + 64 * 7) + 4 * D + 7 * 16 + 32


# ---- bad input ------------------------------------------------------------------------------------------------


def test_too_many_silent_on_ranks(ranks_of):
    for message in MESSAGES:
        with pytest.raises(
            RankError, match=rf"ranks 0–3 raised TooFewClients: 4 clients sent {message}.* \(0, 5, 6, 7\)"
        ):
            ranks_of(4).run(on_a_rank, N, D, dict.fromkeys([1, 2, 3, 4], message), quiet=True)
    assert ranks_of(4).run(on_a_rank, N, D, quiet=True)[0][1] == list(range(N))  # and the ranks are as good as new


def test_bad_input_is_named(ranks_of):
    def fails(why, fn, *args, **options):
        with refused(why):
            ranks_of(4).run(fn, *args, quiet=True, **options)

    def hosting(where, n=4, sizes=None, **options):
        rank = dist.get_rank()
        return secure_sum({c: torch.ones(sizes[c] if sizes else 2) for c in where[rank]}, n, **options)

    fails("2 clients: from the sum of two", lambda: hosting([[0], [1], [], []], 2))
    fails("threshold of 2 for 4 clients", lambda: hosting([[0], [1], [2], [3]], threshold=2))
    fails("client 1 is on 2 ranks", lambda: hosting([[0], [1], [1], [2, 3]]))
    fails("client 3 is on 0 ranks", lambda: hosting([[0], [1], [2], []]))
    fails("there is no client 4", lambda: hosting([[0, 1, 2, 3], [4], [], []]))
    fails("vectors of 2 and of 5 numbers", lambda: hosting([[0], [1], [2], [3]], sizes=[2, 2, 5, 2]))
    fails("one of keys, shares, masked, answers, not 'lunch'",
          lambda: hosting([[0], [1], [2], [3]], silent={1: "lunch"}))  # fmt: skip
