"""Any table of actions, run by torch.distributed.pipelining's own runtime: a judge who does not know ours."""

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime, _validate_schedule
from torch.nn.functional import mse_loss

from ..exercises.watch import Seen


def run_by_torch(table, modules, x, target, loss):
    """One step on all ranks of the world. table: a CSV text, a line for each rank; modules: all stages', the same on
    every rank, of which this one computes its own; x, target: the batch, in micro-batches of equal size; loss: of a
    micro-batch, a mean.

    Returns (the loss, on the rank of the last stage, None elsewhere; {stage: [its parameters' gradients]} of this
    rank's stages). Raises what torch raises for a table that it cannot run.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    rows = {r: [_Action.from_str(cell) for cell in line.split(",")] for r, line in enumerate(table.splitlines())}
    m = 1 + max(action.microbatch_index for row in rows.values() for action in row)
    homes = _validate_schedule(rows, n, len(modules), m)  # loading alone accepts a table without a W
    own = [s for s in range(len(modules)) if homes[s] == rank]
    stages = [PipelineStage(modules[s], s, len(modules), torch.device("cpu")) for s in own]
    runtime = _PipelineScheduleRuntime(stages, m, loss_fn=loss)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "table.csv"
        file.write_text(table)
        runtime._load_csv(str(file))
    losses, last = [], len(modules) - 1 in own
    x, target = x.contiguous(), target.contiguous()  # before torch 2.13 it wants an input that lies in one piece
    runtime.step(*[x] if 0 in own else [], **{"target": target, "losses": losses} if last else {})
    mean = sum(one.item() for one in losses) / m if last else None
    return mean, {s: [p.grad for p in modules[s].parameters()] for s in own}


def compared(answer, table, m):
    """On a rank of an exercise's world: one step of a small network as the table says, against one process.

    Returns a Seen whose kept["gradients"] is [(name, torch's gradient, one process's), …] of this rank. `answer`, which
    has made the table already, is not called.
    """
    n, seen = dist.get_world_size(), Seen()
    torch.manual_seed(0)
    modules = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()).double() for _ in range(n)]
    x, target = torch.randn(2, 2 * m, 6, dtype=torch.float64)
    one = copy.deepcopy(modules)
    mse_loss(torch.nn.Sequential(*one)(x), target).backward()
    _, grads = run_by_torch(table, modules, x, target, mse_loss)
    seen.kept["gradients"] = [
        (f"stage {s}'s {name}", got, p.grad)
        for s, found in grads.items()
        for (name, p), got in zip(one[s].named_parameters(), found, strict=True)
    ]
    return seen
