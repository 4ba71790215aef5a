"""ShardedDataParallel that computes in 16 bits: against FSDP2's MixedPrecisionPolicy, one process, and to the byte."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.mechanisms.sharded import ShardedDataParallel
from tests.mechanisms.refusals import refused
from tests.mechanisms.sharded.cases import flat_parameters, storages

STAGES = [2, 3]
LOW, FULL = torch.bfloat16, torch.float32
POLICIES = [(LOW, None), (LOW, FULL), (torch.float16, FULL), (None, LOW)]


class Awkward(nn.Module):
    """Lengths that no number of ranks divides, a tied weight, a frozen layer, one nobody uses, a buffer of float32, a
    keyword, integers, and a table of frozen ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again, self.middle = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 7)
        self.frozen, self.unused, self.table = nn.Linear(7, 7), nn.Linear(3, 3), nn.Embedding(5, 7)
        self.again.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.full((7,), 1 / 3))
        self.seen = None

    def forward(self, x, *, words, factor):
        y = torch.tanh(self.middle(torch.tanh(self.first(x)))) + self.table(words)
        self.seen = str(x.dtype), str(factor.dtype), str(words.dtype), str(y.dtype), str(self.shift.dtype)
        return (self.frozen(y) * factor).float() + self.shift + self.again(x)


def inputs(step, rank=None, n=None):
    rank, n = (dist.get_rank(), dist.get_world_size()) if n is None else (rank, n)
    generator = torch.Generator().manual_seed(step)
    x, factor = torch.randn(24, 5, generator=generator), torch.randn(24, 7, generator=generator)
    words = torch.arange(24) % 5
    return (x[rank::n],), {"words": words[rank::n], "factor": factor[rank::n]}


def stepped(model, steps, micro):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    outputs = []
    for step in range(steps):
        for i in range(micro):
            args, kwargs = inputs(step + i)
            outputs.append(model(*args, **kwargs))
            (outputs[-1].square().mean() / micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def beside_fsdp2(stage, compute, reduce, micro):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ours, theirs = Awkward(), Awkward()
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=True)
    for part in (theirs.middle, theirs.frozen, theirs):
        fully_shard(part, mp_policy=policy)
    units = [ours.middle, ours.frozen]
    wrapped = ShardedDataParallel(ours, stage, units=units, compute_dtype=compute, reduce_dtype=reduce)
    outputs = [stepped(model, 4, micro) for model in (wrapped, theirs)]
    torchs = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in theirs.state_dict().items()}
    gap = max((a - b).abs().max().item() for a, b in zip(*outputs, strict=True))
    whole = wrapped.full_state_dict()
    kinds = {str(p.dtype) for p in wrapped.parameters()}
    return gap, {k: (whole[k] - v).abs().max().item() for k, v in torchs.items()}, ours.seen, theirs.seen, kinds


@pytest.mark.parametrize("compute, reduce", POLICIES, ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_steps_equal_fsdp2s_with_the_same_policy(ranks_of, stage, compute, reduce):
    for n, micro, most in ((2, 1, 1e-6), (2, 2, 1e-6), (3, 2, 1e-3)):  # three ranks' 16 bits add up in another order
        for output, gaps, seen, theirs, kinds in ranks_of(n).run(
            beside_fsdp2, stage, compute, reduce, micro, quiet=True
        ):
            assert seen == theirs and kinds == {"torch.float32"}
            assert output <= 3 * most and max(gaps.values()) <= most, (n, micro, gaps)


# ---- one process ----------------------------------------------------------------------------------------------


def alone(dtype, n, steps=4):
    """float32 weights that are cast for each step, n ranks' rows one after the other, gradients added up in float32."""
    model = Awkward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        low = copy.deepcopy(model)
        for p in low.parameters():
            p.data = p.data.to(dtype)
        for r in range(n):
            (x,), how = inputs(step, r, n)
            low(x.to(dtype), words=how["words"], factor=how["factor"].to(dtype)).square().mean().backward()
            for p, q in zip(model.parameters(), low.parameters(), strict=True):
                if q.grad is not None:
                    p.grad = q.grad.float() / n + (0 if p.grad is None else p.grad)
                    q.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def all_ways(dtype):
    found = {}
    for how in (
        {"stage": 2},
        {"stage": 3},
        {"stage": 3, "units": []},
        {"stage": 3, "overlap": False},
        {"stage": 3, "reshard_after_forward": False},
        {"stage": 2, "find_unused_parameters": True},
    ):
        model = ShardedDataParallel(Awkward(), **how, compute_dtype=dtype, reduce_dtype=torch.float32)
        stepped(model, 4, 1)
        found[str(how)] = model.full_state_dict()
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_steps_equal_one_process_that_casts_its_weights(ranks_of, n):
    expected = alone(LOW, n)
    for found in ranks_of(n).run(all_ways, LOW, quiet=True):
        for how, state in found.items():
            for name, value in expected.items():
                gap = (state[name] - value).abs().max().item()
                assert gap < 2e-4, f"{how}: {name} is off by {gap}"  # a step of AdamW is 1e-2


# ---- what it holds and sends ----------------------------------------------------------------------------------


def kept(stage):
    """The whole state is float32's, to the bit, before and after it is loaded; bytes of what a rank holds."""
    model, plain = (
        ShardedDataParallel(nn.Linear(64, 65, bias=False), stage, compute_dtype=LOW),
        nn.Linear(64, 65, False),
    )
    dist.broadcast(plain.weight.data, 0)
    model.load_full_state_dict({"weight": plain.weight.data})
    same = torch.equal(model.full_state_dict()["weight"], plain.weight)
    x = torch.randn(2, 64)
    y = model(x)
    same = same and torch.equal(y, nn.functional.linear(x.to(LOW), plain.weight.to(LOW)))
    y.float().sum().backward()
    shard = next(model.parameters())
    flats = flat_parameters(model)
    whole = storages([flat.unsharded for flat in flats])
    return same, y.dtype == LOW, shard.nbytes, shard.grad.nbytes, shard.grad.dtype == FULL, whole


@pytest.mark.parametrize("stage", STAGES)
def test_the_shards_stay_float32_and_what_computes_is_half_as_long(ranks_of, stage):
    for same, low, shard, gradient, full, whole in ranks_of(4).run(kept, stage, quiet=True):
        assert same and low and full
        assert shard == gradient == 4 * 64 * 65 // 4 and whole == (2 * 64 * 65 if stage == 2 else 0)


WIDTH, LAYERS = 760, 2  # over a megabyte also in 16 bits: sent and received, not moved in one call


def some_steps(steps, how):
    model = ShardedDataParallel(nn.Sequential(*[nn.Linear(WIDTH, WIDTH, False) for _ in range(LAYERS)]), **how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("reduce, width", [(None, 2), (FULL, 4)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_gathers_half_the_bytes(ranks_of, stage, reduce, width):
    how = {"stage": stage, "compute_dtype": LOW, "reduce_dtype": reduce}
    once, more = (ranks_of(4).trace(some_steps, steps, how) for steps in (1, 3))
    part = LAYERS * WIDTH * WIDTH * 3 // 4  # elements that a rank sends in a gather, and in a reduce-scatter
    for r in range(4):
        assert more.bytes("send", r) - once.bytes("send", r) == 2 * part * ((stage - 1) * 2 + width)


def wrong(which):
    ShardedDataParallel(nn.Linear(3, 3), **which)


@pytest.mark.parametrize("which", [{"compute_dtype": "bfloat16"}, {"compute_dtype": torch.int8}, {"reduce_dtype": 16}])
def test_what_is_no_precision_is_refused(ranks_of, which):
    with refused(f"{next(iter(which))} is floating point, torch.bfloat16 say, or None, not"):
        ranks_of(4).run(wrong, which, quiet=True)
