"""Messages between two ranks: all that the collectives of this folder are made of.

A message is a contiguous run of elements. `exchange` starts some (torch's isend and irecv), `wait` ends them;
`pipelined` keeps several pieces of a tensor under way at once, so that one travels while another is added up. Sizes
and peers follow from the arguments that all ranks share: a message carries no header of ours, so the bytes sent are
the elements' bytes and nothing else.
"""

from collections import deque

import torch
import torch.distributed as dist

# Long tensors travel in pieces of at most this size. Shorter ones overlap better, but with gloo on two cores every
# message costs about 0.2 ms of processor time, whatever its size: while the main thread holds a connection to write
# to it, gloo's own thread asks for it again and again. Between machines, where a byte costs more, use less.
PIECE_BYTES = 8 << 20
DEPTH = 2  # pieces under way at a time: one travels while the other is added up


def exchange(sends=(), receives=(), group=None):
    """Start messages, each (tensor, peer's number within the group), without waiting; returns what to `wait` for.

    The tensors are contiguous and stay untouched until then. Empty ones are left out, here as on the other side.
    All go out as one batch: nccl starts a batch's sends and receives together, so two ranks that send to each
    other do not wait for each other.
    """
    messages = [(dist.irecv, *message) for message in receives] + [(dist.isend, *message) for message in sends]
    messages = [(call, tensor, peer) for call, tensor, peer in messages if tensor.numel()]
    if not messages:
        return []
    if _gloo_on_gpu(messages[0][1], group):
        return _through_the_host(messages, group)
    return dist.batch_isend_irecv([dist.P2POp(c, t, group=group, group_peer=p) for c, t, p in messages])


def wait(works):
    for work in works:
        work.wait()


_DONE = object()


def pipelined(tasks, depth=DEPTH):
    """Run generators, `depth` of them at a time, each to its next `yield` in turn.

    A task yields after it has started messages and waits for them when it is resumed; meanwhile the others do their
    arithmetic. Every rank resumes them in the same order.
    """
    tasks, running = iter(tasks), deque()
    while True:
        while len(running) < depth and (task := next(tasks, None)):
            running.append(task)
        if not running:
            return
        task = running.popleft()
        if next(task, _DONE) is not _DONE:
            running.append(task)


def on_nccl(tensor, group):
    """Whether nccl carries this tensor's messages: it starts the sends and receives of a step together."""
    return tensor.is_cuda and "cuda:nccl" in dist.get_backend_config(group)


# ---- ranks that share one GPU ---------------------------------------------------------------------------------


def _gloo_on_gpu(tensor, group):
    return tensor.is_cuda and "cuda:gloo" in dist.get_backend_config(group)


def _through_the_host(messages, group):
    """gloo's sends and receives know only the host's memory: each message passes through a copy there."""
    works = []
    for call, tensor, peer in messages:
        host = tensor.cpu() if call is dist.isend else torch.empty_like(tensor, device="cpu")
        work = dist.batch_isend_irecv([dist.P2POp(call, host, group=group, group_peer=peer)])[0]
        works.append(work if call is dist.isend else _CopyBack(work, host, tensor))
    return works


class _CopyBack:
    """A message received in the host's memory; `wait` copies it to where it belongs."""

    def __init__(self, work, host, tensor):
        self.work, self.host, self.tensor = work, host, tensor

    def wait(self):
        self.work.wait()
        self.tensor.copy_(self.host)
