"""Where a forward and a backward of a sharded module begin and end: also those that fail in the middle, that
checkpointing runs once more, that call a unit within itself, or a unit without the whole module."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import Variable

from .checks import check_local_shards, check_no_second_backward
from .units import RESHARDED


class Passes(nn.Module):
    """Tells ShardedDataParallel, which inherits from it, when units begin and end.

    A forward begins with whichever unit is called first, and ends with it; a backward begins with the first hook that
    it calls, and ends when autograd is through. What was not finished is forgotten when the next one begins.

    `_order`: the units as the last forward has called them.
    """

    def __init__(self):
        super().__init__()
        self._calling, self._called = [], []  # in this forward: those at work, outermost first; all that were called
        self._sent, self._done = [], []  # in this backward: gradients under way; units that have all theirs
        self._in_backward = False
        self._syncs, self._reshards = True, True  # but in no_sync, in no_reshard
        self._versions = None  # of the shards, when a forward began in no_reshard

    @contextmanager
    def no_sync(self):
        """Backwards in here add to a whole gradient on this rank, 4Ψ bytes (in `reduce_dtype`), and reduce nothing: the
        first one after it reduces the sum. On every rank alike. A backward that fails takes the sum with it.

            for x in micro_batches[:-1]:
                with model.no_sync(), model.no_reshard():
                    loss(model(x)).backward()
            loss(model(micro_batches[-1])).backward()    # reduces, and reshards
        """
        self._syncs, before = False, self._syncs
        try:
            yield
        finally:
            self._syncs = before

    @contextmanager
    def no_reshard(self):
        """What forwards in here gather stays gathered, at stage 3 4Ψ bytes, until the first backward after it: no
        micro-batch in between gathers. Gathered anew where an optimizer has changed the shards since. On every rank
        alike."""
        self._reshards, before = False, self._reshards
        try:
            yield
        finally:
            self._reshards = before

    def refresh(self):
        """The next forward gathers the parameters, whose shards were changed by hand. On every rank."""
        self._stale, self._versions = self.stage == 2, None

    def forward(self, *args, **kwargs):
        try:
            return self.module(*args, **kwargs)
        except BaseException:
            if not running_backward():  # there it is how checkpointing ends, once it has what it needs
                self._reset()
            raise

    def _enter(self, unit):
        """A unit is called. True, but where checkpointing does so once more in backward."""
        again = running_backward()
        if not self._calling and not again:
            self._begin_forward()
        self._calling.append(unit)
        if not again:
            self._called.append(unit)
        return not again

    def _leave(self, unit):
        """A unit's call ends. True, but where it had not begun, where checkpointing has run it once more in backward,
        and where it was called by itself."""
        if self._calling[-1:] != [unit]:
            return False
        self._calling.pop()
        return not running_backward() and unit not in self._calling

    def _begin_forward(self):
        self._reset()
        for unit in self._units:
            for flat in unit.flat_parameters:
                check_local_shards(flat)
        current = self._hold()
        for unit in self._units:
            unit.show(RESHARDED)
        if not current:
            self._gather_changed()

    def _hold(self):
        """Begin to hold what is gathered, in no_reshard, or hold on after it, for a backward to come. Returns whether
        all of it is gathered, and as the shards are now."""
        versions = [flat.shard._version for unit in self._units for flat in unit.flat_parameters]
        current = all(unit.held for unit in self._units) and versions == self._versions
        holds = not self._reshards or current and torch.is_grad_enabled()
        if not (current and holds):
            self._let_go()
        for unit in self._units:
            unit.held = holds
        self._versions = versions
        return current

    def _gather_changed(self):
        """Before the first unit's forward, stage 2: gather what the optimizer has changed."""
        if self._stale:
            for unit in self._units:
                unit.gather()
            # as long as shards have gradients, an optimizer may change them
            self._stale = any(p.grad is not None for flat in self._trained for p in flat.local_shards)

    def _let_go(self):
        for unit in self._units:
            unit.held = False
            unit.reshard()

    def _end_forward(self):
        self._order, self._called = self._called, []
        called = set(self._order)
        for unit in self._units:
            unit.rest(reshard=unit not in called)  # such a one was gathered in advance, in vain

    def _begin_backward(self):
        if self.stage == 3:
            check_no_second_backward()
        if not self._in_backward:
            self._in_backward = True
            for unit in self._units if self._reshards else ():
                unit.held = False  # freed when its backward is over
            Variable._execution_engine.queue_callback(self._after_backward)

    def _end_backward(self):
        self._sent, self._done, self._in_backward = [], [], False
        for unit in self._units:
            unit.kept = False
            unit.rest()
        self._collectives.let_go()  # its buffers would be as much as two layers, all the time

    def _reset(self):
        """Forget a forward or backward that was not finished, and what an earlier forward has left gathered."""
        for unit in self._units:
            unit.rest()
            for flat in unit.trained if self._in_backward else ():
                flat.forget_gradient()
        self._calling, self._called, self._sent, self._done, self._in_backward = [], [], [], [], False

    def _apply(self, fn, recurse=True):
        raise RuntimeError("shards stay where they are: move or convert the model first, then wrap it")

    def __getstate__(self):
        raise TypeError("a wrapped model cannot be copied or pickled: copy the model before, or save full_state_dict()")


def running_backward():
    """Whether autograd is at work on this thread."""
    return torch._C._current_graph_task_id() != -1
