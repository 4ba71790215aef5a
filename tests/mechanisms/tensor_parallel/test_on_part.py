"""What every rank has whole and uses on its part: gradients summed once, random numbers of its own."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.tensor_parallel import (
    parallelize,
)
from pardist_lib.mechanisms.tensor_parallel.on_part import OnPart, random_per_rank, replicated
from tests.mechanisms.refusals import refused
from tests.mechanisms.tensor_parallel.nets import close, seeded


def replicated_of(which):
    """Calls made in backward for two parameters and None, of which some are trained."""
    a, b = (nn.Parameter(torch.ones(3), requires_grad=trained) for trained in which)
    first, none, second = replicated(a, None, b)
    assert none is None and torch.equal(first, a) and torch.equal(second, b)
    if any(which):
        (first.sum() + 2 * second.sum()).backward()
    return [None if p.grad is None else p.grad[0].item() for p in (a, b)]


def test_replicated_parameters_are_summed_in_one_call_and_frozen_ones_not_at_all(ranks_of):
    for which, grads in (((True, True), [4, 8]), ((False, True), [None, 8]), ((False, False), [None, None])):
        trace = ranks_of(4).trace(replicated_of, which)
        assert trace.results == [grads] * 4
        assert [e.bytes for e in trace.collectives if e.rank == 0] == [12 * sum(which)] * any(which)


def draws():
    torch.manual_seed(5)
    common = torch.rand(3)
    with random_per_rank():
        own = torch.rand(3)
    with random_per_rank():
        again = torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(5)
    torch.rand(3)
    with random_per_rank():
        repeated = torch.rand(3)
    return common, own, again, after, torch.equal(own, repeated)


def test_random_numbers_are_alike_outside_and_different_inside(ranks_of):
    results = ranks_of(4).run(draws, quiet=True)
    common, own, again, after, _ = zip(*results, strict=True)
    for alike in (common, after):
        assert all(torch.equal(t, alike[0]) for t in alike)
    everything = [tuple(t.tolist()) for t in (*own, *again, common[0], after[0])]
    assert len(set(everything)) == 10
    assert all(result[-1] for result in results), "torch.manual_seed decides"


def leaves_alone():
    torch.manual_seed(0)
    wanted = torch.rand(4)
    torch.manual_seed(0)
    with random_per_rank():
        return torch.equal(torch.rand(4), wanted)


def test_one_rank_draws_as_without_and_errors_restore_the_stream(ranks_of):
    assert ranks_of(4).run(in_world, 1, leaves_alone, quiet=True)[0]

    def fails():
        torch.manual_seed(0)
        try:
            with random_per_rank():
                raise KeyError
        except KeyError:
            return torch.rand(2)

    first, *others = ranks_of(4).run(fails, quiet=True)
    assert all(torch.equal(first, other) for other in others)


def dropped_between():
    """What is dropped of 64 equal hidden features of this rank, and what all ranks have after them."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 64 * dist.get_world_size()), nn.Dropout(0.5), nn.Linear(64, 4))
    mlp = parallelize(nn.Sequential(plain), {"0.0": "column", "0.1": "on a part"})
    return (mlp[0][1](torch.ones(64)) == 0).tolist(), torch.rand(1).item()


def test_dropout_on_a_part_drops_other_features_on_each_rank(ranks_of):
    masks, after = zip(*ranks_of(4).run(dropped_between, quiet=True), strict=True)
    assert len(set(map(tuple, masks))) == 4 and len(set(after)) == 1
    assert all(16 < sum(mask) < 48 for mask in masks)


def on_part():
    """A module with parameters on this rank's rows, beside one process with all rows; and the module back."""
    rank, n = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    mine = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3)).double().eval()
    mine[2].running_mean.fill_(rank)
    part = OnPart(mine)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3)).double().eval()
    assert not part.training and not part.to_module().training
    for a, b in zip(part.to_module().state_dict().items(), plain.state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    assert mine[2].running_mean[0] == rank, "the module that was given is left alone"
    x = seeded((7, 3), torch.float64)
    (plain(x) ** 2).sum().backward()
    (part(x.tensor_split(n)[rank]) ** 2).sum().backward()
    for p, q in zip(part.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad, "gradient")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradients_on_parts_add_up_to_the_whole_ones(ranks_of, n):
    ranks_of(n).run(on_part, quiet=True)


def test_no_group_is_refused(ranks_of):
    with refused("OnPart: group is a str, but has to be a process group, or None for all ranks"):
        ranks_of(2).run(lambda: OnPart(nn.Linear(1, 1), "tp") and None, quiet=True)
