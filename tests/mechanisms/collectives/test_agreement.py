"""What ranks need alike: models that differ are told so on every rank; the first rank's values; sums of tensors."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.collectives.agreement import (
    check_same_model,
    named_tensors,
    sum_over_ranks,
    take_from_first,
)

# ---- the same model -------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.conv = nn.Conv2d(2, 3, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


def frozen(net):
    net.fc.bias.requires_grad_(False)


def other_shape(net):
    net.fc = nn.Linear(3, 5)


def other_dtype(net):
    net.fc.weight.data = net.fc.weight.data.double()


def other_order(net):
    net.conv.weight.data = net.conv.weight.data.to(memory_format=torch.channels_last)


def other_buffer(net):
    net.seen = net.seen.float()


def one_more(net):
    net.more = nn.Linear(1, 1, bias=False)


def one_less(net):
    del net.seen


def other_name(net):
    net.tail = net.conv
    del net.conv


def other_values(net):
    with torch.no_grad():
        net.fc.weight.fill_(dist.get_rank())


def expanded(net):
    """The same but for memory: strides of zero are no order of its own."""
    net.fc.weight.data = net.fc.weight.data[:1].expand(4, 3)


def compared(change, on, members=None):
    """What this rank is told where rank `on` has another model; None where all is well or it is no member."""
    group = group_of(members) if members else None
    if members and dist.get_rank() not in members:
        return None
    net = Net()
    if dist.get_rank() == on:
        change(net)
    try:
        check_same_model(named_tensors(net), group)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "change, first, other",
    [
        (frozen, "parameter fc.bias, float32 [4]", "parameter fc.bias, float32 [4], frozen"),
        (other_shape, "parameter fc.weight, float32 [4, 3]", "parameter fc.weight, float32 [5, 3]"),
        (other_dtype, "parameter fc.weight, float32 [4, 3]", "parameter fc.weight, float64 [4, 3]"),
        (
            other_order,
            "parameter conv.weight, float32 [3, 2, 2, 2]",
            "parameter conv.weight, float32 [3, 2, 2, 2] with strides [8, 1, 4, 2]",
        ),
        (other_buffer, "buffer seen, int64 []", "buffer seen, float32 []"),
        (one_more, "buffer seen, int64 []", "parameter more.weight, float32 [1, 1]"),
        (one_less, "buffer seen, int64 []", "nothing more"),
        (other_name, "parameter conv.weight, float32 [3, 2, 2, 2]", "parameter tail.weight, float32 [3, 2, 2, 2]"),
    ],
)
def test_every_rank_is_told_what_differs_and_where(ranks_of, change, first, other):
    told = f"where rank 0 has {first}, rank 2 has {other}. Build the same model on every rank"
    for heard in ranks_of(4).run(compared, change, 2, quiet=True):
        assert heard == f"the ranks' models differ: {told}"


def test_what_only_the_first_rank_has_is_named_too(ranks_of):
    for heard in ranks_of(3).run(compared, one_more, 0, quiet=True):
        assert "where rank 0 has parameter more.weight, float32 [1, 1], rank 1 has buffer seen, int64 []" in heard


def test_values_may_differ_and_how_memory_is_shared(ranks_of):
    for change in (other_values, expanded):
        assert ranks_of(3).run(compared, change, 1, quiet=True) == [None] * 3


def test_a_group_counts_in_ranks_of_the_whole_world(ranks_of):
    heard = ranks_of(4).run(compared, frozen, 3, (1, 3), quiet=True)
    assert heard[0] is heard[2] is None and heard[1] == heard[3]
    assert "where rank 1 has parameter fc.bias, float32 [4], rank 3 has" in heard[1]
    assert ranks_of(4).run(compared, frozen, 3, (0, 2), quiet=True) == [None] * 4


def test_tensors_are_named_parameters_first():
    names = [name for name, _ in named_tensors(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False)))]
    assert names == [
        "parameter 0.weight", "parameter 0.bias", "parameter 1.weight",
        "buffer 0.running_mean", "buffer 0.running_var", "buffer 0.num_batches_tracked",
    ]  # fmt: skip


# ---- the first rank's values ----------------------------------------------------------------------------------


def tensors_of(rank):
    """Of every kind: dtypes, order in memory, expanded, empty, strided, a parameter, a single number."""
    numbers = torch.Generator().manual_seed(rank)
    draw = lambda *shape: torch.randint(0, 2, shape, generator=numbers)  # noqa: E731
    tensors = [
        draw(3, 4).float(), draw(5).double(), draw(4).bool(), draw(2, 3).to(torch.bfloat16), draw(3).to(torch.int16),
        draw(2, 3, 4, 5).float().to(memory_format=torch.channels_last), draw(0, 3).float(), draw(3, 4).float().t(),
        draw(1, 4).float().expand(3, 4), draw(6).float()[::2], draw().long(), draw(2).to(torch.complex64),
        nn.Parameter(draw(2, 2).float(), requires_grad=False), nn.Parameter(draw(3).float()), draw(0).bool(),
    ]  # fmt: skip
    return tensors


def taken(bucket_mb, members=None):
    group = group_of(members) if members else None
    rank = dist.get_rank()
    if members and rank not in members:
        return None
    tensors = tensors_of(rank)
    kept = [(t.dtype, t.shape, t.requires_grad) for t in tensors]
    strides, pointers = tensors[5].stride(), [t.data_ptr() for t in tensors]
    take_from_first(tensors, group, bucket_mb)
    assert [(t.dtype, t.shape, t.requires_grad) for t in tensors] == kept and tensors[5].stride() == strides
    assert [i for i, t in enumerate(tensors) if t.data_ptr() != pointers[i]] == [8], "in place, but for expanded ones"
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("bucket_mb", [25, 1e-5])
def test_tensors_of_every_kind_become_the_first_ranks(ranks_of, bucket_mb):
    for got in ranks_of(3).run(taken, bucket_mb, quiet=True):
        assert all(torch.equal(a, b) for a, b in zip(got, tensors_of(0), strict=True))


def test_the_first_rank_of_a_group_counts(ranks_of):
    results = ranks_of(4).run(taken, 25, (1, 3), quiet=True)
    assert results[0] is results[2] is None
    for got in results[1::2]:
        assert all(torch.equal(a, b) for a, b in zip(got, tensors_of(1), strict=True))


def broadcast(shapes, bucket_mb):
    take_from_first([torch.ones(shape, dtype=dtype) for shape, dtype in shapes], bucket_mb=bucket_mb)


@pytest.mark.parametrize(
    "shapes, bucket_mb, calls",
    [
        ([], 25, []),
        ([((8,), torch.float32)] * 3, 25, [96]),
        ([((8,), torch.float32), ((4,), torch.float64), ((8,), torch.float32)], 25, [64, 32]),
        ([((2**17,), torch.float32)] * 5, 1, [2**20, 2**20, 2**19]),  # half a MB each
        ([((2**19,), torch.float32), ((1,), torch.float32)], 1, [2**21, 4]),
    ],
)
def test_one_broadcast_for_each_bucket_of_each_dtype(ranks_of, shapes, bucket_mb, calls):
    trace = ranks_of(2).trace(broadcast, shapes, bucket_mb, quiet=True)
    for rank in range(2):
        assert [(e.name, e.bytes) for e in trace.collectives if e.rank == rank] == [("broadcast", b) for b in calls]


# ---- sums over the ranks --------------------------------------------------------------------------------------


def numbers_of(rank):
    return [
        torch.full((2, 3), 1.0 + rank), torch.full((4,), 2.0 * rank, dtype=torch.float64), torch.arange(3.0) + rank,
        torch.arange(6.0).view(2, 3).t() * rank, torch.ones(0), torch.tensor(3.0 * rank, dtype=torch.bfloat16),
    ]  # fmt: skip


def summed(scales, dtype=None):
    rank = dist.get_rank()
    tensors = numbers_of(rank)
    got = sum_over_ranks(tensors, scale=scales[rank], dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(tensors, numbers_of(rank), strict=True)), "the inputs changed"
    return got


@pytest.mark.parametrize("scales", [(1, 1, 1), (0.5, 0.25, 2.0), (0, 1, 0)])
def test_sums_of_mixed_dtypes_come_back_in_the_order_given(ranks_of, scales):
    wanted = [sum(scale * t for scale, t in zip(scales, ts, strict=True))
              for ts in zip(*(numbers_of(r) for r in range(3)), strict=True)]  # fmt: skip
    for got in ranks_of(3).run(summed, scales, quiet=True):
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_sums_travel_in_the_precision_asked_for(ranks_of):
    for got in ranks_of(2).run(summed, (1, 1), torch.float32, quiet=True):
        assert all(t.dtype == torch.float32 for t in got)
    trace = ranks_of(2).trace(lambda: sum_over_ranks([torch.ones(5), torch.ones(3)], dtype=torch.bfloat16), quiet=True)
    assert [e.bytes for e in trace.collectives if e.rank == 0] == [16]


def with_nan(scale_of_last):
    last = dist.get_rank() == dist.get_world_size() - 1
    x = torch.full((3,), torch.nan if last else 1.0)
    return sum_over_ranks([x, torch.full((2,), torch.inf if last else 2.0)], scale=scale_of_last if last else 1.0)


def test_nothing_is_taken_from_a_rank_that_weighs_nothing(ranks_of):
    for ones, twos in ranks_of(3).run(with_nan, 0, quiet=True):
        assert ones.tolist() == [2.0] * 3 and twos.tolist() == [4.0] * 2
    for ones, twos in ranks_of(3).run(with_nan, 0.5, quiet=True):
        assert ones.isnan().all() and twos.isinf().all()


def test_one_call_for_each_dtype_and_none_for_nothing(ranks_of):
    assert ranks_of(2).trace(lambda: sum_over_ranks([]), quiet=True).collectives == []
    trace = ranks_of(2).trace(lambda: sum_over_ranks(numbers_of(0)) and None, quiet=True)
    calls = [(e.name, e.bytes) for e in trace.collectives if e.rank == 1]
    assert calls == [("all_reduce", (6 + 3 + 6) * 4), ("all_reduce", 4 * 8), ("all_reduce", 2)]


def test_a_smaller_world(ranks_of):
    results = ranks_of(4).run(in_world, 3, summed, (1, 1, 1), quiet=True)
    assert results[3] is None and all(got[0][0, 0] == 6 for got in results[:3])
