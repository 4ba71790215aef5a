"""Whole trainings: optimizers, clipping, state dicts, data and tensor parallelism inside the stages."""

import gc
import weakref
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.pipeline import Pipeline, gpipe, interleaved, one_f_one_b, zbv
from pardist_lib.mechanisms.tensor_parallel import ParallelMLP, full_gradients
from pardist_lib.mechanisms.tensor_parallel.transformer import ParallelTransformerBlock, TransformerBlock
from tests.mechanisms.pipeline.nets import (
    close,
    language_model,
    linears,
    one_process,
    rows_of,
    same_gradients,
    seeded,
    stepped,
    word_loss,
    words_of,
)
from tests.mechanisms.refusals import refused

NEAR = {"rtol": 1e-9, "atol": 1e-10}


def groups_of(layers, some):
    """Two groups of parameters with options of their own, of those that are in `some`: weights and the rest."""
    own = {p for p in some}
    parameters = [p for p in nn.Sequential(*layers).parameters() if p in own]
    weights, rest = ([p for p in parameters if (p.dim() > 1) == wide] for wide in (True, False))
    return [{"params": weights}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]


def training(schedule, kind, steps=20):
    """On a rank: beside one process, clipped, AdamW; then the whole state dicts, from every rank, in another pipeline
    and back in one process."""
    layers, plain = language_model(schedule.stages), language_model(schedule.stages)
    pipeline, whole = Pipeline(layers, schedule, word_loss), nn.Sequential(*plain)
    ours = kind(groups_of(layers, pipeline.parameters()))
    theirs = kind(groups_of(plain, whole.parameters()))
    for k in range(steps):
        batch = words_of(9, k), words_of(9, k + 100)
        close(stepped(pipeline, *batch), one_process(plain, *batch, word_loss), f"loss of step {k}", **NEAR)
        norms = pipeline.clip_grad_norm_(0.5), nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        close(*norms, f"norm of step {k}", **NEAR, check_dtype=False)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    return plain, pipeline, ours, theirs


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def momentum(groups):
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


def moved(schedule, others, kind):
    """What the state dicts of a training are worth in one process, and in pipelines of other sizes."""
    plain, pipeline, ours, theirs = training(schedule, kind, steps=5)
    weights, optimizer = pipeline.full_state_dict(), pipeline.full_optimizer_state_dict(ours)
    right = nn.Sequential(*plain).state_dict(), theirs.state_dict()
    same_states((weights, optimizer), right)
    assert list(weights) == list(right[0])
    for other in others:
        n = len(plain)
        layers = language_model(n)
        with torch.no_grad():
            for p in nn.Sequential(*layers).parameters():
                p.zero_()
        again = Pipeline(layers, other, word_loss)
        third = kind(groups_of(layers, again.parameters()))
        again.load_full_state_dict(weights)
        again.load_full_optimizer_state_dict(third, deepcopy(optimizer))  # as torch's, it takes the tensors themselves
        same_states((again.full_state_dict(), again.full_optimizer_state_dict(third)), right)
        stepped(again, words_of(9, 50), words_of(9, 51))
        third.step()
        after = again.full_state_dict()
    one_process(plain, words_of(9, 50), words_of(9, 51), word_loss)
    theirs.step()
    same_states((after, {}), (nn.Sequential(*plain).state_dict(), {}))
    return weights, optimizer


def same_states(got, right):
    for mine, theirs in zip(got, right, strict=True):
        flat, wanted = dict(leaves(mine)), dict(leaves(theirs))
        assert flat.keys() == wanted.keys(), flat.keys() ^ wanted.keys()
        for where, value in wanted.items():
            if isinstance(value, torch.Tensor):
                close(flat[where], value, f"{where}", **NEAR)
            else:
                assert flat[where] == value, where


def leaves(thing, where=()):
    if isinstance(thing, (dict, list)):
        for key, value in thing.items() if isinstance(thing, dict) else enumerate(thing):
            yield from leaves(value, (*where, key))
    else:
        yield where, thing


@pytest.mark.share(2)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_twenty_steps_of_adamw_with_clipping(ranks_of, p):
    for schedule in (one_f_one_b(p, p + 1), zbv(p, p + 1)):
        ranks_of(4).run(in_world, p, without_result, training, schedule, adamw, quiet=True)


def without_result(fn, *args):
    fn(*args)


@pytest.mark.share(2)
@pytest.mark.parametrize("p", [1, 2, 4])
def test_state_dicts_go_into_other_pipelines_and_back_into_one_process(ranks_of, p):
    schedule, others = zbv(p, p), [one_f_one_b(p, 3), interleaved(p, 2 * p, 2), gpipe(p, 1)]
    for kind in (adamw, momentum):
        ranks_of(4).run(in_world, p, moved, schedule, others, kind, quiet=True)


def norms(schedule):
    """On a rank: torch's norm and clipped gradients for each norm, also where nothing is clipped."""
    for norm, most in ((2.0, 0.1), (1, 0.1), (3.0, 0.5), (float("inf"), 0.01), (2.0, 1e6)):
        layers, plain = language_model(4), language_model(4)
        pipeline, whole = Pipeline(layers, schedule, word_loss), nn.Sequential(*plain)
        assert pipeline.clip_grad_norm_(most, norm) == 0
        stepped(pipeline, words_of(8), words_of(8, 1))
        one_process(plain, words_of(8), words_of(8, 1), word_loss)
        wanted = nn.utils.clip_grad_norm_(whole.parameters(), most, norm)
        close(pipeline.clip_grad_norm_(most, norm), wanted, f"norm {norm}", **NEAR)
        same_gradients(pipeline, plain, f"clipped by norm {norm}", **NEAR)


def test_every_norm_is_torchs(ranks_of):
    for schedule in (one_f_one_b(4, 4), zbv(2, 4)):
        ranks_of(4).run(in_world, schedule.ranks, norms, schedule, quiet=True)


def named_and_empty(schedule):
    """An optimizer of named parameters, on a rank without any, too: its state dict is that of one process."""
    layers, plain = ([nn.Tanh(), *linears(2), nn.Tanh()] for _ in range(2))
    pipeline, whole = Pipeline(layers, schedule, nn.functional.mse_loss), nn.Sequential(*plain)
    ours = torch.optim.AdamW([{"params": list(pipeline.named_parameters())}])
    theirs = torch.optim.AdamW([{"params": list(whole.named_parameters())}])
    for _ in range(2):
        stepped(pipeline, rows_of(8), rows_of(8, 1))
        one_process(plain, rows_of(8), rows_of(8, 1), nn.functional.mse_loss)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        state = pipeline.full_optimizer_state_dict(ours)
        same_states((state,), (theirs.state_dict(),))
        pipeline.load_full_optimizer_state_dict(ours, state)
        theirs.load_state_dict(deepcopy(state))


def test_named_parameters_and_a_rank_without_any(ranks_of):
    ranks_of(4).run(named_and_empty, one_f_one_b(4, 4), quiet=True)


def strangers(what):
    pipeline = Pipeline(linears(4), one_f_one_b(4, 4), nn.functional.mse_loss)
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    if what == "names":
        pipeline.load_full_state_dict(nn.Sequential(*linears(5)).state_dict())
    elif what == "groups":
        two = torch.optim.SGD(groups_of(linears(4), []), lr=0.1).state_dict()
        pipeline.load_full_optimizer_state_dict(optimizer, two)
    else:
        pipeline.full_optimizer_state_dict(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


@pytest.mark.parametrize(
    "what, said",
    [
        ("names", r"in one state dict only: \['4.bias', '4.weight'\]"),
        ("groups", "this state has 2 groups of parameters, the optimizer 1"),
        ("optimizer", "make it of its parameters"),
    ],
)
def test_states_that_do_not_fit_are_refused(ranks_of, what, said):
    with refused(said):
        ranks_of(4).run(strangers, what, quiet=True)


# ---- with another group inside each stage -------------------------------------------------------------------------


def in_a_mesh(inner, schedule, steps=20):
    """On a rank of 2 × 2: 20 steps of AdamW beside one process."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", inner))
    pp, other = mesh["pp"].get_group(), mesh[inner].get_group()
    plain, layers = blocks(schedule.stages), blocks(schedule.stages)
    if inner == "tp":
        layers = [ParallelTransformerBlock.from_module(block, other) for block in layers]
    pipeline = Pipeline(layers, schedule, nn.functional.mse_loss, pp)
    ours, theirs = (torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (pipeline, nn.Sequential(*plain)))
    for k in range(steps):
        x, target = (rows_of(8 * 3, seed, width=8).view(8, 3, 8) for seed in (k, k + 100))
        wanted = one_process(plain, x, target, nn.functional.mse_loss)
        if inner == "dp":
            x, target = (t.tensor_split(2)[dist.get_rank(other)] for t in (x, target))
        loss = stepped(pipeline, x, target)
        if inner == "dp":
            for t in [loss, *(p.grad for p in pipeline.parameters())]:
                dist.all_reduce(t.div_(2), group=other)
        close(loss, wanted, f"loss of step {k}", **NEAR)
        right = dict(nn.Sequential(*plain).named_parameters())
        for name, gradient in full_gradients(pipeline).items():
            if "attention.qkv.bias" not in name:  # of the keys it is zero in theory
                close(gradient, right[name].grad, f"gradient of {name} in step {k}", rtol=1e-7, atol=1e-9)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()


def blocks(n):
    return seeded([TransformerBlock(8, 2) for _ in range(n)])


@pytest.mark.parametrize("inner", ["dp", "tp"])
def test_a_group_inside_each_stage(ranks_of, inner):
    for schedule in (one_f_one_b(2, 4), zbv(2, 4)):
        ranks_of(4).run(in_a_mesh, inner, schedule, quiet=True)


def keeps_its_own():
    """On a rank: which layers' weights are alive once the list of layers has gone; and torch's norm of split ones."""
    layers = linears(dist.get_world_size())
    weights = [weakref.ref(layer.weight) for layer in layers]
    pipe = Pipeline(layers, one_f_one_b(len(layers), 4), nn.functional.mse_loss)
    del layers
    gc.collect()
    return [i for i, weight in enumerate(weights) if weight() is not None], len(list(pipe.parameters()))


def test_a_rank_keeps_its_own_layers_only(ranks_of):
    assert ranks_of(4).run(keeps_its_own, quiet=True) == [([rank], 2) for rank in range(4)]


def clips_split_stages():
    alone = [group_of([rank]) for rank in range(2)][dist.get_rank()]
    layers = [ParallelMLP(4, 8, dtype=torch.float64) for _ in range(2)]
    pipe = Pipeline(layers, one_f_one_b(1, 2), nn.functional.mse_loss, group=alone)
    pipe.step(rows_of(4, width=4), rows_of(4, width=4))
    with pytest.raises(RuntimeError, match="each rank has only a part"):
        pipe.clip_grad_norm_(1.0)


def test_the_norm_of_stages_that_tensor_parallelism_has_split_is_refused(ranks_of):
    ranks_of(2).run(clips_split_stages, quiet=True)
