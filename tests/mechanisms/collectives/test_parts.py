"""What torch does wrongly without a word: it steps parameters that a model no longer uses, takes one rank's norm."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grad_norm_  # taken before any model is split

from pardist_lib.mechanisms import tensor_parallel
from pardist_lib.mechanisms.data_parallel import DataParallel, SyncBatchNorm
from pardist_lib.mechanisms.mixed_precision import MasterWeights
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer
from pardist_lib.mechanisms.tensor_parallel import (
    ColumnParallelLinear,
    ParallelMLP,
    VocabParallelEmbedding,
    parallelize,
)
from tests.mechanisms.refusals import refused


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


# ---- an optimizer that was made too early ---------------------------------------------------------------------


def sharded(stage):
    return lambda model: ShardedDataParallel(model, stage)


def as_a_whole(model):
    return ParallelMLP.from_module(model).to_module()


def as_masters(model):
    masters = MasterWeights(model)

    def forward(x):
        return model(x.bfloat16()).float()

    forward.take_gradients = masters.take_gradients
    return forward


CHANGES = {
    "stage 2": (sharded(2), 4),
    "stage 3": (sharded(3), 4),
    "parallelize": (lambda model: parallelize(model, {"0": "column", "2": "row"}), 4),
    "parallelize a part": (lambda model: parallelize(model, {"0": "column, gathered"}), 2),
    "from_module": (ParallelMLP.from_module, 4),
    "to_module": (as_a_whole, 4),  # its parameters took the place of those that took the optimizer's place
    "masters": (as_masters, 4),
}


def stepped(change, make=torch.optim.AdamW, groups=1):
    model = net()
    optimizer = make(model.parameters(), lr=0.1)
    model = change(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        getattr(model, "take_gradients", lambda: None)()
        optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_an_optimizer_of_what_was_replaced_is_refused_at_its_first_step(ranks, change):
    change, lost = CHANGES[change]
    with refused(f"{lost} of this optimizer's 4 parameters are no longer the model's: it was made before.*afterwards"):
        ranks.run(stepped, change, quiet=True)


def test_of_any_optimizer_and_of_split_parameters_of_which_a_whole_was_made(ranks):
    def whole_again():
        layer = ColumnParallelLinear(4, 4)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.to_module()(torch.ones(2, 4)).sum().backward()  # what this makes is new
        optimizer.step()  # and gone: nothing was trained in vain
        whole = layer.to_module()
        whole(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    def zero_1():
        model = net()
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        ShardedDataParallel(copy.deepcopy(model))
        split = ParallelMLP.from_module(model)
        split(torch.ones(2, 4)).sum().backward()
        optimizer.step()

    for case in (whole_again, zero_1):
        with refused("are no longer the model's"):
            ranks.run(case, quiet=True)
    with refused("are no longer the model's"):
        ranks.run(stepped, sharded(3), torch.optim.SGD, quiet=True)


def both_trained():
    """Each with an optimizer of its own, one after the other: nothing is wrong with that."""
    whole = net()
    early = torch.optim.SGD(whole.parameters(), lr=0.1)
    split = ParallelMLP.from_module(whole)
    late = torch.optim.SGD(split.parameters(), lr=0.1)
    for _ in range(2):
        for model, optimizer in ((split, late), (whole, early)):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        for optimizer in (late, early):
            optimizer.zero_grad()
    same = [torch.allclose(p, q) for p, q in zip(whole.parameters(), split.to_module().parameters(), strict=True)]
    return all(same)


def kept():
    """Parameters that stay the model's: an optimizer of them may be older."""
    losses = []
    for change in (
        DataParallel,
        SyncBatchNorm.convert,
        lambda m: ShardedOptimizer(m.parameters(), torch.optim.SGD, lr=0.1) and m,
    ):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model[0].weight.detach().clone()
        model = change(model)
        model(torch.randn(4, 4)).square().sum().backward()
        optimizer.step()
        losses.append(not torch.equal(before, getattr(model, "module", model)[0].weight))
    return all(losses)


def test_nothing_else_is_refused(ranks):
    assert all(ranks.run(both_trained, quiet=True)) and all(ranks.run(kept, quiet=True))


def looks():
    """How often an optimizer's parameters are looked through: (steps without, groups added, another model split)."""
    counted = [0]

    class Groups(list):
        def __iter__(self):
            counted[0] += 1
            return super().__iter__()

    model = ShardedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups = Groups(optimizer.param_groups)
    seen = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        lambda: parallelize(net(), {"0": "column, gathered"}),
        lambda: None,
    ):
        change()
        counted[0] = 0
        optimizer.step()
        seen.append(counted[0])
    return [n - seen[1] for n in seen]


def test_a_step_is_looked_at_once(ranks):
    assert ranks.run(looks) == [[1, 0, 1, 1, 0]] * 2


# ---- torch's norms --------------------------------------------------------------------------------------------


def with_gradients(model):
    model(torch.ones(2, 4)).sum().backward()
    return model


def clipped(how, clip):
    if how == "stage 1":
        model = net()
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with_gradients(model)
    else:
        model = with_gradients(CHANGES[how][0](net()))
    parameters, optimizer = list(model.parameters()), locals().get("optimizer")
    if clip == "torch":
        clip_grad_norm_(parameters, 0.1)
    elif clip == "one":
        nn.utils.clip_grad_norm_(parameters[0], 0.1, norm_type=float("inf"), foreach=False)
    elif clip == "norm":
        nn.utils.get_total_norm([p.grad for p in parameters])
    elif clip == "value":
        nn.utils.clip_grad_value_(parameters, 1e-3)
        return max(p.grad.abs().max().item() for p in parameters if p.grad.numel())
    return optimizer


@pytest.mark.parametrize("clip", ["torch", "one", "norm"])
@pytest.mark.parametrize(
    "how, instead",
    [
        ("stage 1", "clip_grad_norm_ of this ShardedOptimizer"),
        ("stage 2", "clip_grad_norm_ of this ShardedDataParallel"),
        ("stage 3", "clip_grad_norm_ of this ShardedDataParallel"),
        ("parallelize", "tensor_parallel.clip_grad_norm_"),
    ],
)
def test_torchs_norms_of_parts_are_refused_with_what_is_right(ranks, how, instead, clip):
    with refused(f"each rank has only a part of these.*{instead}"):
        ranks.run(clipped, how, clip, quiet=True)


@pytest.mark.parametrize("how", ["stage 2", "stage 3", "parallelize"])
def test_clipping_by_value_goes_on(ranks, how):
    assert ranks.run(clipped, how, "value", quiet=True) == [pytest.approx(1e-3)] * 2


def norms_that_are_right():
    """Of what is whole on every rank; of a model sharded in a world of one; after the ZeRO-1 optimizer went."""
    alone = [dist.new_group([r]) for r in range(2)][dist.get_rank()]
    model = with_gradients(net())
    found = [clip_grad_norm_(model.parameters(), 100.0)]
    for split in (ShardedDataParallel(net(), 3, alone), parallelize(net(), {"0": "column", "2": "row"}, alone)):
        found.append(clip_grad_norm_(with_gradients(split).parameters(), 100.0))
    row = parallelize(net(), {"0": "column", "2": "row"})
    whole = clip_grad_norm_([with_gradients(row)[2].bias], 100.0), clip_grad_norm_([model[2].bias], 100.0)
    again = net()
    ShardedOptimizer(again.parameters(), torch.optim.SGD, lr=0.1)
    found.append(clip_grad_norm_(with_gradients(again).parameters(), 100.0))
    assert torch.allclose(*whole)
    return torch.stack(found)


def test_norms_that_are_right_are_torchs(ranks):
    for found in ranks.run(norms_that_are_right, quiet=True):
        assert torch.allclose(found, found[:1].expand(4))


class Tied(nn.Module):
    """Parameters split along rows, along columns, whole, shared; one part that is empty where ranks are many."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.up, self.down, self.head = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.norm(self.frozen(self.down(self.up(self.table(tokens)).relu()))))


def split_norms(n, norm_type, copied=False):
    model = Tied().double()
    if n:
        plan = {"table": "vocabulary", "up": "column", "down": "row", "head": "column, gathered"}
        model = parallelize(model, plan)
        model = copy.deepcopy(model) if copied else model
    model(torch.arange(7)).square().sum().backward()
    clip = tensor_parallel.clip_grad_norm_ if n else lambda m, *how: nn.utils.clip_grad_norm_(m.parameters(), *how)
    norm = clip(model, 0.5, norm_type)
    if n:
        return norm, tensor_parallel.full_gradients(model)
    return norm, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_split_gradients_are_clipped_as_the_whole_models(ranks_of, norm_type):
    alone, gradients = ranks_of(4).run(split_norms, None, norm_type, on=0)[0]
    for n, copied in ((2, False), (3, True), (4, False)):
        for norm, got in ranks_of(n).run(split_norms, n, norm_type, copied, quiet=True):
            assert torch.allclose(norm, alone, 1e-10)
            for name, gradient in gradients.items():
                assert torch.allclose(got[name], gradient, 1e-10, 1e-12), name


def test_a_copy_of_a_split_model_is_split(ranks):
    def on_a_copy():
        table = copy.deepcopy(VocabParallelEmbedding(6, 4))
        table(torch.arange(6)).sum().backward()
        clip_grad_norm_(table.parameters(), 1.0)

    with refused("tensor_parallel.clip_grad_norm_"):
        ranks.run(on_a_copy, quiet=True)
