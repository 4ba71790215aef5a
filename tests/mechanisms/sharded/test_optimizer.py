"""ShardedOptimizer (ZeRO-1): against one process and against torch's ZeroRedundancyOptimizer, to the byte."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist

from pardist_lib import RankError
from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.sharded import ShardedOptimizer, async_collectives
from tests.mechanisms.refusals import refused
from tests.mechanisms.sharded.cases import BATCH, OPTIMIZERS, Model, close, loss_of, rows_of, storages


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(4)


def trained(kind, n=None, steps=20, dtype=torch.float64, uneven=False, clip=None, **options):
    """The parameters after some steps on n ranks; on one process, with the plain optimizer, where n is None."""
    model = Model(dtype)
    if n and dist.get_rank():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)  # the first rank's values are the ones that count
    make, settings = OPTIMIZERS[kind]
    groups = [{"params": model.weights()}, {"params": model.others(), "weight_decay": 0.0}]
    optimizer = ShardedOptimizer(groups, make, **settings, **options) if n else make(groups, **settings)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
    for step in range(steps):
        loss_of(model, step, dtype, n, uneven).backward()
        if clip and n:
            norm = optimizer.clip_grad_norm_(clip)
        elif clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {**model.state_dict(), **({"norm": norm} if clip else {})}


def on_every_world(cases):
    """On a rank: what each case gives in worlds of 1 to 4 ranks, and what one process gives."""
    return [
        ([in_world(n, lambda: trained(*case[:1], n, **case[1])) for n in (1, 2, 3, 4)], trained(*case[:1], **case[1]))  # noqa: B023
        for case in cases
    ]


def check(ranks, cases):
    for rank, results in enumerate(ranks.run(on_every_world, cases, quiet=True)):
        for case, (worlds, alone) in zip(cases, results, strict=True):
            for n, got in enumerate(worlds, 1):
                if got is not None:
                    close(got, alone, f"{case} on rank {rank} of {n}")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twenty_steps_equal_one_process_on_the_whole_batch(ranks, kind):
    check(ranks, [(kind, {})])


def test_uneven_batches_clipping_float32_and_small_buckets(ranks):
    cases = [("AdamW", {"uneven": True}), ("SGD", {"clip": 0.3}), ("AdamW", {"clip": 0.1})]
    check(ranks, [*cases, ("SGD", {"dtype": torch.float32}), ("SGD", {"uneven": True})])
    in_small = ranks.run(trained, "AdamW", 4, bucket_mb=1e-4, quiet=True)
    close(in_small[0], ranks.run(trained, "AdamW", on=0, quiet=True)[0], "small buckets")


def beside_torchs(kind, averaged):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    models, (make, settings) = [Model(), Model()], OPTIMIZERS[kind]
    optimizers = [
        ShardedOptimizer(models[0].parameters(), make, reduce_gradients=not averaged, **settings),
        ZeroRedundancyOptimizer(models[1].parameters(), make, **settings),
    ]
    for step in range(20):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            loss_of(model, step, torch.float64, dist.get_world_size()).backward()
            for p in model.parameters() if i or averaged else ():
                if p.grad is not None:
                    dist.all_reduce(p.grad, dist.ReduceOp.AVG)
            optimizer.step()
            optimizer.zero_grad()
    return [model.state_dict() for model in models]


@pytest.mark.parametrize("averaged", [False, True])
def test_twenty_steps_equal_torchs_zero_redundancy_optimizer(ranks, averaged):
    for kind in ("SGD", "AdamW"):
        for ours, torchs in ranks.run(beside_torchs, kind, averaged, quiet=True):
            close(ours, torchs, kind)


def handled(n, how, overlap=True):
    """What people do to gradients between backward and step; every batch is cut in two for accumulation."""
    model = Model()
    settings = {"lr": 0.05, "momentum": 0.9}
    if n:
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, overlap=overlap, bucket_mb=5e-4, **settings)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **settings)
    for step in range(4):
        for micro in range(2 if how == "accumulated" else 1):
            loss_of(model, step + micro, torch.float64, n).backward()
        for p in model.parameters():
            if p.grad is not None and how == "scaled in place":
                p.grad *= 0.5
            elif p.grad is not None and how == "replaced":
                p.grad = p.grad * 0.5
            elif how == "taken away" and p.dim() == 1:
                p.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=how != "zeros")
        if how == "dropped":
            loss_of(model, step, torch.float64, n).backward()
            model.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("how", ["accumulated", "scaled in place", "replaced", "taken away", "zeros", "dropped"])
def test_gradients_are_the_callers_until_step(ranks, how):
    def run():
        return handled(4, how), handled(4, how, False), handled(None, how)

    for early, late, alone in ranks.run(run, quiet=True):
        close(early, alone, how)
        close(late, alone, f"{how}, without overlap")


def skipped(n, averaged=False):
    """A step whose gradient is not a number is skipped, and the model, not the optimizer, drops the gradients."""
    model = Model()
    settings = {"lr": 0.05, "momentum": 0.9}
    if n:
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, reduce_gradients=not averaged, **settings)
    else:
        optimizer = torch.optim.SGD(model.parameters(), **settings)
    for step in range(4):
        loss = loss_of(model, step, torch.float64, n)
        (loss * float("nan") if step == 1 else loss).backward()
        for p in model.parameters() if averaged else ():
            if p.grad is not None:
                dist.all_reduce(p.grad, dist.ReduceOp.AVG)
        norm = optimizer.clip_grad_norm_(0.1) if n else torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if norm.isfinite():
            optimizer.step()
        model.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("averaged", [False, True])
def test_a_step_that_is_skipped_after_clipping(ranks, averaged):
    close(ranks.run(skipped, 4, averaged, quiet=True)[2], ranks.run(skipped, None, on=0)[0], "skipped")


def failed(n):
    """The optimizer's own step fails once, in the third step, and the next batch comes."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if n:
        optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.05)
    for step in range(4):
        loss_of(model, step, torch.float64, n).backward()
        if n and step == 2:
            works, optimizer.inner.step = optimizer.inner.step, lambda: 1 / 0
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            optimizer.inner.step = works
        elif step != 2:
            optimizer.step()
        model.zero_grad()
    return model.state_dict()


def test_after_a_step_that_failed_the_next_one_is_right(ranks):
    close(ranks.run(failed, 4, quiet=True)[1], ranks.run(failed, None, on=0)[0], "failed")


# ---- what it sends and holds ----------------------------------------------------------------------------------


def one_step(sizes, reduce_gradients, warm):
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(size)) for size in sizes)
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, reduce_gradients=reduce_gradients)
    for _ in range(warm + 1):
        for p in model:
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.parametrize("sizes", [(200_000, 65_536), (61, 6), (2,), (200_003, 70_000)])
@pytest.mark.parametrize("reduces", [True, False])
def test_a_step_sends_what_an_all_reduce_sends(ranks, sizes, reduces):
    def sent(warm):
        trace = ranks.trace(one_step, sizes, reduces, warm)
        return [(trace.bytes("send", r), trace.bytes("all_to_all", r), trace.bytes(rank=r)) for r in range(4)]

    elements = sum(sizes)
    shards = [elements // 4 + (r < elements % 4) for r in range(4)]
    for r, (once, twice) in enumerate(zip(sent(1), sent(2), strict=True)):
        direct, chunks, everything = (b - a for a, b in zip(once, twice, strict=True))
        arrived = 4 * (elements - shards[r] + 3 * shards[r] * (reduces and not chunks))
        assert everything == direct + chunks + arrived, "a step makes other calls"
        if chunks:  # the short bucket is reduced in one call, which is given this rank's own chunk, too
            assert chunks == 4 * elements <= async_collectives.ONE_CALL_BYTES
            direct += chunks - 4 * shards[r]
        assert direct == 4 * (reduces * (elements - shards[r]) + 3 * shards[r])
        if elements % 4 == 0 and reduces:
            assert direct == 2 * 3 * 4 * elements // 4


def test_a_short_even_bucket_goes_by_torchs_own_calls(ranks):
    once, twice = (ranks.trace(one_step, (64, 16), True, warm) for warm in (0, 1))
    for r in range(4):
        calls = {op: twice.bytes(op, r) - once.bytes(op, r) for op in ("all_to_all", "all_gather", "send")}
        assert calls == {"all_to_all": 4 * 80, "all_gather": 4 * 80 // 4, "send": 0}


def held(width, make):
    model = torch.nn.Linear(width, width, bias=False)
    optimizer = ShardedOptimizer(model.parameters(), make, lr=1e-3)
    model(torch.ones(2, width)).sum().backward()
    optimizer.step()
    state = [v for s in optimizer.inner.state.values() for v in s.values() if v.dim()]
    return storages(model.parameters()), storages(p.grad for p in model.parameters()), storages(state)


def test_the_state_is_an_nth_and_the_rest_is_whole(ranks):
    for got in ranks.run(held, 32, torch.optim.AdamW):
        assert got == (4 * 1024, 4 * 1024, 8 * 1024 // 4)


# ---- state dicts ----------------------------------------------------------------------------------------------


def cloned(state):
    """A loaded state dict's tensors become the optimizer's own, and change with it."""
    return torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state)


def saved_and_loaded(kind):
    """Ten steps, save, ten more; and the last ten again from each kind of state dict, in other worlds too."""
    make, settings = OPTIMIZERS[kind]

    def steps(model, optimizer, first, n):
        for step in range(first, first + 10):
            loss_of(model, step, torch.float64, n).backward()
            optimizer.step()
            optimizer.zero_grad()

    def start(n, weights=None, full=None, shard=None):
        model = Model()
        if weights:
            model.load_state_dict(weights)
        optimizer = (
            ShardedOptimizer(model.parameters(), make, **settings) if n else make(model.parameters(), **settings)
        )
        if full and n:
            optimizer.load_full_state_dict(cloned(full))
        elif full or shard:
            optimizer.load_state_dict(cloned(full or shard))
        return model, optimizer

    model, optimizer = start(4)
    steps(model, optimizer, 0, 4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.param_groups[0]["lr"] = 0.005
    full, shard = optimizer.full_state_dict(), cloned(optimizer.state_dict())

    def rest(n, **state):
        model, optimizer = start(n, weights, **state)
        steps(model, optimizer, 10, n)
        return model.state_dict()

    one = rest(None, full=full)
    return one, [
        rest(4, shard=shard),
        rest(4, full=full),
        in_world(3, rest, 3),
        in_world(3, lambda: rest(3, full=full)),
    ]


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "NAdam", "Adagrad"])
def test_training_goes_on_from_a_full_or_a_sharded_state_dict(ranks, kind):
    for rank, (one, (shard, full, fresh, three)) in enumerate(ranks.run(saved_and_loaded, kind, quiet=True)):
        close(shard, one, "sharded")
        close(full, one, "full")
        if rank < 3:
            close(three, one, "full, on three ranks")
            with pytest.raises(AssertionError):
                close(fresh, one, "without any")


def added_frozen():
    model, frozen = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).requires_grad_(False)
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=1.0)
    optimizer.add_param_group({"params": frozen.parameters()})
    with pytest.raises(ValueError, match="a shard already"):
        optimizer.add_param_group({"params": [p for flat in optimizer.buckets for p in flat.local_shards]})
    before = model.bias.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return len(optimizer.param_groups), (before - model.bias).tolist()


def test_a_frozen_group_is_added_and_a_refused_one_leaves_nothing(ranks):
    assert ranks.run(added_frozen, quiet=True) == [(2, pytest.approx([1.0, 1.0, 1.0]))] * 4


def added_group(n):
    model = Model()
    first = list(model.first.parameters())
    others = [p for p in model.parameters() if all(p is not q for q in first)]
    make = (lambda ps: ShardedOptimizer(ps, torch.optim.AdamW, lr=0.01)) if n else torch.optim.AdamW
    optimizer = make(first) if n else make(first, lr=0.01)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": others, "lr": 0.02})
        loss_of(model, step, torch.float64, n).backward()
        optimizer.step(lambda: torch.tensor(1.0))
        optimizer.zero_grad()
    return model.state_dict()


def test_a_group_added_later(ranks):
    close(ranks.run(added_group, 4, quiet=True)[3], ranks.run(added_group, None, quiet=True)[0], "added group")


# ---- parameters that not every rank uses ----------------------------------------------------------------------


def some_use_it(n, find):
    models, settings = torch.nn.ModuleList(torch.nn.Linear(5, 3, dtype=torch.float64) for _ in range(3)), {"lr": 0.01}
    generator = torch.Generator().manual_seed(0)
    for p in models.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    make = torch.optim.AdamW
    optimizer = (
        ShardedOptimizer(models.parameters(), make, find_unused_parameters=find, **settings)
        if n
        else make(models.parameters(), **settings)
    )
    for step in range(6):
        mine = [dist.get_rank()] if n else range(4)
        x = rows_of(step, torch.float64)
        for r in mine:
            rows = x[r::4][:, :5]
            y = models[0](rows) if r % 2 == step % 2 else models[1](rows)
            (y.square().mean() / (1 if n else 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return models.state_dict()


def test_ranks_may_use_different_parameters_if_they_say_so(ranks):
    close(ranks.run(some_use_it, 4, True)[2], ranks.run(some_use_it, None, True)[0], "conditional")
    with pytest.raises(RankError, match=r"some ranks have a gradient for parameter \d.*find_unused_parameters=True"):
        ranks.run(some_use_it, 4, False)


def first_one_then_the_other():
    models = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    optimizer = ShardedOptimizer(models.parameters(), torch.optim.SGD)
    for model in models:
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()


def test_a_changing_set_of_used_parameters_is_named(ranks):
    with pytest.raises(RankError, match=r"parameter \d had a gradient in one step and none in another"):
        ranks.run(first_one_then_the_other)


# ---- what is refused ------------------------------------------------------------------------------------------


def wrong(how):
    linear, sgd = torch.nn.Linear(3, 3), torch.optim.SGD
    if how == "frozen":
        linear.requires_grad_(False)
    if how == "shapes":
        linear = torch.nn.Linear(3, 3 + (dist.get_rank() == 2))
    if how == "meta":
        linear = torch.nn.Linear(3, 3, device="meta")
    if how == "lazy":
        linear = torch.nn.LazyLinear(3)
    if how == "integers":
        linear.weight = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)
        linear.bias.requires_grad_(False)
    if how == "twice":
        sgd_of = ShardedOptimizer(linear.parameters(), sgd)
        return ShardedOptimizer([p for flat in sgd_of.buckets for p in flat.local_shards], sgd)
    optimizers = {name: getattr(torch.optim, name) for name in ("LBFGS", "Adafactor", "SparseAdam")}
    if how == "half made":
        optimizers[how] = functools.partial(sgd, lr=0.1)
    if how == "listed twice":
        return ShardedOptimizer([linear.weight, linear.bias, linear.weight], sgd)
    if how == "another model's":
        other = torch.nn.Linear(3, 4)
        adam = torch.optim.Adam(other.parameters())
        other(torch.ones(1, 3)).sum().backward()
        adam.step()
        return ShardedOptimizer(linear.parameters(), torch.optim.Adam).load_full_state_dict(adam.state_dict())
    if how == "a longer state":
        state = {"state": {5: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
        return ShardedOptimizer(linear.parameters(), sgd).load_full_state_dict(state)
    if how == "muon":
        optimizers["muon"] = type("Mine", (getattr(torch.optim, "Muon", torch.optim.LBFGS),), {})
    optimizer = ShardedOptimizer(linear.parameters(), optimizers.get(how, sgd), bucket_mb=0 if how == "bucket" else 25)
    if how == "copied":
        copy.deepcopy(optimizer)
    if how == "moved":
        linear.weight.data = linear.weight.data.clone()
    if how == "unfrozen":
        linear.bias.requires_grad_(False)
        optimizer = ShardedOptimizer(linear.parameters(), sgd)
        linear.bias.requires_grad_()
    if how == "sparse":
        table = torch.nn.Embedding(4, 3, sparse=True)
        optimizer = ShardedOptimizer(table.parameters(), sgd)
        table(torch.tensor([1])).sum().backward()
        optimizer.step()
    if how == "another rank's":
        state = optimizer.state_dict()
        optimizer.load_state_dict({**state, "world_size": 2})
    if how == "whole":
        optimizer.load_state_dict(optimizer.full_state_dict())
    if how == "a shard":
        optimizer.load_full_state_dict(optimizer.state_dict())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "how, said",
    [
        ("LBFGS", "LBFGS is not elementwise.*Use SGD, Adam"),
        ("Adafactor", "Adafactor is not elementwise"),
        ("SparseAdam", "SparseAdam is not elementwise"),
        ("muon", "(Muon|LBFGS) is not elementwise"),
        ("frozen", "no parameter requires a gradient: there is nothing to train"),
        ("integers", "no parameter requires a gradient"),
        ("shapes", r"where rank 0 has parameter 0, float32 \[3, 3\], rank 2 has parameter 0, float32 \[4, 3\]"),
        ("meta", "parameter 0 is on the meta device: give it memory first"),
        ("lazy", "parameter 0 has no shape yet: run one batch"),
        ("twice", "parameter 0 is a shard already"),
        ("bucket", "bucket_mb is a number of megabytes above 0"),
        ("half made", "optimizer_class is a class.*give its options by name"),
        ("listed twice", "a parameter is listed twice"),
        ("another model's", r"exp_avg of parameter 0 has shape \[4, 3\], and the parameter \[3, 3\]"),
        ("a longer state", "this state has parameter 5, and the optimizer has 2"),
        ("copied", "a ShardedOptimizer cannot be copied or pickled"),
        ("moved", "memory has been replaced since ShardedOptimizer was made"),
        ("unfrozen", "a parameter was unfrozen after ShardedOptimizer was made"),
        ("sparse", "the gradient of parameter 0 is sparse.*use sparse=False"),
        ("whole", "is whole, not one rank's shard: load_full_state_dict takes it"),
        ("a shard", "is one rank's shard: load_state_dict takes it"),
        ("another rank's", r"the shard of rank \d of 2, here is rank \d of 4: save full_state_dict"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(ranks, how, said):
    with refused(said):
        ranks.run(wrong, how, quiet=True)


def test_the_cases_cut_unevenly():
    sizes = [p.numel() for p in Model().parameters() if p.requires_grad]
    assert sum(sizes) % 2 and sum(sizes) % 3 and sum(sizes) % 4 and BATCH % 3 == 0
