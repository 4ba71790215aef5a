"""What a program would send and hold on one of up to 4,096 ranks, without the ranks: in one process, nothing computed.

torch's *fake process group* says yes to every collective and moves nothing; torch's *fake tensors* have shapes, dtypes
and storages of the right size, and no values. So a training step of a model that fits no machine runs here in seconds.
"""

import importlib
import pickle
import sys
import traceback
import warnings
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import distributed_c10d
from torch.distributed.fsdp._fully_shard import _fsdp_param as fsdp_param
from torch.distributed.tensor import debug as sharding
from torch.nn.parallel import distributed as ddp
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import Memory, _tensors, watching

MOST = 4096
_TORCH = f"{Path(torch.__file__).parent}/"
_OWN = str(Path(__file__).parent)
_COURSE = str(Path(__file__).parents[1])


class CannotTrace(RuntimeError):
    """A program that has no meaning without values; says the line, and what to do."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective or message of a fake rank; fields and bytes as those of an `Event`, without times."""

    rank: int
    name: str
    bytes: int
    group: tuple[int, ...]
    peer: int | None = None
    after: int = 0  # operations done before it


class FakeTrace:
    """What some ranks of a large world would send and hold; `results` is what the function returned on each of them.

    collectives  `Call`s in the order in which they are made, rank after rank
    memory       {rank: `Memory`}, whose clock counts operations
    ranks        those that were traced; ranks that run the same program on the same shapes do the same
    """

    def __init__(self, world_size, results, calls, memory):
        self.world_size, self.results, self.collectives, self.memory = world_size, results, calls, memory
        self.ranks = sorted(memory)

    def bytes(self, op=None, rank=None):
        """Payload bytes as `Trace.bytes` counts them, of the traced ranks."""
        return sum(c.bytes for c in self.collectives if op in (None, c.name) and rank in (None, c.rank))

    def rows(self):
        """Calls of each rank by operation and size of group, as a list of dicts."""
        calls, moved = Counter(), Counter()
        for c in self.collectives:
            calls[c.rank, c.name, len(c.group)] += 1
            moved[c.rank, c.name, len(c.group)] += c.bytes
        return [
            {"rank": rank, "operation": name, "ranks in the group": n, "calls": calls[rank, name, n], "bytes": size}
            for (rank, name, n), size in sorted(moved.items())
        ]

    def __repr__(self):
        lines = [
            f"rank {r['rank']}: {r['calls']} {r['operation']} among {r['ranks in the group']:,}, {r['bytes']:,} bytes"
            for r in self.rows()
        ]
        return "\n".join([f"FakeTrace of {self.world_size:,} ranks", *lines, *map(repr, self.memory.values())])


def fake_trace(fn, *args, world_size, ranks=(0,), **kwargs):
    """Run `fn(*args, **kwargs)` as each rank of `ranks` in a world of `world_size`: a `FakeTrace`.

    fn builds its model and trains it, as on a real rank: DistributedDataParallel, fully_shard, DTensor, pipelining,
    our own mechanisms, or plain torch.distributed. It runs on this machine's CPU device; tensors that come from outside
    are taken as they are. Object collectives, also those by which torch and the course check that ranks agree, are
    answered with this rank's own object, and count as many bytes as that has. Our mechanisms do what they do on nccl:
    shards travel by torch's all-gather and reduce-scatter, not by a ring of messages. Memory that a kernel takes for
    itself is not known: nn.LSTM's workspace on a CPU, most of what it keeps for backward, is missing (nn.GRU has none).

    Raises ValueError for a world size that is not 1 to 4,096, a rank that is not in it, a model made outside of fn;
    RuntimeError where this process has a process group already (the fake one is destroyed at the end, whatever
    happens); `CannotTrace` where the program asks for a value: `if loss > 3`, `.item()`, `nonzero()`.
    """
    if not isinstance(world_size, int) or not 1 <= world_size <= MOST:
        raise ValueError(f"world_size is a whole number from 1 to {MOST:,}, not {world_size!r}")
    ranks = [ranks] if isinstance(ranks, int) else list(ranks)
    if not ranks:
        raise ValueError("ranks is at least one rank to be traced: ranks=[0]")
    if any(isinstance(value, torch.nn.Module) for value in (*args, *kwargs.values())):
        raise ValueError("a model that exists already has real weights: make the model inside of the traced function")
    for rank in ranks:
        if not isinstance(rank, int) or not 0 <= rank < world_size:
            raise ValueError(
                f"there is no rank {rank!r} in a world of {world_size:,}: they are 0 to {world_size - 1:,}"
            )
    if dist.is_initialized():
        raise RuntimeError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already, and cannot play another: "
            "trace in the notebook, or call dist.destroy_process_group() first"
        )
    results, calls, memory = [], [], {}
    for rank in ranks:
        result, made, history = _as_rank(rank, world_size, fn, args, kwargs)
        results.append(result)
        calls += made
        memory[rank] = Memory(rank, *history)
    return FakeTrace(world_size, results, calls, memory)


def _as_rank(rank, world_size, fn, args, kwargs):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    noting = _Noting(rank)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
            stack.enter_context(_answered(noting))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            watch = stack.enter_context(watching(noting.clock, noting.notice))
            stack.enter_context(_Values())
            try:
                result = fn(*args, **kwargs)
            except Exception as error:
                if said := _why_not(error):
                    raise CannotTrace(said) from error
                raise
        return result, noting.calls, watch.history()
    finally:
        dist.destroy_process_group()
        sharding._clear_python_sharding_prop_cache()  # they would give the next world this one's groups
        sharding._clear_fast_path_sharding_prop_cache()


class _Noting:
    def __init__(self, rank):
        self.rank, self.calls, self.done, self.groups = rank, [], 0, {}

    def clock(self):
        return self.done

    def notice(self, function, args, _):
        self.done += 1
        space, _, name = function._schema.name.partition("::")
        if space == "c10d" or space == "_c10d_functional" and name in FUNCTIONAL:
            self.calls.append(self.call(FUNCTIONAL.get(name) or C10D[name], args, space))

    def call(self, name, args, space):
        if space == "c10d":
            group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            given = args[PAYLOAD.get(name, 0)] if name != "scatter" or args[1] else args[0]
        else:
            group = distributed_c10d._resolve_process_group(args[-1])
            given = args[0]
        members = self.members(group)
        peer = members[args[2]] if name in ("send", "recv") and args[2] in range(len(members)) else None
        return Call(self.rank, name, 0 if name == "barrier" else _bytes(given), members, peer, self.done)

    def members(self, group):
        if group not in self.groups:
            self.groups[group] = tuple(dist.get_process_group_ranks(group))
        return self.groups[group]

    def made(self, group, *calls):
        """Note calls, (name, bytes), that are answered without being made."""
        members = self.members(group or dist.group.WORLD)
        self.calls += [Call(self.rank, name, size, members, None, self.done) for name, size in calls]


C10D = {
    "allreduce_": "all_reduce", "allreduce_coalesced_": "all_reduce", "broadcast_": "broadcast", "reduce_": "reduce",
    "allgather_": "all_gather", "_allgather_base_": "all_gather", "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather", "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "gather_": "gather", "scatter_": "scatter", "alltoall_": "all_to_all", "alltoall_base_": "all_to_all",
    "barrier": "barrier", "monitored_barrier_": "barrier", "send": "send", "recv_": "recv",
    "recv_any_source_": "recv",
}  # fmt: skip
FUNCTIONAL = {
    "all_reduce": "all_reduce", "all_reduce_": "all_reduce", "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce", "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather", "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter", "all_to_all_single": "all_to_all",
    "broadcast": "broadcast", "broadcast_": "broadcast",
}  # fmt: skip
# which argument is the input, where it is not the first: of these the first is the output
PAYLOAD = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "gather": 1, "scatter": 1}


def _bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


# ---- what torch and this course ask, that needs no values -----------------------------------------------------------


class _Values(TorchDispatchMode):
    """Values for those who may have them. What is written down in Python (`torch.tensor([3, 4])`) and what is small and
    computed from that alone stays real: an optimizer's steps, the counts that ranks tell each other; and an all-reduce
    of it is answered as if every rank had given the same. Device meshes and what DistributedDataParallel counts, its
    buckets and which parameters were used, are real, too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if given:
            real = not any(isinstance(t, FakeTensor) for t in given) and sum(t.numel() for t in given) <= SMALL
        else:
            real = _caller("distributed/device_mesh.py", "distributed/_mesh_layout.py")
            counts = function._schema.name in ("aten::empty", "aten::zeros") and kwargs.get("dtype") is torch.int32
            real = real or counts and _caller("nn/parallel/")
        if not real:
            return function(*args, **kwargs)
        with unset_fake_temporarily():
            return function(*args, **kwargs)


SMALL = 1 << 16  # elements
_INNER = ("_compile.py", "_dynamo/", "_ops.py", "_subclasses/", "utils/_", "_tensor.py")


def _caller(*places):
    """Whether the operation was asked for in one of these files of torch's."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_TORCH):
            return False
        file = file[len(_TORCH) :]
        if not file.startswith(_INNER):
            return any(place in f"/{file}" for place in places)
        frame = frame.f_back
    return False


@contextmanager
def _answered(noting):
    """While open: `dist.get_backend` says nccl; object collectives give this rank's own objects, and are noted as the
    calls that torch makes for them; DistributedDataParallel does not compare the ranks' shapes, and averages its
    buckets by a hook (the fake group's work has no result, which its C++ code would want); what is given to a pool of
    threads is done at once."""

    def all_gather_object(objects, value, group=None):
        noting.made(group, ("all_gather", COUNT), ("all_gather", _pickled(value)))
        objects[:] = [value] * len(objects)

    def gather_object(value, objects=None, dst=None, group=None, group_dst=None):
        noting.made(group, ("all_gather", COUNT), ("gather", _pickled(value)))
        if objects is not None:
            objects[:] = [value] * len(objects)

    def broadcast_object_list(objects, src=None, group=None, device=None, group_src=None):
        noting.made(group, ("broadcast", COUNT * len(objects)), ("broadcast", sum(map(_pickled, objects))))

    def scatter_object_list(out, objects=None, src=None, group=None, group_src=None):
        given = objects or out[:1]
        size = max(map(_pickled, given))
        noting.made(group, ("broadcast", COUNT), ("scatter", size * len(given)), ("scatter", COUNT * len(given)))
        out[0] = objects[dist.get_rank(group)] if objects else None

    def verify(group, parameters, logger=None):
        shapes = sum(2 * p.dim() for p in parameters)  # and strides
        noting.made(group, ("all_gather", COUNT), ("broadcast", COUNT * shapes))

    def swap_tensors(one, other):
        if not isinstance(one, FakeTensor):
            return swap_of_tensors(one, other)
        one.data = other.data  # torch's way fails on fake tensors, which have weak references; as for Module.to()

    def submit(pool, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future

    swap_of_tensors = torch.utils.swap_tensors
    forward, all_reduce_of_fakes = ddp.DistributedDataParallel.forward, dist.all_reduce

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        work = all_reduce_of_fakes(tensor, op, group, async_op)
        if not isinstance(tensor, FakeTensor) and op == dist.ReduceOp.SUM:
            tensor.mul_(dist.get_world_size(group))  # every rank gave the same
        return work and _Done(work, tensor)

    def with_hook(model, *args, **kwargs):
        if not getattr(model, "_comm_hooks", None):
            model.register_comm_hook(None, _average)
        return forward(model, *args, **kwargs)

    replaced = [
        (module, name, value)
        for module in (dist, distributed_c10d)
        for name, value in (
            ("all_reduce", all_reduce),
            ("all_gather_object", all_gather_object),
            ("gather_object", gather_object),
            ("scatter_object_list", scatter_object_list),
            ("broadcast_object_list", broadcast_object_list),
        )
    ]
    schedule = importlib.import_module("torch.distributed.pipelining.schedules")._PipelineSchedule
    if hasattr(schedule, "_warmup_p2p"):  # stages vote whether all of them know their shapes
        replaced += [(schedule, "_warmup_p2p", _all_static)]
    replaced += [(dist, "get_backend", lambda group=None: "nccl")]
    replaced += [(torch.utils, "swap_tensors", swap_tensors), (fsdp_param, "_chunk_with_empty", _Chunks)]
    replaced += [(ddp, "_verify_param_shape_across_processes", verify)]
    replaced += [(ddp.DistributedDataParallel, "forward", with_hook), (ThreadPoolExecutor, "submit", submit)]
    before = [(place, name, vars(place)[name]) for place, name, _ in replaced]
    for place, name, value in replaced:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


COUNT = 8  # bytes of a whole number


def _pickled(value):
    """Bytes of an object on its way; 0 where it cannot be packed, as one that holds fake tensors."""
    try:
        return len(pickle.dumps(value))
    except Exception:
        return 0


def _all_static(schedule, stages, has_backward, p2p_done):
    for stage in stages:
        stage._inference_mode = importlib.import_module("torch.distributed.pipelining._utils").InferenceMode.STATIC


class _Chunks:
    """The n parts of a tensor, of which fully_shard takes two: cutting all 4,096 each time would take minutes."""

    def __init__(self, tensor, n, dim):
        self.tensor, self.n, self.dim = tensor, n, dim

    def __getitem__(self, i):
        length = self.tensor.shape[self.dim]
        part = -(-length // self.n)
        start = min(i * part, length)
        return self.tensor.narrow(self.dim, start, min(part, length - start))


class _Done:
    """The work of an all-reduce whose future gives the tensor, as a real one's does: a communication hook asks for it.
    The fake group's gives None."""

    def __init__(self, work, tensor):
        self.work, self.tensor = work, tensor

    def __getattr__(self, name):
        return getattr(self.work, name)

    def is_completed(self):
        return True

    def get_future(self):
        future = torch.futures.Future()
        future.set_result([self.tensor])
        return future


def _average(group, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    dist.all_reduce(buffer)
    done = torch.futures.Future()
    done.set_result(buffer.div_(dist.get_world_size()))
    return done


# ---- what cannot be traced ------------------------------------------------------------------------------------------


def _why_not(error):
    """A sentence for an error that comes of having no values, None for any other."""
    from torch._subclasses import fake_tensor

    known = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException
    other = fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException
    if "UninitializedParameter" in str(error):
        return "lazy modules cannot be traced: give the sizes, nn.Linear(64, 10) for nn.LazyLinear(10)"
    if type(error).__name__ == "PipeliningMetadataError":
        return (
            "a pipeline's stage asks the stage before it for its shapes, and there is none here: give them, "
            "PipelineStage(…, input_args=…, output_args=…), with requires_grad=True where gradients are sent"
        )
    texts = "data is not allocated yet", ".numpy() is not supported for tensor subclasses"
    if not isinstance(error, (*known, *other)) and not any(text in str(error) for text in texts):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((_TORCH, _OWN))]
    readers = [f for f in outside if not f.filename.startswith(_COURSE)]
    line = _place(outside[-1]) if outside else "a line of torch's"
    if readers and readers[-1] is not outside[-1]:
        line += f", called from {_place(readers[-1])},"
    if isinstance(error, fake_tensor.DataDependentOutputException):
        asks = "needs the value of a tensor (an if, a while, .item(), .tolist(), a number that is printed)"
        way = "take it out of the traced function, or give it a value of your own: a Python number that is passed in"
    elif isinstance(error, fake_tensor.DynamicOutputShapeException):
        asks = "makes a tensor whose shape depends on values (nonzero, unique, a boolean mask as an index)"
        way = "use a fixed shape instead: torch.where, or a capacity, as expert parallelism does"
    else:
        asks = "reads a tensor's memory outside of torch's own operations"
        way = "trace the part around it"
    return f"the model cannot be traced without values: {line} {asks}, and fake tensors have none; {way}"


def _place(frame):
    return f"line {frame.lineno} of {Path(frame.filename).name}: `{frame.line}`"
