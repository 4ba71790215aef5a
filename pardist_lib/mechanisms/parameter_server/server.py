"""A parameter server: one rank holds the parameters and the optimizer, the others compute gradients.

A step of a worker: push its gradients to the server, pull parameters back. What the server does in between is all
the difference:

    synchronous         wait for every worker, apply the mean of their gradients, answer all: one process's training
    asynchronous        apply each gradient as it comes and answer at once: nobody waits, gradients are stale
    bounded staleness   asynchronous, but a worker more than `staleness` steps ahead of the slowest waits for it

A gradient is *stale* by as many versions as the server's parameters have moved on between the pull it was computed
from and the moment it is applied.

S: bytes of the trainable parameters; N: workers. In one step a worker sends S and receives S, 2·S on its link, and
the server's link carries all of it, 2·N·S. A push has a header besides, of 8 bytes and one bit for each parameter;
a goodbye is a header and one byte. The server holds S for each worker's pushes and, if asynchronous, for its answers.
All messages are torch's send and receive, none is a collective.

Sources: Li et al., "Scaling Distributed Machine Learning with the Parameter Server" (2014), section 3; Ho et al.,
"More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server" (2013), section 3, for the bound.
"""

from contextlib import nullcontext, suppress

import torch.distributed as dist

from ..group import rank_and_size, within
from .checks import check_arguments, check_same_module, check_serve, check_step
from .flat_buffer import FlatBuffer
from .loop import Applied, ServerLoop
from .messages import FAILED, GOODBYE, LEAVING, header

__all__ = ["Applied", "ParameterServer"]


class ParameterServer:
    """The same object on every rank of the group: one of them serves, the others push and pull.

        with ParameterServer(model, optimizer) as ps:
            if ps.serving:
                log = ps.serve()  # until all workers have left
            else:
                for x, y in batches:
                    model.zero_grad()
                    loss(model(x), y).backward()
                    ps.step(rows=len(x))  # push gradients, pull parameters

    module       on every rank the same; parameters and buffers are set to the server's at the start.
    optimizer    a torch optimizer of the module's parameters. Only the server's ever steps and has state.
    synchronous  True: one step with the mean of all workers' gradients. False: each one is applied as it comes.
    staleness    with synchronous=False: a worker more than so many steps ahead of the slowest waits for it before it
                 gets its next parameters. None: nobody waits.
    schedule     with synchronous=False: workers, by their ranks within the group, in the order in which their pushes
                 are to be applied, so that a run can be repeated to the bit. A push that comes too early waits.
    push         "gradients", or "parameters": workers train by themselves with an optimizer of their own and push
                 how far their parameters have come since the last pull, which the server takes for a gradient (with
                 SGD(lr=1) its step is the mean of the workers' parameters: federated averaging).
    server       the global rank that serves; all others of the group work.

    On the server: `version`, how many steps it has made; `log`, a list of `Applied`, one for each gradient, with its
    staleness; `lost`, {worker: what its connection said} of those that died or left `with` by an exception.

    A gradient that is None on a worker counts as zeros; where it is None on all of them the optimizer leaves the
    parameter alone, as in one process. Buffers are each rank's own after the start: BatchNorm's statistics move on the
    workers only. Messages pass through the host's memory, over gloo: it alone lets the server wait for each
    worker apart from the others.

    A worker that dies (its connection closes) or raises within `with` counts as one that left: an asynchronous server
    goes on with the others, a synchronous one stops with ConnectionError, as its batch would no longer be the one
    asked for. A worker waits for its parameters no longer than the group's timeout (`init_process_group`'s).

    Raises ValueError for a group of one rank or without gloo, a module that differs between ranks or has nothing
    to train, an optimizer of other parameters, and options that do not go together.
    """

    def __init__(
        self,
        module,
        optimizer,
        *,
        synchronous=True,
        staleness=None,
        schedule=None,
        push="gradients",
        server=0,
        group=None,
    ):
        self.rank, n = rank_and_size(group)
        self.group, self.module, self.optimizer, self.push = group, module, optimizer, push
        self.synchronous, self.staleness = synchronous, staleness
        self.schedule = None if schedule is None else list(schedule)
        self.server = within(group, server)
        self.workers = [r for r in range(n) if r != self.server]
        self.serving = self.rank == self.server
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        check_arguments(self)
        check_same_module(self)
        self.version, self.log, self.lost = 0, [], {}
        self.arriving, self.leaving = FlatBuffer(self.parameters), FlatBuffer(self.parameters)
        self.at_work = True  # a worker: until it leaves; the server: until it serves
        self._start_alike()

    def _start_alike(self):
        """All parameters and buffers, frozen ones too, from the server to every worker."""
        state = [*self.module.parameters(), *self.module.buffers()]
        message = FlatBuffer(state)
        if self.serving:
            message.read_from(state)
            for work in [self.send(message.raw, worker) for worker in self.workers]:
                work.wait()
        else:
            self.receive(message.raw, self.server)
            message.write_into(state)
            self.arriving.read_from(self.parameters)

    # ---- a worker -------------------------------------------------------------------------------------------------

    def step(self, rows=1):
        """Push what this worker has, pull the server's parameters into the module.

        rows: how many rows its gradient is the mean over; the synchronous server weights by it. 0: no gradient.
        Sends S and the header, receives S. Returns once the server lets this worker go on.
        """
        check_step(self, rows)
        pushed = self._to_push() if rows else [None] * len(self.parameters)
        used = [t is not None for t in pushed]
        self.leaving.read_from(pushed)
        sends = [self.send(header(rows, used), self.server), self.send(self.leaving.raw, self.server)]
        self.receive(self.arriving.raw, self.server)
        for work in sends:
            work.wait()
        self.arriving.write_into(self.parameters)

    def _to_push(self):
        """A tensor for each parameter, or None: its gradient, or how far it has come since the last pull."""
        if self.push == "gradients":
            return [p.grad if p.grad is None else p.grad.to_dense() for p in self.parameters]
        pairs = zip(self.arriving.views, self.parameters, strict=True)
        return [pulled - p.detach().to(pulled.device) for pulled, p in pairs]

    def leave(self):
        """Tell the server that this worker makes no more steps. Sends a header and one byte."""
        self._leave(LEAVING)

    def _leave(self, why):
        if self.at_work and not self.serving:
            self.at_work = False
            last = header(why, [False] * len(self.parameters))
            for work in (self.send(last, self.server), self.send(last[:1], self.server, GOODBYE)):
                work.wait()

    def __enter__(self):
        return self

    def __exit__(self, raised, *_):
        with suppress(RuntimeError) if raised else nullcontext():  # the first error is the one to see
            self._leave(FAILED if raised else LEAVING)

    # ---- the server -----------------------------------------------------------------------------------------------

    def serve(self, after_step=None):
        """Apply what workers push and answer them, until all have left. Returns a list of `Applied`.

        after_step: called after every step of the optimizer: a place for schedulers and for measuring the loss
        (`ps.version` steps have been made). Receives S and a header, sends S, for each push.
        """
        check_serve(self)
        self.at_work = False
        ServerLoop(self, after_step).run()
        return self.log

    # ---- messages -------------------------------------------------------------------------------------------------

    def send(self, tensor, peer, tag=0):
        return dist.isend(tensor, group=self.group, group_dst=peer, tag=tag)

    def receive(self, tensor, peer):
        dist.recv(tensor, group=self.group, group_src=peer)
