"""What experts over ranks send: as counted by `traffic`, by the formula, and as given to torch.distributed."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.expert_parallel import ExpertParallel, MoE, Router, Traffic, average_gradients
from tests.mechanisms.expert_parallel.nets import ROWS, crowd, layer, tokens
from tests.mechanisms.refusals import refused


def counted(moe, x, group=None):
    """Forward and backward: (bytes for other ranks in each all-to-all, other calls, the layer's own account)."""
    split = ExpertParallel.from_module(moe, group)
    rank, calls = dist.get_rank(group), []
    plain = dist.all_to_all_single

    def noting(out, tensor, receive_sizes, send_sizes, group):
        calls.append([r * tensor[:1].nbytes if len(tensor) else 0 for r in send_sizes])
        calls[-1][rank] = 0
        return plain(out, tensor, receive_sizes, send_sizes, group)

    with patch.object(dist, "all_to_all_single", noting):
        split(x).sum().backward()
    return [sum(call) for call in calls], split.traffic()


def uniform():
    """Tokens that choose experts in turn: every expert has as many of each rank's."""
    experts, top_k, rows = 8, 2, 12
    moe = MoE.of(Router(8, experts, top_k), [nn.Linear(8, 8) for _ in range(experts)]).double()
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(8))
    x = 0.01 * torch.rand(rows, 8, dtype=torch.float64)
    for t in range(rows):
        for choice in range(top_k):
            x[t, (t * top_k + choice) % experts] += 1
    return counted(moe, x)


@pytest.mark.parametrize("n", [2, 4])
def test_bytes_of_uniform_routing_are_those_of_the_formula(ranks_of, n):
    """T·k·d·bytes·(1 − 1/n), twice forward and twice backward, and E sizes of 8 bytes, but for this rank's own."""
    formula = 12 * 2 * 8 * 8 * (n - 1) // n
    for rank, (calls, traffic) in enumerate(ranks_of(4).run(in_world, n, uniform, quiet=True)[:n]):
        assert calls == [8 * 8 * (n - 1) // n] + 4 * [formula]
        assert all(sent[rank] == formula for sent in traffic.all_to_all_bytes.values())
        assert traffic.split_size_bytes[rank] == calls[0]
        assert traffic.busiest_port == traffic.mean_port == formula
        assert traffic.tokens_per_expert.tolist() == [n * 3] * 8 and traffic.tokens_per_rank.tolist() == [24] * n
        assert traffic.dropped.sum() == 0


def crowded(favourites, factor):
    moe = layer(capacity_factor=factor)
    return counted(crowd(moe, favourites) if favourites else moe, tokens(ROWS)[dist.get_rank()])


@pytest.mark.parametrize("favourites, factor", [(None, None), ([4, 0], None), ([4, 0], 0.5), (None, 0.5)])
@pytest.mark.parametrize("n", [1, 3, 4])
def test_bytes_of_any_routing_are_what_the_calls_were_given(ranks_of, n, favourites, factor):
    moe, everyone = layer(capacity_factor=factor), tokens(ROWS)
    moe = crowd(moe, favourites) if favourites else moe
    got = ranks_of(4).run(in_world, n, crowded, favourites, factor, quiet=True)[:n]
    visits = got[0][1].visits
    for rank, (calls, traffic) in enumerate(got):
        assert torch.equal(traffic.visits, visits)
        names = list(traffic.all_to_all_bytes)
        assert names[0] == "forward, to the experts" and len(names) == 4
        account = [traffic.all_to_all_bytes[name][rank].item() for name in names]
        assert calls == ([0] if n == 1 else [traffic.split_size_bytes[rank].item(), *account])
        moe(everyone[rank])
        chosen = moe.routing.chosen.flatten().bincount(minlength=5)
        assert torch.equal(traffic.visits[rank] + traffic.dropped[rank], chosen)
    assert (got[0][1].dropped.sum() > 0) == (factor is not None)


def test_the_busiest_port_is_what_all_wait_for():
    """Three ranks, one expert each; everybody's tokens go to the second one's."""
    traffic = Traffic(torch.tensor([[1, 4, 0], [0, 2, 3], [0, 6, 0]]), torch.zeros(3, 3), (1, 1, 1), 10, 5)
    assert traffic.between.tolist() == [[1, 4, 0], [0, 2, 3], [0, 6, 0]]
    assert traffic.tokens_per_rank.tolist() == [1, 12, 3]
    assert traffic.all_to_all_bytes["forward, to the experts"].tolist() == [40, 30, 60]
    assert traffic.all_to_all_bytes["forward, back"].tolist() == [0, 50, 15]
    assert traffic.all_to_all_bytes["backward, to the experts"].tolist() == [20, 15, 30]
    assert traffic.all_to_all_bytes["backward, back"].tolist() == [0, 100, 30]
    assert traffic.ports.tolist() == [40, 100, 60]
    assert traffic.busiest_port == 100 and traffic.mean_port == pytest.approx(130 / 3)


def test_ranks_with_unequally_many_experts():
    traffic = Traffic(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.zeros(2, 3), (2, 1), 1, 1)
    assert traffic.between.tolist() == [[3, 3], [9, 6]] and traffic.split_size_bytes.tolist() == [8, 16]


# ---- what is refused ------------------------------------------------------------------------------------------


def other_on_rank_1(**options):
    return ExpertParallel.from_module(layer(**(options if dist.get_rank() else {})))


def outside():
    group = group_of((0, 1))
    return dist.get_rank() < 2 or ExpertParallel.from_module(layer(), group)


def wrong_input():
    ExpertParallel.from_module(layer())(torch.ones(3, 5 + dist.get_rank(), dtype=torch.float64))


def wrong_replicas():
    ranks = [group_of((0,)), group_of((1,)), group_of((2,))]
    average_gradients(ExpertParallel.from_module(layer(), ranks[dist.get_rank()]))


def averaged_as_if_all_had_the_same():
    DataParallel(nn.Sequential(ExpertParallel.from_module(layer(experts=6))))


def optimizer_made_before():
    moe = layer()
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    split = ExpertParallel.from_module(moe)
    split(tokens((4,))[0]).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda: ExpertParallel.from_module(layer(experts=2)), r"rank \d: 2 experts are too few for 3 ranks"),
        (lambda: ExpertParallel.from_module(nn.Linear(2, 2)), r"experts of an MoE, not of a Linear"),
        (lambda: ExpertParallel.from_module(ExpertParallel.from_module(layer())), "an MoE, not of a ExpertParallel"),
        (lambda: ExpertParallel.from_module(layer(), [0, 1]), "group is a list, but has to be a process group"),
        (lambda: ExpertParallel.from_module(layer()).traffic(), r"rank \d: no forward yet"),
        (outside, "rank 2 is not in this group"),
        (wrong_input, r"rank [02]: tokens have 6 features in their last dimension, not \[3, [57]\]"),
        (wrong_replicas, r"rank \d: experts over 1 ranks, and 1 with the same ones, make 1 .*, but the group has 3"),
        (averaged_as_if_all_had_the_same, r"ranks' models differ: .*experts.0.* rank 1 has parameter 0.experts.2"),
        (optimizer_made_before, "no longer the model's: it was made before the model was split"),
    ],
)
def test_what_does_not_fit_is_refused(ranks_of, wrong, told):
    with refused(told):
        ranks_of(3).run(lambda: wrong() and None, quiet=True)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"experts": 4}, r"the ranks' models differ: .*'experts': 5.* rank 1 has .*'experts': 4"),
        ({"top_k": 1}, r"the ranks' models differ: .*'top_k': 2.*'top_k': 1"),
        ({"capacity_factor": 1.0}, r"'capacity_factor': None.*'capacity_factor': 1.0"),
        ({"dtype": torch.float32}, r"where rank 0 has parameter .*float64.*, rank 1 has .*float32"),
    ],
)
def test_modules_that_differ_are_refused_on_all_ranks(ranks_of, options, told):
    with refused(told):
        ranks_of(2).run(lambda: other_on_rank_1(**options) and None, quiet=True)
