"""The same layers with the same table in torch.distributed.pipelining."""

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from pardist_lib.mechanisms.group import split_sizes


def torchs_stages(layers, schedule, group=None):
    """[PipelineStage] of this rank, of equally many layers, as ours."""
    sizes, rank, first, stages = split_sizes(len(layers), schedule.stages), dist.get_rank(group), 0, []
    for stage, size in enumerate(sizes):
        if schedule.rank_of[stage] == rank:
            part = nn.Sequential(*layers[first : first + size])
            stages.append(PipelineStage(part, stage, schedule.stages, torch.device("cpu"), group=group))
        first += size
    return stages


def torchs_pipeline(layers, schedule, loss, group=None):
    """A function (x, target) → loss on the last stage's rank, None elsewhere, that does one step of torch's runtime."""
    stages = torchs_stages(layers, schedule, group)
    runtime = _PipelineScheduleRuntime(stages, schedule.micro_batches, loss_fn=loss)
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write(str(schedule))
        file.flush()
        runtime._load_csv(file.name)
    return stepper(runtime, schedule, group)


def stepper(runtime, schedule, group=None):
    rank, home = dist.get_rank(group), schedule.rank_of

    def step(x, target):
        losses = [] if rank == home[-1] else None
        at_end = {"target": target, "losses": losses} if rank == home[-1] else {}
        runtime.step(*[x] * (rank == home[0]), **at_end, return_outputs=False)
        return sum(losses).detach() / len(losses) if losses else None

    return step
