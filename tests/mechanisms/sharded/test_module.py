"""ShardedDataParallel (ZeRO-2 and 3): against one process and against FSDP2, to the byte, and what it holds."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer, async_collectives
from pardist_lib.mechanisms.sharded.state import gather_local_shard
from tests.mechanisms.refusals import refused
from tests.mechanisms.sharded.cases import OPTIMIZERS, Model, close, flat_parameters, loss_of, rows_of, storages
from tests.mechanisms.sharded.unusual_modules import Between, Scaled, filled

STAGES = [2, 3]


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(4)


def trained(kind, n=None, steps=20, dtype=torch.float64, uneven=False, clip=None, micro=1, **how):
    """The parameters after some steps on n ranks, and the first step's gradients; on one process where n is None."""
    model = Model(dtype)
    if n and dist.get_rank():
        with torch.no_grad():
            for tensor in [*model.parameters(), model.shift]:
                tensor.add_(1.0)  # the first rank's values are the ones that count
    if n:
        model = ShardedDataParallel(model, **how)
    make, options = OPTIMIZERS[kind]
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    others = [p for name, p in model.named_parameters() if "weight" not in name]
    optimizer = make([{"params": weights}, {"params": others, "weight_decay": 0.0}], **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
    gradients, norm = {}, torch.zeros(())
    for step in range(steps):
        for i in range(micro):
            (loss_of(model, step + i, dtype, n, uneven) / micro).backward()
        if step == 0:
            for name, p in model.named_parameters():
                whole = p.grad if n is None or p.grad is None else gather_local_shard(p.grad, p)
                gradients[name.removeprefix("module.")] = None if whole is None else whole.clone()
        if clip:
            clips = model.clip_grad_norm_ if n else lambda most: nn.utils.clip_grad_norm_(model.parameters(), most)
            norm = clips(clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    state = model.full_state_dict() if n else model.state_dict()
    return {**state, "norm": norm}, gradients


def on_every_world(cases):
    results = []
    for kind, how in cases:
        alone = trained(kind, **{k: v for k, v in how.items() if k in ("steps", "dtype", "clip", "micro")})
        worlds = [in_world(n, lambda n=n: trained(kind, n, **how)) for n in how.get("worlds", (1, 2, 3, 4))]  # noqa: B023
        results.append((alone, worlds))
    return results


def check(ranks, cases):
    cases = [(kind, {"stage": stage, **how}) for kind, how in cases for stage in how.pop("stages", STAGES)]
    for rank, results in enumerate(ranks.run(on_every_world, cases, quiet=True)):
        for case, ((state, gradients), worlds) in zip(cases, results, strict=True):
            for n, got in enumerate(worlds, 1):
                if got is not None:
                    about = f"{case} on rank {rank} of {n}"
                    close(got[0], state, about)
                    assert got[1].keys() == gradients.keys()
                    for name, gradient in gradients.items():
                        assert (got[1][name] is None) == (gradient is None), f"{about}: the gradient of {name}"
                        if gradient is not None:
                            close({name: got[1][name]}, {name: gradient}, f"{about}: the gradient of {name}")


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_twenty_steps_equal_one_process_on_the_whole_batch(ranks, kind):
    check(ranks, [(kind, {})])


def test_uneven_batches_clipping_accumulation_and_float32(ranks):
    cases = [{"uneven": True}, {"clip": 0.1}, {"micro": 2}]
    check(ranks, [("AdamW", {**how, "steps": 5}) for how in cases] + [("SGD", {"dtype": torch.float32, "steps": 5})])


def test_other_optimizers_go_on_as_they_are(ranks):
    check(ranks, [(kind, {"steps": 6, "stages": [3]}) for kind in ("Adam", "RMSprop", "Adagrad", "NAdam")])


def test_every_way_to_gather(ranks):
    ways = [
        {"stage": 3, "reshard_after_forward": False},
        {"stage": 3, "prefetch": False},
        {"stage": 3, "overlap": False},
        {"stage": 2, "overlap": False},
        {"stage": 2, "find_unused_parameters": True},
        {"stage": 3, "find_unused_parameters": True},
        {"stage": 3, "units": []},
        {"stage": 3, "units": nn.Linear},
    ]

    def run():
        return [trained("AdamW", 4, 4, **way)[0] for way in ways], trained("AdamW", steps=4)[0]

    for results, alone in ranks.run(run, quiet=True):
        for way, got in zip(ways, results, strict=True):
            close(got, alone, str(way))


def in_two_groups():
    groups = [group_of([0, 1]), group_of([2, 3])]
    rank = dist.get_rank()
    model = ShardedDataParallel(Model(seed=rank // 2), 3, groups[rank // 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(rows_of(step, torch.float64)[rank % 2 :: 2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    alone = Model(seed=rank // 2)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(3):
        alone(rows_of(step, torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict(), alone.state_dict()


def test_a_group_is_an_argument(ranks):
    for got, alone in ranks.run(in_two_groups, quiet=True):
        close(got, alone, "two groups")


# ---- FSDP2 ----------------------------------------------------------------------------------------------------


def beside_fsdp2(kind, stage):
    from torch.distributed.fsdp import fully_shard

    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    theirs = fresh()
    for layer in theirs[::2]:
        fully_shard(layer)
    fully_shard(theirs)
    models, (make, options) = [ShardedDataParallel(fresh(), stage), theirs], OPTIMIZERS[kind]
    optimizers = [make(model.parameters(), **options) for model in models]
    for step in range(20):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss_of(model, step, torch.float64, 4).backward()
            optimizer.step()
            optimizer.zero_grad()
    return models[0].full_state_dict(), {k: v.full_tensor().detach() for k, v in theirs.state_dict().items()}


def test_twenty_steps_equal_fsdp2(ranks):
    for kind in ("SGD", "AdamW"):
        for stage in STAGES:
            for ours, torchs in ranks.run(beside_fsdp2, kind, stage, quiet=True):
                close(ours, torchs, f"{kind}, stage {stage}")


# ---- the model may be anything --------------------------------------------------------------------------------


def stepping_in_backward(n, stage):
    """Each parameter has an optimizer of its own, that steps as soon as its gradient is there."""
    model = filled(Between(Scaled()))
    model = ShardedDataParallel(model, stage) if n else model
    optimizers = {p: torch.optim.AdamW([p], lr=0.02) for p in model.parameters()}

    def step_now(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    for step in range(3):
        x = rows_of(step, torch.float64)
        model(x[dist.get_rank() :: n] if n else x).square().mean().backward()
    return model.full_state_dict() if n else model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_may_step_in_a_hook(ranks, stage):
    alone = ranks.run(stepping_in_backward, None, stage, on=0)[0]
    for got in ranks.run(stepping_in_backward, 4, stage, quiet=True):
        close(got, alone, "in backward")


def two_models(stage):
    plain = [filled(nn.Sequential(nn.Linear(6, 37), nn.Tanh(), nn.Linear(37, 3)), seed) for seed in range(2)]
    models = [copy.deepcopy(m) if stage == 1 else ShardedDataParallel(copy.deepcopy(m), stage) for m in plain]
    sgd = torch.optim.SGD
    optimizers = [
        ShardedOptimizer(m.parameters(), sgd, overlap=True, lr=0.1) if stage == 1 else sgd(m.parameters(), lr=0.1)
        for m in models
    ]
    alone = sgd([p for m in plain for p in m.parameters()], lr=0.1)
    for step in range(4):
        x = rows_of(step, torch.float64)
        for (a, b), rows, those in ((plain, x, [alone]), (models, x[dist.get_rank() :: 4], optimizers)):
            (a(rows) * b(rows / 2)).mean().backward()
            for optimizer in those:
                optimizer.step()
                optimizer.zero_grad()
    return [
        (m.state_dict() if stage == 1 else m.full_state_dict(), p.state_dict())
        for m, p in zip(models, plain, strict=True)
    ]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_models_in_one_loss(ranks, stage):
    for results in ranks.run(two_models, stage, quiet=True):
        for i, (got, alone) in enumerate(results):
            close(got, alone, f"model {i}")


def penalised(n, stage):
    model = filled(Between(Scaled()))
    model = ShardedDataParallel(model, stage) if n else model
    x = rows_of(0, torch.float64)[dist.get_rank() :: n] if n else rows_of(0, torch.float64)
    x.requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.square().mean() + slope.square().mean()).backward()
    return {
        name.removeprefix("module."): gather_local_shard(p.grad, p) if n else p.grad
        for name, p in model.named_parameters()
    }


def test_a_gradient_penalty_is_right_at_stage_2_and_refused_at_stage_3(ranks):
    alone = ranks.run(penalised, None, 2, on=0)[0]
    for got in ranks.run(penalised, 4, 2, quiet=True):
        close(got, alone, "penalty")
    with refused("stage 3 cannot tell when a backward with create_graph"):
        ranks.run(penalised, 4, 3, quiet=True)


def stage_2_and_an_evaluation_between(stage):
    model = ShardedDataParallel(nn.Linear(3, 1, bias=False), stage)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.ones(1, 3)
    seen = []
    for _ in range(2):
        model(x).sum().backward()
        with torch.no_grad():
            model(x)  # before the step: must not count as having seen its result
        optimizer.step()
        with torch.no_grad():
            seen.append(model(x).item())
        optimizer.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        model.refresh()
        return [*seen, model(x).item()]


@pytest.mark.parametrize("stage", STAGES)
def test_a_forward_sees_the_newest_parameters(ranks, stage):
    for first, second, last in ranks.run(stage_2_and_an_evaluation_between, stage):
        assert abs(first - second - 3) < 1e-5 and last == 3


def some_use_it(n, find):
    models = nn.ModuleList(nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for p in models.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=generator)

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = models

        def forward(self, x, which):
            return self.models[which](x)

    model = ShardedDataParallel(Either(), 2, find_unused_parameters=find) if n else Either()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(5):
        for r in [dist.get_rank()] if n else range(4):
            rows = rows_of(step, torch.float64)[r::4][:, :5]
            (model(rows, int(r % 2 == step % 2)).square().mean() / (1 if n else 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict() if n else model.state_dict()


def test_ranks_may_use_different_parameters_if_they_say_so(ranks):
    close(ranks.run(some_use_it, 4, True, quiet=True)[1], ranks.run(some_use_it, None, True)[0], "conditional")
    with pytest.raises(RankError, match="find_unused_parameters=True"):
        ranks.run(some_use_it, 4, False)


# ---- what it sends --------------------------------------------------------------------------------------------

LAYERS, WIDTH = 4, 520  # over a megabyte each: they are sent and received, not moved in one call


def mlp(width=WIDTH, layers=LAYERS, bias=False):
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width, bias=bias), nn.ReLU())))


def some_steps(steps, width, layers, bias, how):
    model = ShardedDataParallel(mlp(width, layers, bias), **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, width)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "how, factor",
    [
        ({"stage": 2}, 2),
        ({"stage": 3}, 3),
        ({"stage": 3, "overlap": False, "prefetch": False}, 3),
        ({"stage": 3, "reshard_after_forward": False}, 2),
    ],
)
def test_a_step_sends_the_formulas_bytes(ranks, how, factor):
    for width, layers, bias in ((WIDTH, LAYERS, False), (33, 2, True)):
        once, more = (ranks.trace(some_steps, steps, width, layers, bias, how) for steps in (2, 3))
        elements = width * width + width * bias  # of a unit
        shards = [elements // 4 + (r < elements % 4) for r in range(4)]
        for r in range(4):
            calls = ("send", "all_to_all", "all_reduce")
            sent, chunks, rest = (more.bytes(call, r) - once.bytes(call, r) for call in calls)
            gather, reduce = 3 * shards[r], elements - shards[r]
            if chunks:  # short units are reduced in one call each, which is given this rank's own chunk, too
                assert chunks == 4 * layers * elements <= async_collectives.ONE_CALL_BYTES
                sent += chunks - 4 * layers * shards[r]
            assert sent == 4 * layers * ((factor - 1) * gather + reduce) and not rest
            others = {e.name for e in more.collectives} - {"recv", "broadcast", "barrier", *calls}
            assert others <= {"all_gather"}
    size = 4 * LAYERS * WIDTH * WIDTH  # where 4 divides it is the textbook's figure
    assert 4 * LAYERS * 3 * factor * WIDTH * WIDTH // 4 == factor * 3 * size // 4


def while_it_multiplies(trace):
    """How many sends were under way while their rank multiplied matrices."""
    products = [e for e in trace.events if e.name == "mm"]
    sends = [e for e in trace.collectives if e.name == "send"]
    return sum(any(m.rank == s.rank and m.start < s.end and s.start < m.end for m in products) for s in sends)


@pytest.mark.parametrize("stage", STAGES)
def test_overlap_is_seen_on_the_trace(ranks, stage):
    beside, after = (
        ranks.trace(some_steps, 2, WIDTH, LAYERS, False, {"stage": stage, "overlap": overlap})
        for overlap in (True, False)
    )
    assert while_it_multiplies(beside) and not while_it_multiplies(after)


# ---- what it holds --------------------------------------------------------------------------------------------


def held(stage, how, width=128, layers=4):
    """Bytes of this rank's storages by kind after a step, and the most that lay in whole layers while one computed."""
    model = ShardedDataParallel(mlp(width, layers), stage, **how)
    optimizer = torch.optim.AdamW(model.parameters())
    most = [0]

    def look(*_):
        most[0] = max(most[0], storages(flat.unsharded for flat in flat_parameters(model)))

    for layer in model.module:
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_pre_hook(look)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, width, requires_grad=True)).sum().backward()
        optimizer.step()
    whole = [p for flat in flat_parameters(model) for p in flat.parameters]
    kinds = {
        "parameters": [*model.parameters(), *whole],
        "gradients": [p.grad for p in [*model.parameters(), *whole]]
        + [flat.gradient for flat in flat_parameters(model)],
        "state": [v for s in optimizer.state.values() for v in s.values() if v.dim()],
    }
    return [storages(tensors) for tensors in kinds.values()], most[0]


@pytest.mark.parametrize("stage", STAGES)
def test_memory_by_kind_is_the_formulas(ranks, stage):
    layer = 4 * 128 * 128
    psi = 4 * layer  # bytes of the parameters
    for how, at_once in (({}, 2), ({"prefetch": False}, 1), ({"reshard_after_forward": False}, 4)):
        for known, most in ranks.run(held, stage, how):
            assert known == [psi if stage == 2 else psi // 4, psi // 4, 2 * psi // 4]
            assert most == (at_once * layer if stage == 3 else psi)


def freed():
    model = ShardedDataParallel(mlp(64, 3), 3)
    flats = [flat.unsharded.untyped_storage() for flat in flat_parameters(model)]
    sizes = [sum(s.nbytes() for s in flats)]
    shapes = [p.shape for p in model.parameters()]
    out = model(torch.ones(2, 64))
    sizes.append(sum(s.nbytes() for s in flats))
    out.sum().backward()
    sizes.append(sum(s.nbytes() for s in flats))
    return sizes, shapes, [p.grad is None for flat in flat_parameters(model) for p in flat.parameters]


def test_stage_3_frees_after_use(ranks):
    for sizes, shapes, gone in ranks.run(freed):
        assert sizes == [0, 0, 0] and shapes == [(64 * 64 // 4,)] * 3 and all(gone)


def left_behind(stage):
    """The flat parameters that are still in memory after a model was trained and dropped."""
    model = Model(torch.float32)
    if stage == 1:
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW)
        flats = [weakref.ref(flat) for flat in optimizer.buckets]
    else:
        model = ShardedDataParallel(model, stage)
        optimizer = torch.optim.AdamW(model.parameters())
        flats = [weakref.ref(flat) for flat in flat_parameters(model)]
    for step in range(2):
        loss_of(model, step, torch.float32, 4, False).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(flat() is not None for flat in flats)
    del model, optimizer
    gc.collect()
    return sum(flat() is not None for flat in flats)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_that_is_dropped_leaves_nothing_behind(ranks, stage):
    assert ranks.run(left_behind, stage) == [0] * 4
