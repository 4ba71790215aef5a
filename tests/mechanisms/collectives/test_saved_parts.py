"""State dicts of models of which each rank has a part: what is saved is what is loaded, or there is an error."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from pardist_lib.mechanisms.collectives.parts import SavedPart
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer
from pardist_lib.mechanisms.tensor_parallel import ParallelConv2d, VocabParallelEmbedding, full_state_dict, parallelize
from tests.mechanisms.refusals import refused


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(2)


def net(width=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3))


MODELS = {
    "stage 2": lambda: ShardedDataParallel(net(), 2),
    "stage 3": lambda: ShardedDataParallel(net(5), 3),
    "inside": lambda: ShardedDataParallel(net(), 3).module,
    "a part": lambda: ShardedDataParallel(net(), 3).module[2],
    "column and row": lambda: parallelize(net(), {"0": "column, gathered", "2": "row, scattered"}),
    "vocabulary": lambda: VocabParallelEmbedding(6, 4),
    "convolution": lambda: ParallelConv2d(4, 6, 3),
}


def written(what, folder):
    dcp.save({"it": what}, checkpoint_id=folder)


def stepped(model, optimizer):
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("kind", MODELS)
def test_a_distributed_checkpoint_of_parts_is_refused_with_what_is_whole(ranks, kind, tmp_path):
    def save():
        written(MODELS[kind]().state_dict(), tmp_path)

    whole = "tensor_parallel.full_state_dict" if kind[0] in "cv" else "full_state_dict.. of this ShardedDataParallel"
    with refused(f"weight is this rank's part only.*\n*.*save {whole}"):
        ranks.run(save, quiet=True)


def test_so_is_one_of_momenta_of_what_was_moved_and_one_that_is_loaded(ranks, tmp_path):
    def momenta(how):
        model = net()
        if how == "stage 1":
            optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW)
        else:
            model = ShardedDataParallel(model) if how == "stage 3" else parallelize(model, {"2": "row, scattered"})
            optimizer = torch.optim.AdamW(model.parameters())
        written(stepped(model, optimizer).state_dict(), tmp_path)

    def changed():
        state = ShardedDataParallel(net()).state_dict()
        written({k: v.clone().cpu().to(torch.bfloat16) for k, v in copy.deepcopy(state).items()}, tmp_path)

    def pieces():
        model = ShardedDataParallel(net())
        torch.save(model.state_dict(), held := io.BytesIO())
        held.seek(0)
        written(torch.load(held), tmp_path)  # with weights_only=True

    def loaded():
        model = ShardedDataParallel(net(), 3)
        plain = {k: v.as_subclass(torch.Tensor) for k, v in model.state_dict().items()}
        written(plain, tmp_path)  # as it was done before
        dcp.load({"it": model.state_dict()}, checkpoint_id=tmp_path)

    for how in ("stage 1", "stage 3", "row"):
        with refused("exp_avg is this rank's part only"):
            ranks.run(momenta, how, quiet=True)
    for case in (changed, pieces):
        with refused("weight is this rank's part only"):
            ranks.run(case, quiet=True)
    with refused("does not know the parts of this one: load full_state_dict"):
        ranks.run(loaded, quiet=True)


def goes_round(folder):
    """What is whole, saved and loaded; and a world of one, in which parts are whole."""
    model = ShardedDataParallel(net(), 3)
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    whole = {"model": model.full_state_dict(), "optimizer": model.full_optimizer_state_dict(optimizer)}
    dcp.save(whole, checkpoint_id=folder)
    zeros = torch.utils._pytree.tree_map(lambda v: v * 0 if isinstance(v, torch.Tensor) else v, whole)
    dcp.load(zeros, checkpoint_id=folder)
    other = ShardedDataParallel(net(), 2)
    other.load_full_state_dict(zeros["model"])
    optimizer_of_other = torch.optim.AdamW(other.parameters())
    other.load_full_optimizer_state_dict(optimizer_of_other, zeros["optimizer"])
    momenta = other.full_optimizer_state_dict(optimizer_of_other)["state"][0]["exp_avg"]
    split = parallelize(net(), {"0": "column, gathered"})
    alone = [dist.new_group([r]) for r in range(2)][dist.get_rank()]
    single = ShardedDataParallel(net(), 3, alone)
    return [
        all(torch.equal(v, whole["model"][k]) for k, v in other.full_state_dict().items()),
        torch.equal(momenta, whole["optimizer"]["state"][0]["exp_avg"]),
        not any(
            isinstance(v, SavedPart) for v in [*full_state_dict(split).values(), *whole["model"].values(), momenta]
        ),
        not any(isinstance(v, SavedPart) for v in single.state_dict().values()),
    ]


def test_what_is_whole_is_saved_and_loaded(ranks, tmp_path):
    assert ranks.run(goes_round, tmp_path, quiet=True) == [[True] * 4] * 2


def each_its_own(kind):
    """Through a file for each rank; then on with the training, in which nothing is a SavedPart."""
    model, other = (MODELS[kind]() for _ in range(2))
    optimizer, late = (torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other))
    torch.manual_seed(dist.get_rank() if kind.startswith("stage") else 0)
    stepped(model, optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], held := io.BytesIO())
    held.seek(0)
    state, momenta = torch.load(held)
    other.load_state_dict(state)
    late.load_state_dict(momenta)
    for m, o in ((model, optimizer), (other, late)):
        torch.manual_seed(1)
        stepped(m, o)
        o.load_state_dict(o.state_dict())
    held = [*other.parameters(), *(v for s in late.state.values() for v in s.values())]
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    return all(same) and not any(isinstance(t, SavedPart) for t in held)


@pytest.mark.parametrize("kind", ["stage 2", "stage 3", "column and row"])
def test_each_rank_loads_what_it_has_saved(ranks, kind):
    assert all(ranks.run(each_its_own, kind, quiet=True))


def anothers(kind, what):
    """All ranks load what the first one has saved."""
    model = MODELS[kind]()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    held = [{"model": model, "optimizer": optimizer}[what].state_dict()]
    dist.broadcast_object_list(held)
    if what == "optimizer":
        other = torch.optim.AdamW(model.parameters())
        other.load_state_dict(held[0])
        stepped(model, other)
    else:
        model.load_state_dict(held[0])


@pytest.mark.parametrize("what", ["model", "optimizer"])
@pytest.mark.parametrize("kind", ["stage 2", "column and row"])
def test_another_ranks_part_is_refused_where_it_would_fit(ranks, kind, what):
    with refused("in this state dict is another rank's part.*full_state_dict"):
        ranks.run(anothers, kind, what, quiet=True)
