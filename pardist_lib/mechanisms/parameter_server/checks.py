"""What a parameter server refuses, because training would silently go wrong, or hang."""

import operator

import torch
import torch.distributed as dist

from ..collectives.agreement import compare, described, named_tensors
from ..group import check_optimizer


def check_arguments(ps):
    """Raise ValueError for arguments of `ParameterServer` that do not go together."""
    if not ps.workers:
        raise ValueError("a parameter server needs a group of at least two ranks: one serves, the others work")
    if "cpu:gloo" not in dist.get_backend_config(ps.group):
        raise ValueError('a parameter server needs gloo: init_process_group("cpu:gloo,cuda:nccl") has both')
    if not ps.parameters:
        raise ValueError("this module has no parameter that requires a gradient: there is nothing to train")
    check_optimizer(ps.module, ps.optimizer)
    if ps.push not in ("gradients", "parameters"):
        raise ValueError(f'push is "gradients" or "parameters", not {ps.push!r}')
    if ps.synchronous and (ps.staleness is not None or ps.schedule is not None):
        raise ValueError("staleness and schedule are for synchronous=False: a synchronous server waits for all")
    if ps.staleness is not None and (not isinstance(ps.staleness, int) or ps.staleness < 0):
        raise ValueError(f"staleness is a number of steps, 0 or more, or None, not {ps.staleness!r}")
    if wrong := [r for r in ps.schedule or () if r not in ps.workers]:
        raise ValueError(f"the schedule names rank {wrong[0]}: the workers are {ps.workers}")


def check_same_module(ps):
    """Raise ValueError, on every rank, where the ranks' modules differ. As `agreement.check_same_model`, but by send
    and receive: workers describe their modules to the server and hear from it what all of them said."""
    mine = described(named_tensors(ps.module))
    everyone = [mine] * (len(ps.workers) + 1)
    if ps.serving:
        for worker in ps.workers:
            dist.recv_object_list(heard := [None], group=ps.group, group_src=worker)
            everyone[worker] = heard[0]
        for worker in ps.workers:
            dist.send_object_list([everyone], group=ps.group, group_dst=worker)
    else:
        dist.send_object_list([mine], group=ps.group, group_dst=ps.server)
        dist.recv_object_list(heard := [None], group=ps.group, group_src=ps.server)
        everyone = heard[0]
    compare(everyone, ps.group)


def check_step(ps, rows):
    """Raise RuntimeError where this rank may not call step(), ValueError where `rows` is not a number of rows."""
    if ps.serving:
        raise RuntimeError(f"rank {ps.rank} is the server: it calls serve(), step() is for the workers")
    if isinstance(rows, torch.Tensor) or not hasattr(rows, "__index__") or operator.index(rows) < 0:
        raise ValueError(f"rows is how many rows this gradient is the mean over, 0 or more, not {rows!r}")
    if not ps.at_work:
        raise RuntimeError(f"rank {ps.rank} has left the server: no step after leave()")


def check_serve(ps):
    """Raise RuntimeError where this rank may not call serve()."""
    if not ps.serving:
        raise RuntimeError(f"rank {ps.rank} is a worker: it calls step(), rank {ps.server} serves")
    if not ps.at_work:
        raise RuntimeError("this server has served, its workers have left: make a new ParameterServer on all ranks")
