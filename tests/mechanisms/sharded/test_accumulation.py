"""Several micro-batches to a step, in no_sync and no_reshard: against one process, FSDP2, and the formulas."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.sharded import ShardedDataParallel
from tests.mechanisms.sharded.cases import OPTIMIZERS, Model, close, flat_parameters, loss_of, storages

STAGES = [2, 3]
WAYS = [(), ("no_sync",), ("no_reshard",), ("no_sync", "no_reshard")]


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(4)


@contextlib.contextmanager
def all_but_the_last(model, ways, i, micro):
    with contextlib.ExitStack() as stack:
        for way in ways if i < micro - 1 else ():
            stack.enter_context(getattr(model, way)())
        yield


def trained(kind, n=None, ways=(), micro=3, steps=6, uneven=False, at_first=False, **how):
    """Parameters after some steps, on one process where n is None. at_first: the scale is used in the first micro-batch
    only."""
    model, (make, options) = Model(), OPTIMIZERS[kind]
    model = ShardedDataParallel(model, **how) if n else model
    optimizer = make(model.parameters(), **options)
    inner = model.module if n else model
    for step in range(steps):
        for i in range(micro):
            inner.forward = (lambda x: Model.forward(inner, x).detach() + inner.again(x)) if at_first and i else None
            if inner.forward is None:
                del inner.forward
            with all_but_the_last(model, ways, i, micro):
                (loss_of(model, 10 * step + i, torch.float64, n, uneven) / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.full_state_dict() if n else model.state_dict()


def on_every_world(cases):
    for kind, ways, how in cases:
        alone = trained(kind, **{k: v for k, v in how.items() if k in ("micro", "at_first")})
        for n in (1, 2, 3, 4):
            got = in_world(n, lambda n=n: trained(kind, n, ways, **how))  # noqa: B023
            if got is not None:
                close(got, alone, f"{kind} {ways} {how} on {n} ranks")
    return True


@pytest.mark.share(4)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ways", WAYS, ids=" ".join)
def test_micro_batches_equal_one_process(ranks, stage, ways):
    cases = [("SGD", ways, {}), ("AdamW", ways, {"micro": 1}), ("AdamW", ways, {"uneven": True})]
    first = {"at_first": True, "find_unused_parameters": "no_sync" not in ways}  # what counts is the sum's
    cases += [("SGD", ways, {"find_unused_parameters": True}), ("AdamW", ways, first)]
    cases += [("SGD", ways, {"overlap": False, "prefetch": False}), ("SGD", ways, {"units": []})]
    assert all(ranks.run(on_every_world, [(k, w, {"stage": stage, **how}) for k, w, how in cases], quiet=True))


# ---- FSDP2 ----------------------------------------------------------------------------------------------------


def beside_fsdp2(ways, stage, micro, compute, reduce):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def fresh():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))

    theirs, policy = fresh(), MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    for part in (*theirs[::2], theirs):
        fully_shard(part, mp_policy=policy)
    ours = ShardedDataParallel(fresh(), stage, compute_dtype=compute, reduce_dtype=reduce)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    n = dist.get_world_size()
    for step in range(5):
        for i in range(micro):
            with all_but_the_last(ours, ways, i, micro):
                loss_of(ours, 10 * step + i, torch.float32, n).backward()
            theirs.set_requires_gradient_sync("no_sync" not in ways or i == micro - 1)
            theirs.set_reshard_after_backward("no_reshard" not in ways or i == micro - 1)
            loss_of(theirs, 10 * step + i, torch.float32, n).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    whole = ours.full_state_dict()
    return max((v.full_tensor() - whole[k]).abs().max().item() for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("compute, reduce", [(None, None), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_it_equals_fsdp2(ranks_of, stage, compute, reduce):
    """Two ranks: more add up in another order. With bfloat16 the sum is kept in reduce_dtype, by FSDP2 too."""
    for ways in WAYS:
        assert max(ranks_of(2).run(beside_fsdp2, ways, stage, 4, compute, reduce, quiet=True)) < 1e-6, ways


# ---- bytes and memory -----------------------------------------------------------------------------------------

WIDTH = 512  # units of more than 1 MiB, which are sent and received


def some_steps(steps, ways, micro, stage):
    torch.manual_seed(0)
    model = ShardedDataParallel(nn.Sequential(nn.Linear(WIDTH, WIDTH + 4, bias=False),
                                              nn.Linear(WIDTH + 4, WIDTH + 4, bias=False)), stage)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        for i in range(micro):
            with all_but_the_last(model, ways, i, micro):
                model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


HALVES = {  # (gathers, reductions) in a step of m micro-batches
    (2, ()): lambda m: (m, m),
    (2, ("no_sync",)): lambda m: (1, 1),
    (2, ("no_reshard",)): lambda m: (1, m),
    (2, ("no_sync", "no_reshard")): lambda m: (1, 1),
    (3, ()): lambda m: (2 * m, m),
    (3, ("no_sync",)): lambda m: (2 * m, 1),
    (3, ("no_reshard",)): lambda m: (1 if m > 1 else 2, m),
    (3, ("no_sync", "no_reshard")): lambda m: (1 if m > 1 else 2, 1),
}


@pytest.mark.parametrize("stage, ways", HALVES, ids=str)
def test_a_step_sends_the_formulas_bytes(ranks, stage, ways):
    for micro in (1, 2, 4):
        two, three = (ranks.trace(some_steps, steps, ways, micro, stage) for steps in (2, 3))
        size = 4 * (WIDTH * (WIDTH + 4) + (WIDTH + 4) ** 2)
        for r in range(4):
            sent = three.bytes("send", r) - two.bytes("send", r)
            assert sent == sum(HALVES[stage, ways](micro)) * 3 * size // 4, (micro, r)


def held_between(stage, ways, reduce=None):
    """Bytes of whole parameters, whole gradients and local shards' gradients between two micro-batches and after."""
    model = ShardedDataParallel(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))), stage,
                                reduce_dtype=reduce)  # fmt: skip
    seen = []
    for i in range(2):
        with all_but_the_last(model, ways, i, 2):
            model(torch.ones(2, 64)).sum().backward()
        flats = flat_parameters(model)
        whole, gradients = [flat.unsharded for flat in flats], [flat.gradient for flat in flats]
        seen.append([storages(whole), storages(gradients), storages(p.grad for p in model.parameters())])
    return seen


@pytest.mark.parametrize("stage, ways", HALVES, ids=str)
def test_memory_between_micro_batches_and_after(ranks, stage, ways):
    psi = 4 * 4 * 64 * 64  # bytes
    for reduce, times in ((None, 1), (torch.float64, 2)):
        for between, after in ranks.run(held_between, stage, ways, reduce):
            whole = psi if stage == 2 or "no_reshard" in ways else 0
            sums = (times * psi, 0) if "no_sync" in ways else (0, psi // 4)
            assert between == [whole, *sums]
            assert after == [psi if stage == 2 else 0, 0, psi // 4]


# ---- what else a loop may do between two micro-batches ---------------------------------------------------------


def interrupted(stage):
    """Each line: what was computed, and what it has to be."""
    model = ShardedDataParallel(nn.Linear(3, 2, bias=False).double(), stage)
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.5), torch.ones(1, 3, dtype=torch.float64)
    weight = lambda: model.full_state_dict()["weight"]  # noqa: E731
    pairs = []

    with model.no_reshard():  # an optimizer steps where nobody expects it
        model(x).sum().backward()
        optimizer.step()
        pairs.append((model(x), x @ weight().T))
        with torch.no_grad():
            for p in model.parameters():
                p.data.add_(1.0)
        model.refresh()
        pairs.append((model(x), x @ weight().T))
    with torch.no_grad():  # an evaluation frees what was held
        pairs.append((model(x), x @ weight().T))
    pairs.append((storages(f.unsharded for f in flat_parameters(model)), 48 if stage == 2 else 0))

    optimizer.zero_grad()
    with model.no_sync():
        model(x).sum().backward()
        y = x.clone().requires_grad_()
        [of_input] = torch.autograd.grad(model(y).sum(), y)  # neither reduces nor adds
        with contextlib.suppress(ZeroDivisionError):
            model(x * (1 // (len(x) - 1)))  # a forward that fails leaves the sum
    pairs.append((of_input, weight().sum(0, keepdim=True)))
    pairs.append((all(p.grad is None for p in model.parameters()), True))
    before = weight()
    model(2 * x).sum().backward()
    optimizer.step()
    pairs.append((weight(), before - 0.5 * 3.0))
    return pairs


@pytest.mark.parametrize("stage", STAGES)
def test_what_else_may_come_in_between(ranks, stage):
    for pairs in ranks.run(interrupted, stage, quiet=True):
        for i, (got, expected) in enumerate(pairs):
            assert torch.equal(torch.as_tensor(got), torch.as_tensor(expected)) or torch.allclose(got, expected), i


def failed_backward(stage):
    model = ShardedDataParallel(nn.Linear(2, 2, bias=False), stage)
    x = torch.ones(1, 2)

    def fail(_):
        raise ArithmeticError

    with model.no_sync(), model.no_reshard():
        model(x).sum().backward()
        y = model(x)
        y.register_hook(fail)
        with contextlib.suppress(ArithmeticError):
            y.sum().backward()
    model(x).sum().backward()
    return torch.cat([p.grad for p in model.parameters()]).tolist()


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_backward_that_fails_the_next_one_is_right(ranks, stage):
    for gradient in ranks.run(failed_backward, stage, quiet=True):
        assert set(gradient) <= {1.0, 2.0}
