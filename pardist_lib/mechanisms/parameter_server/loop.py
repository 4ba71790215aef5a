"""What the serving rank of a `ParameterServer` does: take pushes, apply them, answer."""

import queue
import threading
from collections import deque
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from .flat_buffer import FlatBuffer
from .messages import FAILED, GOODBYE, LEAVING, header_bytes, read_header

FOREVER = timedelta(days=10_000)


class Applied(NamedTuple):
    """One gradient that the server applied."""

    worker: int  # rank within the group
    computed_at: int  # version of the parameters that the worker had pulled
    applied_to: int  # version that the server had reached by then

    @property
    def staleness(self):
        return self.applied_to - self.computed_at


class ServerLoop:
    """For each worker two threads put into a queue what they receive from it; the main thread does everything else.

    One thread receives the worker's pushes, the other its goodbye. gloo could receive from *any* rank without threads,
    but would not notice that a rank has died. A receive from one rank does notice, unless the rank died in the middle
    of a message: then the receive of that message, like a send to that rank, never ends. The receive of the goodbye, of
    which nothing has come yet, ends even then.

    ps: the `ParameterServer`; after_step: called after every step of the optimizer, or None.
    """

    def __init__(self, ps, after_step):
        self.ps, self.after_step = ps, after_step
        self.parameters, self.schedule = ps.parameters, None if ps.schedule is None else deque(ps.schedule)
        self.events = queue.SimpleQueue()  # (worker, (rows, used) of a push; None where it has left, why it is lost)
        self.clock = dict.fromkeys(ps.workers, 0)  # pushes applied, of those who are still there
        self.pulled_at = dict.fromkeys(ps.workers, ps.version)  # the version that each one has
        self.arrived, self.waiting = {}, []  # {worker: (rows, used)} not yet applied; workers not yet answered
        self.inbox = {worker: FlatBuffer(self.parameters) for worker in ps.workers}
        self.outbox = {} if ps.synchronous else {worker: FlatBuffer(self.parameters) for worker in ps.workers}
        self.answers = {}  # {worker: its last answer}, kept as it may be under way

    def run(self):
        """Until all workers have left."""
        threads = [
            threading.Thread(target=hear, args=(worker,), daemon=True)
            for worker in self.ps.workers
            for hear in (self._listen, self._watch)
        ]
        for thread in threads:
            thread.start()
        while self.clock:
            worker, push, error = self.events.get()
            if worker not in self.clock:  # it has died: its last push may be heard of later
                continue
            if push:
                self.arrived[worker] = push
            else:
                steps = self.clock.pop(worker)
                if error:
                    self._lose(worker, steps, error)
            self._apply_together() if self.ps.synchronous else self._apply_apart()
        for thread in threads:
            thread.join(1)  # one in a message cut off never ends; the others, waking while Python ends, would abort it

    def _apply_together(self):
        """One step with the mean of all workers' gradients, once all that are still there have pushed."""
        if not self.arrived or self.arrived.keys() != self.clock.keys():
            return
        order = sorted(self.arrived)  # whoever came first: the sum is the same to the bit
        total = sum(self.arrived[worker][0] for worker in order)
        for worker in order:
            torch._foreach_mul_(self.inbox[worker].views, self.arrived[worker][0] / max(total, 1))
        mean, *others = (self.inbox[worker].views for worker in order)
        for other in others:
            torch._foreach_add_(mean, other)
        self.ps.log += [Applied(worker, self.ps.version, self.ps.version) for worker in order]
        self._step(mean, [any(used) for used in zip(*(self.arrived[worker][1] for worker in order), strict=True)])
        answer = self.ps.leaving.read_from(self.parameters)
        for worker in order:
            self.clock[worker] += 1
            self._answer(worker, answer)
        self.arrived.clear()

    def _apply_apart(self):
        """Apply the pushes that are there, one by one, and answer whoever may go on."""
        self._let_go()  # nobody waits for a worker that has left
        while (worker := self._next()) is not None:
            _, used = self.arrived.pop(worker)
            self.ps.log.append(Applied(worker, self.pulled_at[worker], self.ps.version))
            self._step(self.inbox[worker].views, used)
            self.clock[worker] += 1
            self.waiting.append(worker)
            self._let_go()

    def _next(self):
        """The worker whose push is applied next; None where that one has not arrived yet."""
        if self.schedule is None or not self.arrived:
            return next(iter(self.arrived), None)
        self._check_schedule()
        return self.schedule.popleft() if self.schedule[0] in self.arrived else None

    def _let_go(self):
        """Answer the workers that are not too far ahead of the slowest one that is still there."""
        slowest = min(self.clock.values(), default=0)
        for worker in [w for w in self.waiting if w in self.clock]:
            if self.ps.staleness is None or self.clock[worker] - slowest <= self.ps.staleness:
                self.waiting.remove(worker)
                self._answer(worker, self.outbox[worker].read_from(self.parameters))

    def _step(self, gradients, used):
        for p, gradient, is_used in zip(self.parameters, gradients, used, strict=True):
            p.grad = gradient.to(p.device) if is_used else None
        self.ps.optimizer.step()
        self.ps.version += 1
        if self.after_step:
            self.after_step()

    def _answer(self, worker, buffer):
        """Sends, and does not wait: a worker that pushes again has had its answer, and the buffer is free."""
        self.pulled_at[worker] = self.ps.version
        try:
            self.answers[worker] = self.ps.send(buffer.raw, worker)
        except RuntimeError:
            pass  # it has died: its threads tell

    # ---- what the threads hear --------------------------------------------------------------------------------------

    def _listen(self, worker):
        header = torch.empty(header_bytes(len(self.parameters)), dtype=torch.uint8)
        try:
            while True:
                self._receive(header, worker)
                rows, used = read_header(header, len(self.parameters))
                if rows in (LEAVING, FAILED):
                    error = RuntimeError("an exception ended its `with`") if rows == FAILED else None
                    return self.events.put((worker, None, error))
                self._receive(self.inbox[worker].raw, worker)  # nobody reads it now: the last push was answered
                self.events.put((worker, (rows, used), None))
        except RuntimeError as error:  # the connection is closed
            self.events.put((worker, None, error))

    def _watch(self, worker):
        try:
            self._receive(torch.empty(1, dtype=torch.uint8), worker, GOODBYE)
        except RuntimeError as error:
            self.events.put((worker, None, error))

    def _receive(self, tensor, worker, tag=0):
        """Without a timeout: a worker may take its time. (torch's recv would keep the group from being destroyed.)"""
        dist.irecv(tensor, group=self.ps.group, group_src=worker, tag=tag).wait(FOREVER)

    # ---- when it goes wrong -----------------------------------------------------------------------------------------

    def _lose(self, worker, steps, error):
        self.ps.lost[worker] = error
        self.arrived.pop(worker, None)
        if self.ps.synchronous:
            raise ConnectionError(
                f"worker {worker} is lost after {steps} steps: a synchronous server cannot make up its share of the "
                "batch (synchronous=False goes on with the others)"
            ) from error

    def _check_schedule(self):
        """Raise ValueError where the schedule's next push can never come: the server would wait for it for ever."""
        done = len(self.ps.log)
        if not self.schedule:
            raise ValueError(f"the schedule ends after {done} pushes, but worker {min(self.arrived)} makes another one")
        turn = self.schedule[0]
        at_work = self.clock.keys() - self.arrived.keys() - set(self.waiting)  # they may push or leave, and free others
        if turn not in self.arrived and (turn not in self.clock or not at_work):
            why = "waits for slower ones, as staleness asks" if turn in self.clock else "has left"
            raise ValueError(f"the schedule's push {done} (from 0) is worker {turn}'s, which {why}")
