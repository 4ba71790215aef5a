"""On a rank: call an answer and note what it does: each message, what it waits for, whose functions it uses.

Three things watch while the answer runs, all taken away afterwards. A dispatch mode sees every call that reaches
torch's communication operators, by whatever name it was made (torch.distributed, functional collectives, object
collectives). `Work.wait` notes which messages were waited for. A profile function sees whose code is entered.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed import Work, distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARY = Path(__file__).parents[2]
_SOLUTIONS = sorted((_LIBRARY / "lessons").glob("lesson*/solutions.py"))
_REFERENCE = tuple(map(str, (f"{_LIBRARY / 'mechanisms'}/", f"{_LIBRARY / 'measure'}/", *_SOLUTIONS)))
_GUARDS = str(_LIBRARY / "mechanisms" / "collectives" / "parts.py")  # looks at every optimizer's step, torch calls it
_TORCH = f"{Path(dist.__file__).parent}/"
_DDP = f"{Path(torch.__file__).parent}/nn/parallel/distributed.py"
_READY_MADE = "average_parameters", "_sync_module_states", "_sync_params_and_buffers"
CASE = "in the case: "
MOST = 2000  # calls of one answer; with more it is in a loop without end, which shows signs of life for ever
ENDLESS = f"it makes call after call, {MOST:,} by now: does one of its loops never end?"


@dataclass
class Call:
    """One communication: `op` is send, recv, all_reduce …; `bytes` and `dtype` of what it was given; `peer` of a send
    or recv; `group` its ranks, as the whole world numbers them (empty where that is not known)."""

    op: str
    bytes: int
    peer: int | None = None
    dtype: str = ""
    group: tuple[int, ...] = ()


@dataclass
class Seen:
    """What an answer did on one rank."""

    result: object = None
    calls: list[Call] = field(default_factory=list)
    unwaited: int = 0  # asynchronous calls whose wait() was never called
    early: str = ""  # the first operation on a tensor whose message was still under way, and what that message was
    hidden: int = 0  # calls made where the check does not look: in another thread
    torchs: str = ""  # something of torch's that does it all, if it was called: DDP, a collective that pickles
    reference: str = ""  # a function of this course that was called
    ops: set[str] = field(default_factory=set)  # torch's own operations that were used: "div", "add_", …
    dtypes: set[str] = field(default_factory=set)  # of the tensors that those gave
    kept: dict = field(default_factory=dict)  # what the exercise wants to look at besides


@dataclass(frozen=True)
class Other:
    """Stands for a result that no exercise asks for, and that perhaps could not travel."""

    type: str


class _Noting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.works, self.ops, self.dtypes = [], [], set(), set()
        self.inner = 0  # calls that torch has made of one: gloo's reduce_scatter of a list is a reduce for each rank
        self.under_way, self.early = [], ""  # messages since the last wait: (operation, its tensors)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function._schema.name.partition("::")
        peer = args[2] if name in ("send", "recv_") else None
        if peer is not None and not 0 <= peer < dist.get_world_size():
            raise ValueError(f"there is no rank {peer}")  # gloo would wait for it
        if len(self.calls) >= MOST:
            raise RuntimeError(ENDLESS)
        before = calls_so_far() if name == "reduce_scatter_" else 0
        result = function(*args, **(kwargs or {}))
        if name == "reduce_scatter_":
            self.inner += max(0, calls_so_far() - before - 1)
        if space == "c10d":
            self.calls.append(Call(_op(name), _bytes(args[0]), peer, _dtype(args[0]), _ranks(args)))
            self.works.append(result)
            self.under_way.append((_op(name), _spans(args[0])))
        elif space in ("_c10d_functional", "c10d_functional") and not name.startswith("_") and name != "wait_tensor":
            self.calls.append(Call(_op(name), _bytes(result), None, _dtype(args[0]), _ranks(args)))
        else:
            self.ops.add(name)
            self.dtypes.add(_dtype(result))
            if self.under_way and not self.early:
                self._look_for_a_race(name, function._schema.is_mutable, args)
        return result

    def _look_for_a_race(self, name, writes, args):
        """Two things at one tensor: what comes out is chance. A tensor that is sent may still be read."""
        read = _spans(args) if writes or name in _READS else []
        written = _spans(args[:1]) if writes else []
        for op, tensors in self.under_way:
            if any(a < d and c < b for c, d in (written if op == "send" else read) for a, b in tensors):
                self.early = f"{name} works on a tensor whose {op} is still under way"


def _op(name):
    """torch.distributed's name of what is called `_allgather_base_` in C++, `all_gather_into_tensor_coalesced` as a
    functional collective, and the like."""
    short = name.strip("_")
    for start, op in _SPELLINGS.items():
        if short.startswith(start):
            return op
    return short  # broadcast, reduce, reduce_scatter, gather, scatter, barrier, send


_SPELLINGS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "reduce_scatter": "reduce_scatter",
    "recv": "recv",
}


def _bytes(tensors):
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, (list, tuple)) else 0


_READS = ("div", "mul", "add", "sub", "clone")  # of those that do not write; others may only ask for a shape


def _spans(tensors):
    """[(first, end)] of the memory of a tensor or of those in a list; without those that have gaps."""
    if isinstance(tensors, torch.Tensor):
        plain = tensors.layout == torch.strided and tensors.is_contiguous() and not tensors.is_meta
        return [(tensors.data_ptr(), tensors.data_ptr() + _bytes(tensors))] if plain else []
    return sum(map(_spans, tensors), []) if isinstance(tensors, (list, tuple)) else []


def _dtype(tensors):
    """'float32', of a tensor or of the first in a list; '' where there is none."""
    if isinstance(tensors, (list, tuple)):
        return next(filter(None, map(_dtype, tensors)), "")
    return str(tensors.dtype)[6:] if isinstance(tensors, torch.Tensor) else ""


def _ranks(args):
    """The ranks of the group among the arguments of a communication operator, () where it cannot be told."""
    for value in args:
        try:
            if isinstance(value, torch.ScriptObject):
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(value)))
            if isinstance(value, str) and (group := distributed_c10d._resolve_process_group(value)):
                return tuple(dist.get_process_group_ranks(group))
        except Exception:  # another object, another text: the name of an operation
            pass
    return ()


def watched(answer, *args, **kwargs):
    """Call `answer(*args, **kwargs)` on this rank and return what was seen. What it raises passes through."""
    noting, seen = _Noting(), Seen()
    _last_works[:] = [noting.works]  # a Work that is dropped takes its message along: kept until the next call

    def notice(frame, event, _):
        if event == "call":
            code = frame.f_code
            if code.co_filename.startswith(_REFERENCE):
                seen.reference = seen.reference or _called(frame)
            elif code.co_filename.startswith(_TORCH) and ("object" in code.co_name or code.co_name in _READY_MADE):
                seen.torchs = seen.torchs or code.co_name.strip("_")
            elif code.co_filename == _DDP:
                seen.torchs = "DistributedDataParallel"

    before = calls_so_far()
    with _waits(noting) as waited, noting:
        sys.setprofile(notice)
        try:
            result = answer(*args, **kwargs)
        finally:
            sys.setprofile(None)
    seen.result, seen.calls, seen.ops, seen.dtypes = plain(result), noting.calls, noting.ops, noting.dtypes
    seen.unwaited = max(0, len(noting.works) - len(waited))
    seen.hidden = max(0, calls_so_far() - before - len(noting.calls) - noting.inner)
    seen.early = noting.early
    return seen


_last_works = []


def forget():
    """Let go of the last call's messages and the tensors they hold: before counting which tensors are still alive."""
    _last_works.clear()


@contextmanager
def _waits(noting):
    """Inside, yields the works that were waited for: by wait(), or by that of a future made of them."""
    waited, futures = {}, {}  # the works themselves, so that their ids stay theirs
    plain, coalesced = (Work.wait, Work.get_future, torch._C.Future.wait), dist._broadcast_coalesced

    def wait(work, *args, **kwargs):
        waited[id(work)] = work
        noting.under_way.clear()
        return plain[0](work, *args, **kwargs)

    def get_future(work):
        futures[id(work)] = work
        noting.under_way.clear()  # what is given to then() may run at once
        return plain[1](work)

    def wait_future(future):
        waited.update(futures)
        noting.under_way.clear()
        return plain[2](future)

    def broadcast_coalesced(*args, **kwargs):  # waits for what it starts, and Python does not see it
        before, early = len(noting.works), noting.early
        coalesced(*args, **kwargs)
        waited.update((id(work), work) for work in noting.works[before:])
        noting.under_way.clear()
        noting.early = early

    Work.wait, Work.get_future, torch._C.Future.wait = wait, get_future, wait_future
    dist._broadcast_coalesced = broadcast_coalesced
    try:
        yield waited
    finally:
        Work.wait, Work.get_future, torch._C.Future.wait = plain
        dist._broadcast_coalesced = coalesced


def _called(frame):
    """The name of a function that was entered; "" while its file is only being imported, or where it is not the answer
    that calls it but a guard that the lesson has set up on this rank."""
    name = frame.f_code.co_name
    while frame is not None:
        if frame.f_code.co_filename == _GUARDS:
            return ""
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(_REFERENCE):
            return ""
        frame = frame.f_back
    return name


def calls_so_far():
    """How many communications torch has counted on this rank, in all its groups."""
    if not dist.is_initialized():
        return 0
    return sum(group._get_sequence_number_for_group() for group in list(distributed_c10d._world.pg_map))


def plain(value, depth=3):
    """`value` where it is something that an exercise can ask for, else an `Other` with the name of its type."""
    if isinstance(value, functional.AsyncCollectiveTensor):
        value = value.wait()  # of a functional collective, which waits where its result is used
    if isinstance(value, torch.Tensor):
        ordinary = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout == torch.strided
        kind = "sparse tensor" if value.layout != torch.strided else type(value).__name__
        return value.detach().cpu().clone() if ordinary and not value.is_meta else Other(kind)
    if isinstance(value, (NoneType, bool, int, float, range, slice, str)):
        return value if not isinstance(value, str) else value[:200]
    if type(value) in (list, tuple) and depth and len(value) <= 1000:
        return type(value)(plain(v, depth - 1) for v in value)
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # a number of NumPy's
        return plain(value.item(), 0)
    return Other(type(value).__name__)


def told(answer, *args, **options):
    """`answer(*args, **options)`, one of several calls: what it raises tells the reader with which arguments."""
    try:
        return answer(*args, **options)
    except Exception as error:
        given = [_briefly(a) for a in args] + [f"{name}={_briefly(a)}" for name, a in options.items()]
        error.add_note(f"{CASE}{getattr(answer, '__name__', 'answer')}({', '.join(given)})")
        raise


def _briefly(value):
    if isinstance(value, torch.Tensor) and value.dim():
        return f"a tensor {tuple(value.shape)}"
    return repr(value.item() if isinstance(value, torch.Tensor) else value)[:60]
