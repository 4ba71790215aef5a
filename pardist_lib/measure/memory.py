"""Memory over time, by what it holds: counted in tensor storages, not in what the operating system gives a process.

A *storage* is the block of bytes that a tensor, and every view of it, lies in. `watching` notes when each one is made,
resized and freed, and what it turns out to be; `Memory` has the sums. Works on real tensors and on fake ones.
"""

import time
import weakref
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

KINDS = ("parameters", "gradients", "optimizer state", "activations", "other")
PARAMETERS, GRADIENTS, STATE, ACTIVATIONS, OTHER = range(5)


class Memory:
    """Bytes in the tensor storages of one rank over time, by kind.

    times    (k,) where something changed: seconds of the trace's clock; for fake ranks, operations done so far
    bytes    (k, 5) what was held from then on; columns as in `KINDS`

    parameters       in an `nn.Parameter`: also a whole weight that FSDP has gathered for the moment
    gradients        in a parameter's `.grad`
    optimizer state  in an optimizer's `state`
    activations      inputs and results of operations that autograd records, outside of backward or while backward
                     computes them again (checkpointing)
    other            all the rest: what backward makes on its way, buckets, buffers

    Where a storage is more than one of these, the first counts; what it becomes counts from its beginning. Storages
    that nothing touched while the trace was taken are left out, and what threads besides the traced one make.
    """

    def __init__(self, rank, times, bytes):
        self.rank, self.times, self.bytes = rank, times, bytes

    @property
    def total(self):
        """(k,) bytes of all kinds together."""
        return self.bytes.sum(1)

    def at(self, when):
        """{kind: bytes} at that time."""
        i = int(np.searchsorted(self.times, when, "right")) - 1
        return dict(zip(KINDS, self.bytes[i].tolist() if i >= 0 else [0] * len(KINDS), strict=True))

    @property
    def peak(self):
        """{kind: bytes} at the moment when most is held in all."""
        return self.at(self.times[self.total.argmax()]) if len(self.times) else self.at(0)

    @property
    def highest(self):
        """{kind: most bytes that it ever held}; not all of them at the same moment."""
        most = self.bytes.max(0).tolist() if len(self.times) else [0] * len(KINDS)
        return dict(zip(KINDS, most, strict=True))

    @property
    def end(self):
        """{kind: bytes} that are left at the end."""
        return self.at(float("inf"))

    def __repr__(self):
        held = ", ".join(f"{kind} {size:,}" for kind, size in self.peak.items() if size)
        return f"Memory of rank {self.rank}: at most {sum(self.peak.values()):,} bytes ({held})"


@contextmanager
def watching(clock=time.time_ns, notice=None):
    """While open, notes the storages that this thread touches; gives a `Watch`, whose `history()` is plain data.

    Costs about 25 µs for each operation. notice(function, args, result) is called for each one as well.
    """
    watch = Watch(clock, notice)
    plain_new, own_resize = vars(nn.Parameter)["__new__"], vars(torch.UntypedStorage).get("resize_")
    resize = torch.UntypedStorage.resize_

    def new(cls, *args, **kwargs):
        made = plain_new(cls, *args, **kwargs)
        watch.parameter(made)
        return made

    def resized(storage, size):
        done = resize(storage, size)
        watch.touch(storage)
        return done

    def before_step(optimizer, *_):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            watch.parameter(p)
            watch.mark(p.grad, GRADIENTS)

    def after_step(optimizer, *_):
        before_step(optimizer)
        for state in optimizer.state.values():
            for value in state.values() if isinstance(state, dict) else ():
                watch.mark(value, STATE)

    hooks = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]
    nn.Parameter.__new__, torch.UntypedStorage.resize_ = staticmethod(new), resized
    try:
        with watch.mode:
            yield watch
    finally:
        nn.Parameter.__new__ = plain_new
        if own_resize is None:
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = own_resize
        for hook in (*hooks, *watch.hooks):
            hook.remove()
        watch.close()


class Watch:
    """What is known of each storage: its kind, and when it had how many bytes."""

    def __init__(self, clock, notice):
        self.clock, self.notice, self.began = clock, notice, clock()
        self.kinds, self.changes = [], []  # of the storages by number; (when, number, bytes more)
        self.numbers, self.sizes, self.refs, self.hooks = {}, [], {}, []  # numbers: by address of the C++ storage
        self.mode, self.open = _Watching(self), True

    def touch(self, storage, old=False):
        """The number of a storage. old: it was there before it was seen, so from the beginning on."""
        key = storage._cdata
        number = self.numbers.get(key)
        size = storage.nbytes()
        if number is None:
            number = self.numbers[key] = len(self.kinds)
            self.kinds.append(OTHER)
            self.sizes.append(size)
            self.changes.append((self.began if old else self.clock(), number, size))
            self.refs[key] = weakref.ref(storage, lambda _: self._freed(key, number))
        elif size != self.sizes[number]:
            self.changes.append((self.clock(), number, size - self.sizes[number]))
            self.sizes[number] = size
        return number

    def _freed(self, key, number):
        if self.open and self.numbers.get(key) == number:
            del self.numbers[key], self.refs[key]
            self.changes.append((self.clock(), number, -self.sizes[number]))
            self.sizes[number] = 0

    def mark(self, tensor, kind):
        """Say what a tensor's storage is, where nothing stronger is known."""
        for t in _plain(tensor):
            number = self.touch(t.untyped_storage(), old=True)
            self.kinds[number] = min(self.kinds[number], kind)

    def parameter(self, p):
        self.mark(p, PARAMETERS)
        known = (p._post_accumulate_grad_hooks or {}).values()
        if p.requires_grad and p.is_leaf and self._got_gradient not in known:
            self.hooks.append(p.register_post_accumulate_grad_hook(self._got_gradient))

    def _got_gradient(self, p):
        if self.open:
            self.mark(p.grad, GRADIENTS)

    def close(self):
        self.open = False
        self.refs.clear()

    def history(self):
        """(times, bytes (k, 5)) as `Memory` has them, in the clock's own unit."""
        changes = sorted(self.changes, key=lambda change: change[0])
        if not changes:
            return np.zeros(0, np.int64), np.zeros((0, len(KINDS)), np.int64)
        when, numbers, more = (np.array(column) for column in zip(*changes, strict=True))
        table = np.zeros((len(changes), len(KINDS)), np.int64)
        table[np.arange(len(changes)), np.array(self.kinds)[numbers]] = more
        last = np.append(when[1:] != when[:-1], True)  # of several changes at one time only the last state counts
        return when[last], table.cumsum(0)[last]


class _Watching(TorchDispatchMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        watch = self.watch
        if any(t is not torch.Tensor and t is not nn.Parameter and _wraps(t) for t in types):
            for t in _tensors(args):
                if isinstance(t, nn.Parameter):
                    watch.parameter(t)
            return NotImplemented  # a DTensor: its own operations on plain tensors come by in a moment
        result = function(*args, **(kwargs or {}))
        recorded = torch.is_grad_enabled() and (given := list(_tensors(args)))
        numbers = []
        if recorded or torch._C._current_graph_task_id() == -1:
            for t in given if recorded else _tensors(args):
                if isinstance(t, nn.Parameter):
                    watch.parameter(t)
                numbers += [watch.touch(p.untyped_storage(), old=True) for p in _plain(t)]
        kinds = watch.kinds
        active = recorded and (
            any(t.requires_grad for t in given) or any(kinds[n] in (PARAMETERS, ACTIVATIONS) for n in numbers)
        )
        for t in _tensors((result,)):
            for p in _plain(t):
                numbers.append(watch.touch(p.untyped_storage()))
        if active:
            for n in numbers:
                kinds[n] = min(kinds[n], ACTIVATIONS)
        if watch.notice:
            watch.notice(function, args, result)
        return result


_wrapping = {}


def _wraps(kind):
    """Whether tensors of this class are made of others."""
    if kind not in _wrapping:
        _wrapping[kind] = hasattr(kind, "__tensor_flatten__") and kind.__name__ != "FakeTensor"
    return _wrapping[kind]


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _plain(value):
    """The plain tensors that a tensor is made of, () of anything else."""
    if not isinstance(value, torch.Tensor):
        return
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif value.layout == torch.strided:
        yield value
