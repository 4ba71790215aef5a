"""Where a forward and a backward of a sharded module begin and end: also those that fail in the middle, that
checkpointing runs once more, that call a unit within itself, or a unit without the whole module."""

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
        for unit in self._units:
            unit.show(RESHARDED)
        self._gather_changed()

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
