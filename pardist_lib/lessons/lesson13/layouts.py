"""One training step of a small GPT in any layout that a few ranks can run: what a plan's prediction is held against.

Data, tensor and ZeRO parallelism are the course's own mechanisms; pipelines are torch.distributed.pipelining's.
"""

import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.measure.costs import Transformer, check, micro_batches
from pardist_lib.mechanisms.collectives import direct_all_gather, direct_reduce_scatter
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.sharded import ShardedDataParallel, ShardedOptimizer
from pardist_lib.mechanisms.tensor_parallel import parallelize
from pardist_lib.mechanisms.tensor_parallel.vocabulary import vocab_parallel_cross_entropy

from ..transformer import GPT, TENSOR_PARALLEL, language_loss, sequence_parallel_plan
from ..worlds import group_of


def described(width, layers, heads, vocabulary, length):
    """The `Transformer` that a GPT of these sizes is: no dropout, the table of tokens tied to the output layer."""
    return Transformer(width, layers, heads, vocabulary, length, dropout=False, fused=True)


def runnable(plan, batch):
    """Whether `make_step` can run a plan: no tp with pp or with ZeRO-2 and 3; pipelines as 1F1B, one micro-batch or
    more for each stage."""
    one = plan.cp == plan.ep == plan.v == 1 and plan.recompute == "none"
    pipes = plan.pp == 1 or plan.tp == 1 and plan.zero == 0 and micro_batches(plan, batch) >= plan.pp
    return one and pipes and (plan.tp == 1 or plan.zero < 2)


def possible(model, plan, batch):
    """Whether `make_step` can run a plan with this model, whose heads and layers have to be dealt out as well."""
    try:
        check(model, plan, batch)
    except ValueError:
        return False
    return runnable(plan, batch)


def groups_of(plan):
    """(tensor-, data-, pipeline-parallel) group of this rank, laid out as the planner does. All ranks call it."""
    rank, mine = dist.get_rank(), {}
    t, d = plan.tp, plan.dp
    sets = {
        "tensor": [range(first, first + t) for first in range(0, plan.gpus, t)],
        "data": [range(stage + i, stage + t * d, t) for stage in range(0, plan.gpus, t * d) for i in range(t)],
        "pipeline": [range(i, plan.gpus, t * d) for i in range(t * d)],
    }
    for axis, members in sets.items():
        for group in map(tuple, members):
            made = group_of(group)
            if rank in group:
                mine[axis] = made
    return mine["tensor"], mine["data"], mine["pipeline"]


class Ends(nn.Module):
    """What the first and the last stage of a pipeline have besides blocks; `parts` in the order of forward."""

    def __init__(self, whole, first, last, blocks):
        super().__init__()
        parts = [whole.tokens, whole.positions] if first else []
        parts += list(whole.blocks[blocks.start : blocks.stop])
        if last:
            parts += [whole.norm, whole.head]
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


@dataclass
class Training:
    """step() does one training step with AdamW and returns the mean loss of this rank's rows, if it has the loss;
    weights: the parameters that forward uses (module's own may be pieces of them)."""

    step: callable
    module: nn.Module
    optimizer: torch.optim.Optimizer
    weights: list


def make_step(model, plan, batch, seed=0):
    """On a rank: the `Training` of a `Transformer` under a plan that is `runnable`, on `batch` seeded sequences."""
    check(model, plan, batch)
    if not runnable(plan, batch):
        raise ValueError(f"{plan} cannot be run here: {runnable.__doc__.partition(': ')[2]} No cp, ep, v, recompute.")
    gc.collect()  # what an earlier training held: its hooks and its pipeline refer to each other in circles
    torch.manual_seed(seed)
    tensor, data, pipeline = groups_of(plan)
    whole = GPT(model.vocab, model.hidden, model.heads, model.layers, model.sequence)
    text = torch.randint(model.vocab, (batch, model.sequence + 1))
    replica, many = dist.get_rank(data), batch // plan.dp
    tokens, words = (text[replica * many :][:many, i : i + model.sequence].contiguous() for i in (0, 1))
    if plan.pp > 1:
        return _pipelined(model, plan, whole, (data, pipeline), tokens, words, micro_batches(plan, batch))
    loss_of = language_loss
    if plan.tp > 1:
        parallelize(whole, sequence_parallel_plan(False) if plan.sp else TENSOR_PARALLEL, tensor)

        def loss_of(logits, words):
            return vocab_parallel_cross_entropy(logits.flatten(0, 1), words.flatten(), tensor)

    m, module, weights = micro_batches(plan, batch), whole, list(whole.parameters())
    if plan.dp > 1 and plan.zero == 0:
        module = DataParallel(whole, data)
    elif plan.dp > 1 and plan.zero > 1:
        module = ShardedDataParallel(whole, plan.zero, data, units=[*whole.blocks])
    if plan.dp > 1 and plan.zero == 1:
        optimizer = ShardedOptimizer(whole.parameters(), torch.optim.AdamW, data)
    else:
        optimizer = torch.optim.AdamW(module.parameters())
    parts = list(zip(tokens.chunk(m), words.chunk(m), strict=True))

    def step():
        optimizer.zero_grad()
        total = 0.0
        for i, (x, y) in enumerate(parts):
            quiet = plan.zero == 0 and plan.dp > 1 and i < m - 1
            with module.no_sync() if quiet else nullcontext():
                loss = loss_of(module(x), y) / m
                loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return Training(step, module, optimizer, weights)


def _pipelined(model, plan, whole, groups, tokens, words, m):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    data, pipeline = groups
    stage, each = dist.get_rank(pipeline), model.layers // plan.pp
    first, last = stage == 0, stage == plan.pp - 1
    module = Ends(whole, first, last, range(stage * each, (stage + 1) * each))
    if last:  # the tied table is on two stages: a copy here, whose gradients are added up
        whole.head.weight = nn.Parameter(whole.tokens.weight.detach().clone())
    table = whole.tokens.weight if first else whole.head.weight if last else None
    ends = [group_of(dist.get_process_group_ranks(pipeline)[:: plan.pp - 1])] if plan.dp == 1 else _ends(plan)
    inner = PipelineStage(module, stage, plan.pp, tokens.device, group=pipeline)
    schedule = Schedule1F1B(inner, m, loss_fn=language_loss)
    optimizer = torch.optim.AdamW(module.parameters())
    inputs, target = ((tokens,) if first else ()), ({"target": words} if last else {})

    def step():
        optimizer.zero_grad()
        losses = []
        schedule.step(*inputs, losses=losses, **target) if last else schedule.step(*inputs)
        if table is not None:
            dist.all_reduce(table.grad, group=ends[0])
        if plan.dp > 1:
            flat = torch.cat([p.grad.flatten() for p in module.parameters()])
            dist.all_reduce(flat, group=data)
            nn.utils.vector_to_parameters(flat.div_(plan.dp), [p.grad for p in module.parameters()])
        optimizer.step()
        return sum(x.item() for x in losses) / m if last else None

    return Training(step, module, optimizer, list(module.parameters()))


def _ends(plan):
    """The group of first and last stage of this rank's pipeline; every rank makes all of them."""
    mine = None
    for i in range(plan.dp):
        made = group_of((i, i + (plan.pp - 1) * plan.dp))
        if dist.get_rank() % plan.dp == i:
            mine = made
    return [mine]


def seconds_of(model, plan, batch, repeats=7):
    """On a rank: seconds of `repeats` steps, each from barrier to barrier."""
    step = make_step(model, plan, batch).step
    step(), step()
    times = []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - began)
    return times


def _reduce_scatter(tensor, group):
    direct_reduce_scatter(tensor, group=group)


def _all_gather(tensor, group):
    whole = torch.empty_like(tensor)
    direct_all_gather(tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)], out=whole, group=group)


OPERATIONS = {"reduce_scatter": _reduce_scatter, "all_gather": _all_gather}  # what ZeRO's stages send with, long lines


def memory_of(model, plan, batch):
    """On a rank: {"parameters", "gradients", "optimizer", "activations"}: bytes of the tensors' storages, each once.

    Activations: what autograd keeps for backward, at its fullest: of all micro-batches that are under way at once.
    Parameters and gradients: what the optimizer steps on, after a step.
    """
    training = make_step(model, plan, batch)
    training.step()
    with Kept(training.weights) as kept:
        training.step()
    parameters = list(training.module.parameters())
    states = getattr(training.optimizer, "inner", training.optimizer).state.values()
    return {
        "parameters": storages(parameters),
        "gradients": storages(p.grad for p in parameters),
        "optimizer": storages(v for state in states for v in state.values() if v.dim()),
        "activations": kept.most,
    }


def storages(tensors):
    """Bytes of the memory behind tensors, each block once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Inside, `most` becomes the most bytes that autograd keeps for backward at one moment, `weights` left out."""

    def __init__(self, weights=()):
        self.own = {p.untyped_storage()._cdata for p in weights}
        self.now = self.most = 0
        self.holders = {}
        super().__init__(self._pack, lambda held: held.tensor if isinstance(held, _Held) else held)

    def __enter__(self):
        super().__enter__()
        return self

    def _pack(self, tensor):
        return tensor if tensor.untyped_storage()._cdata in self.own else _Held(self, tensor)


class _Held:
    """A kept tensor: its memory counts until the last one that shares it has gone."""

    def __init__(self, kept, tensor):
        memory = tensor.untyped_storage()
        self.kept, self.tensor, self.key, self.size = kept, tensor, memory._cdata, memory.nbytes()
        if kept.holders.setdefault(self.key, 0) == 0:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)
        kept.holders[self.key] += 1

    def __del__(self):
        self.kept.holders[self.key] -= 1
        if not self.kept.holders[self.key]:
            self.kept.now -= self.size
