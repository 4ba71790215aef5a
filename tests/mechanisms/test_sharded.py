"""ShardedDataParallel (ZeRO-2 and 3): against one process and against FSDP2, to the byte, and what it holds."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of, in_world
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer, courier
from pardist_lib.mechanisms.sharded.flat_shards import FlatShards
from pardist_lib.mechanisms.sharded.state import gather_piece
from tests.mechanisms.refusals import refused
from tests.mechanisms.sharded_cases import OPTIMIZERS, Model, close, loss_of, rows_of, storages
from tests.mechanisms.unusual_modules import CASES, Between, Scaled, Slotted, TakesObject, filled

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
                whole = p.grad if n is None or p.grad is None else gather_piece(p.grad, p)
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


class Recalled(nn.Module):
    """Checkpointing, a unit called twice, one that returns a dict, one that gets keywords, one without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.named = Named()
        self.normal = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 6)
        self.table = nn.Embedding(10, 6)
        self.double()

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(self.blocks[0], x, use_reentrant=False)
        x = self.blocks[1](self.blocks[1](x)) + x
        out = self.named(x=x)
        y = self.normal(out["y"] + out["z"][0])
        with torch.no_grad():
            gate = torch.sigmoid(self.blocks[2](y))
        hidden, _ = self.lstm((gate * y + self.blocks[2](y)).unsqueeze(0))
        return hidden[0] + self.table(torch.arange(6) % 3).sum(0)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, *, x):
        return {"y": self.a(x), "z": (self.b(x).relu_(), 3)}


def train_recalled(n, stage=3, **how):
    model = Recalled()
    if n:
        model = ShardedDataParallel(model, stage, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(4):
        loss = loss_of(model, step, torch.float64, n)
        (loss + loss_of(model, step + 1, torch.float64, n)).backward(retain_graph=step == 1)  # two forwards, then …
        if step == 1:
            (0.1 * loss).backward()  # … a second backward of one of them
        with torch.no_grad():
            model.eval()(rows_of(step, torch.float64))
            model.train()
        loss_of(model, step, torch.float64, n)  # a forward without a backward
        if n and step == 2:  # a forward, and a backward, that fail in the middle
            with pytest.raises(RuntimeError):
                model(torch.ones(3, 5, dtype=torch.float64))
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict() if n else model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_units_called_twice_dicts_and_failed_forwards(ranks, stage):
    def run():
        return train_recalled(4, stage), train_recalled(4, stage, prefetch=False, units=nn.Linear), train_recalled(None)

    for got, other, alone in ranks.run(run, quiet=True):
        close(got, alone, "by default")
        close(other, alone, "each Linear")


def train_unusual(name, n, **how):
    make, loss_of_batch = CASES[name]
    model = filled(make())
    if n:
        model = ShardedDataParallel(model, **how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(3):
        x = rows_of(step, torch.float64)
        loss_of_batch(model, x[dist.get_rank() :: n] if n else x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict() if n else model.state_dict()


@pytest.mark.parametrize("stage", STAGES)
def test_units_that_do_something_unusual(ranks, stage):
    ways = [{}, {"units": (Scaled, nn.Linear)}, *([{"prefetch": False}] if stage == 3 else ())]

    def run():
        alone = {name: train_unusual(name, None) for name in CASES}
        return alone, [(way, {name: train_unusual(name, 4, stage=stage, **way) for name in CASES}) for way in ways]

    for alone, results in ranks.run(run, quiet=True):
        for way, got in results:
            for name in CASES:
                close(got[name], alone[name], f"{name}, {way}")


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
        name.removeprefix("module."): gather_piece(p.grad, p) if n else p.grad for name, p in model.named_parameters()
    }


def test_a_gradient_penalty_is_right_at_stage_2_and_refused_at_stage_3(ranks):
    alone = ranks.run(penalised, None, 2, on=0)[0]
    for got in ranks.run(penalised, 4, 2, quiet=True):
        close(got, alone, "penalty")
    with refused("stage 3 cannot tell when a backward with create_graph"):
        ranks.run(penalised, 4, 3, quiet=True)


class Furnished(nn.Linear):
    """With buffers that gloo would not take as they are, a state of its own, and a note on a parameter."""

    def __init__(self):
        super().__init__(3, 4)
        rank = dist.get_rank()
        self.register_buffer("spread", torch.full((4, 1), float(rank)).expand(4, 3))
        self.register_buffer("gaps", torch.full((6,), float(rank))[::2])
        self.scale = nn.Parameter(torch.full((4, 1), 1.0 + rank).expand(4, 3), requires_grad=False)
        self.bias.note, self.said = "no decay", {"epoch": 1}

    def get_extra_state(self):
        return self.said

    def set_extra_state(self, state):
        self.said = state


def furnished(stage):
    model = Furnished()
    if stage == 1:
        ShardedOptimizer(model.parameters(), torch.optim.SGD)
        return [model.scale.tolist() == torch.ones(4, 3).tolist()]
    model = ShardedDataParallel(model, stage)
    state, shard = model.full_state_dict(), model.sharded_state_dict()
    found = [state[name].eq(want).all().item() for name, want in (("spread", 0), ("gaps", 0), ("scale", 1))]
    for load, saved in ((model.load_full_state_dict, state), (model.load_sharded_state_dict, shard)):
        model.module.said = None
        load(saved)
        found.append(model.module.said == {"epoch": 1})
    return [*found, model.module.bias.note == "no decay"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_any_buffers_extra_state_and_notes_on_parameters(ranks, stage):
    assert all(all(found) for found in ranks.run(furnished, stage, quiet=True))


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
        line = width * width + width * bias
        shards = [line // 4 + (r < line % 4) for r in range(4)]
        for r in range(4):
            calls = ("send", "all_to_all", "all_reduce")
            sent, chunks, rest = (more.bytes(call, r) - once.bytes(call, r) for call in calls)
            gather, reduce = 3 * shards[r], line - shards[r]
            if chunks:  # the short line is reduced in one call, which is given this rank's own chunk, too
                assert chunks == 4 * layers * line <= courier.ONE_CALL_BYTES
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
        most[0] = max(most[0], storages(line.line for line in model._lines))

    for layer in model.module:
        layer.register_forward_pre_hook(look)
        layer.register_full_backward_pre_hook(look)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, width, requires_grad=True)).sum().backward()
        optimizer.step()
    whole = [p for line in model._lines for p in line.whole]
    kinds = {
        "parameters": [*model.parameters(), *whole],
        "gradients": [p.grad for p in [*model.parameters(), *whole]] + [line.gradient for line in model._lines],
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
    lines = [line.line.untyped_storage() for line in model._lines]
    sizes = [sum(s.nbytes() for s in lines)]
    shapes = [p.shape for p in model.parameters()]
    out = model(torch.ones(2, 64))
    sizes.append(sum(s.nbytes() for s in lines))
    out.sum().backward()
    sizes.append(sum(s.nbytes() for s in lines))
    return sizes, shapes, [p.grad is None for line in model._lines for p in line.whole]


def test_stage_3_frees_after_use(ranks):
    for sizes, shapes, gone in ranks.run(freed):
        assert sizes == [0, 0, 0] and shapes == [(64 * 64 // 4,)] * 3 and all(gone)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 5))
def test_pieces_partition_every_parameter(sizes, n):
    """In one process: what n ranks would hold, by the same arithmetic."""
    from unittest import mock

    values = [torch.arange(float(size)) + 10 * i for i, size in enumerate(sizes)]
    found = [[] for _ in sizes]
    for rank in range(n):
        with (
            mock.patch("pardist_lib.mechanisms.sharded.flat_shards.rank_and_size", lambda _, rank=rank: (rank, n)),
            mock.patch("torch.distributed.broadcast"),
            mock.patch("torch.distributed.get_process_group_ranks", lambda _: range(n)),
            mock.patch("torch.distributed.group"),
        ):
            line = FlatShards([nn.Parameter(v.clone()) for v in values], sizes, None, keep_whole=rank % 2)
        assert abs(len(line.shard) - sum(sizes) / n) < 1
        for i, piece in enumerate(line.pieces):
            assert piece.sizes[rank] == len(piece) and sum(piece.sizes) == sizes[i]
            assert piece.numel() == 0 or piece.start == sum(piece.sizes[:rank])
            found[i].append(piece.detach())
    for parts, value in zip(found, values, strict=True):
        assert torch.equal(torch.cat(parts), value)


# ---- state dicts ----------------------------------------------------------------------------------------------


def cloned(state):
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state)


def saved_and_loaded(stage):
    def steps(model, optimizer, first, n):
        for step in range(first, first + 5):
            loss_of(model, step, torch.float64, n).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.full_state_dict() if n else model.state_dict()

    def start(n, stage=stage):
        model = Model(seed=7)
        model = ShardedDataParallel(model, stage) if n else model
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def from_full(n, stage=stage):
        model, optimizer = start(n, stage)
        model.load_full_state_dict(cloned(full))
        model.load_full_optimizer_state_dict(optimizer, cloned(full_optimizer))
        return steps(model, optimizer, 5, n)

    model, optimizer = start(4)
    steps(model, optimizer, 0, 4)
    full, full_optimizer = model.full_state_dict(), model.full_optimizer_state_dict(optimizer)
    shard, shard_optimizer = model.sharded_state_dict(), cloned(optimizer.state_dict())
    alone, optimizer = start(None)
    alone.load_state_dict(full)
    optimizer.load_state_dict(cloned(full_optimizer))
    expected = steps(alone, optimizer, 5, None)
    model, optimizer = start(4)
    model.load_sharded_state_dict(shard)
    optimizer.load_state_dict(shard_optimizer)
    found = [steps(model, optimizer, 5, 4), from_full(4), from_full(4, 5 - stage), in_world(3, from_full, 3)]
    return expected, found, list(full) == list(Model().state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_from_a_full_or_a_sharded_state_dict(ranks, stage):
    for rank, (expected, found, same_names) in enumerate(ranks.run(saved_and_loaded, stage, quiet=True)):
        assert same_names
        for got, how in zip(found, ("sharded", "full", "full, other stage", "full, three ranks"), strict=True):
            if got is not None or rank < 3:
                close(got, expected, how)


# ---- what is refused ------------------------------------------------------------------------------------------


class Reaches(nn.Module):
    """Uses a part's weight without calling the part; one element of it would fit, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.normal = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.linear(x) * self.normal.weight


def wrong(how):
    linear = nn.Linear(3, 3)
    if how in (1, 0, "3"):
        return ShardedDataParallel(linear, how)
    if how == "nothing":
        return ShardedDataParallel(nn.ReLU())
    if how == "frozen":
        return ShardedDataParallel(linear.requires_grad_(False))
    if how == "twice":
        return ShardedDataParallel(ShardedDataParallel(linear))
    if how == "inside":
        return ShardedDataParallel(nn.Sequential(ShardedDataParallel(linear)))
    if how == "again":
        ShardedDataParallel(linear)
        return ShardedDataParallel(linear)
    if how == "shapes":
        return ShardedDataParallel(nn.Linear(3, 3 + (dist.get_rank() == 1)))
    if how == "more":
        return ShardedDataParallel(nn.Linear(3, 3, bias=dist.get_rank() < 3))
    if how == "meta":
        return ShardedDataParallel(nn.Linear(3, 3, device="meta"))
    if how == "units":
        return ShardedDataParallel(linear, units=[nn.Linear(1, 1)])
    if how == "never called":
        return ShardedDataParallel(whole := nn.Sequential(nn.ModuleList([linear])), units=[whole[0]])
    if how == "not a member":
        return ShardedDataParallel(linear, 3, group_of([0, 1])).stage
    if how == "hidden":
        model = ShardedDataParallel(TakesObject(Slotted))
        return model(torch.ones(2, 6)).sum().backward()
    model = ShardedDataParallel(nn.Sequential(linear, nn.Linear(3, 3)))
    piece = next(model.parameters())
    if how == "reaches":
        return ShardedDataParallel(Reaches())(torch.ones(1, 4))
    if how == "copied":
        copy.deepcopy(model)
    if how == "hooked":
        piece.register_hook(lambda gradient: 2 * gradient)
    if how == "memory":
        piece.data = piece.data.clone()
    if how == "assigned":
        model.load_state_dict(model.state_dict(), assign=True)
    if how in ("hooked", "memory", "assigned"):
        model(torch.ones(1, 3))
    if how == "norm":
        model.clip_grad_norm_(1.0, norm_type=0)
    if how == "moved":
        model.double()
    if how == "unfrozen":
        next(model.parameters()).requires_grad_(False)
        model(torch.ones(1, 3))
    if how == "names":
        model.load_full_state_dict({"0.weight": torch.ones(3, 3)})
    if how == "a shape":
        model.load_full_state_dict({**model.full_state_dict(), "0.bias": torch.ones(4)})
    if how == "another rank's":
        model.load_sharded_state_dict({**model.sharded_state_dict(), "rank": 9})


@pytest.mark.parametrize(
    "how, said",
    [
        (1, "stage is 2 or 3, not 1: stage 1 is ShardedOptimizer"),
        (0, "stage is 2 or 3, not 0"),
        ("3", "stage is 2 or 3, not '3'"),
        ("nothing", "no parameter requires a gradient"),
        ("frozen", "no parameter requires a gradient"),
        ("twice", "this module is wrapped already"),
        ("inside", "this module is wrapped already"),
        ("again", "weight is a shard already: a model is wrapped once"),
        ("shapes", r"where rank 0 has weight, float32 \[3, 3\], rank 1 has weight, float32 \[4, 3\]"),
        ("more", r"where rank 0 has bias, float32 \[3\], rank 3 has nothing more"),
        ("meta", "weight is on the meta device: give it memory first"),
        ("units", "units are submodules of the module, or their class; Linear is not in it"),
        ("never called", "ModuleList never is: name its parts"),
        ("not a member", r"rank [23] is not in this group"),
        ("hidden", "before it was gathered: Returns returned a tensor where none is looked for"),
        ("reaches", "used in a forward without calling the unit.*units="),
        ("copied", "a wrapped model cannot be copied or pickled"),
        ("hooked", "0.weight has a hook of register_hook, which a shard never calls"),
        ("memory", "the memory of 0.weight was replaced after wrapping"),
        ("assigned", "weight of Linear was replaced after wrapping.*load_full_state_dict"),
        ("norm", "norm_type is a number above 0"),
        ("moved", "shards stay where they are: move or convert the model first"),
        ("unfrozen", "frozen or unfrozen after wrapping"),
        ("names", "these names are in one state dict only"),
        ("a shape", r"0.bias has shape \[4\], here it is \[3\]"),
        ("another rank's", "the shard of rank 9 of 4"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(ranks, how, said):
    with refused(said):
        ranks.run(wrong, how, quiet=True)


def integers():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_parameter("table", nn.Parameter(torch.arange(10), requires_grad=False))
    model = ShardedDataParallel(model, 3)
    model(torch.ones(1, 3)).sum().backward()
    return model.full_state_dict()["table"], model.table.shape if hasattr(model, "table") else model.module.table.shape


def test_frozen_integers_are_sharded_too(ranks):
    for rank, (whole, shape) in enumerate(ranks.run(integers)):
        assert torch.equal(whole, torch.arange(10)) and shape == (3 if rank < 2 else 2,)


def left_behind(stage):
    """The lines that are still in memory after a model was trained and dropped."""
    model = Model(torch.float32)
    if stage == 1:
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW)
        lines = [weakref.ref(line) for line in optimizer.lines]
    else:
        model = ShardedDataParallel(model, stage)
        optimizer = torch.optim.AdamW(model.parameters())
        lines = [weakref.ref(line) for line in model._lines]
    for step in range(2):
        loss_of(model, step, torch.float32, 4, False).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(line() is not None for line in lines)
    del model, optimizer
    gc.collect()
    return sum(line() is not None for line in lines)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_that_is_dropped_leaves_nothing_behind(ranks, stage):
    assert ranks.run(left_behind, stage) == [0] * 4
