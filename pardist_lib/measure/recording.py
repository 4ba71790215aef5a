"""On a rank: run a function under torch's own profiler, and note what `trace.Trace` needs as plain data.

Three things are read, because none of them knows everything. The *profiler* has the times: of the tensor
operations, of a collective's call (`c10d::allreduce_`) and of its work (`gloo:all_reduce`, in gloo's own thread).
torch's *flight recorder* has the group and the tensors' sizes of every collective, also of those that
DistributedDataParallel's C++ code makes. It leaves out sends and receives, so those get a *label*: while a record
is made, `ProcessGroup.send` and `recv` write size, peer and group into the profile.
"""

import gc
import os
import pickle
from bisect import bisect_left, bisect_right
from collections import defaultdict
from contextlib import contextmanager, nullcontext, suppress
from glob import glob
from itertools import count
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch._C._profiler import _ExperimentalConfig, _RecordFunctionFast
from torch.autograd import profiler
from torch.distributed import distributed_c10d

from .memory import watching

OPERATIONS = {  # torch's name of a call: ours
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::reduce_": "reduce",
    "c10d::allgather_": "all_gather",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_coalesced_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::gather_": "gather",
    "c10d::scatter_": "scatter",
    "c10d::alltoall_": "all_to_all",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::barrier": "barrier",
    "c10d::monitored_barrier_": "barrier",
    "c10d::send": "send",
    "c10d::recv_": "recv",
    "c10d::recv_any_source_": "recv",
}
RUN, LABEL = "pardist::run", "pardist::message "
COMMUNICATION = ("c10d::", "_c10d_functional::", "gloo:", "pardist::")
NOT_COMPUTE = ("autograd::", "torch::", "torch.", "_c10d_functional_autograd::")  # they only hold operations
SLACK = 50_000  # ns by which two readings of the machine's clock may disagree


def record(fn, /, *args, memory=False, **kwargs):
    """Run `fn(*args, **kwargs)` on this rank; returns (its result, a record of it: plain data for `Trace`).

    The record: (rank, start, end, messages, compute), and with memory=True a sixth, (times, bytes by kind) as in
    memory.py, else None; a seventh, regions, where the run marked any. messages: a list of (name, start, end, bytes,
    group, peer, torch's name of the group) in the order of the calls; compute: (names, integer array (operations, 3) of
    index of name, start, end); regions: [(name, start, end)] of torch.profiler.record_function. Times in ns of the
    machine's clock, which all its ranks share. Conventions are `Trace`'s.

    Costs about 0.3 µs for each tensor operation while `fn` runs, a few µs for each send and receive, and
    afterwards some 5 µs for each operation and 15 µs for each collective that the flight recorder holds. Sends
    nothing. What `fn` raises passes through.

    Raises RuntimeError where another profiler runs, and where the flight recorder did not keep all collectives of
    the run (it keeps the last TORCH_FR_BUFFER_SIZE of a process, 2000 by default).
    """
    if torch.autograd._profiler_enabled() or profiler._is_profiler_enabled:
        raise RuntimeError("this rank is being profiled already: a trace cannot be taken inside another profile")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints a line at each start and stop
    settings = {
        "use_device": "cuda" if torch.cuda.is_available() else None,
        "experimental_config": _ExperimentalConfig(profile_all_threads=True),
    }
    with _members_of_groups() as members, _labelled_messages() as unknown_senders, _undisturbed():
        with profiler.profile(**settings) as profile, _RecordFunctionFast(RUN):
            with watching() if memory else nullcontext() as watch:
                result = fn(*args, **kwargs)
    collecting = gc.isenabled()
    gc.disable()  # a pass through all of torch's objects would take longer than what follows
    try:
        rank = dist.get_rank() if dist.is_initialized() else 0
        *made, regions = rank, *_read(profile.kineto_results.events(), members, unknown_senders)
        held = [watch.history()] if memory else [None] * bool(regions)
        return result, (*made, *held, *[regions] * bool(regions))
    finally:
        if collecting:
            gc.enable()


_DISTURBED = "the function started a profiler of its own, which ended the trace"


@contextmanager
def _undisturbed():
    """Say what has happened where torch before 2.13 finds no profiler to stop; a newer one has only lost its events."""
    try:
        yield
    except RuntimeError as error:
        if "disable Kineto profiler" not in str(error):
            raise
        raise RuntimeError(_DISTURBED) from None


@contextmanager
def _members_of_groups():
    """{group name: global ranks} of the groups that exist, and of those made while this is open: a function may
    make a group, use it and destroy it."""
    members, make = {}, distributed_c10d._new_process_group_helper

    def made(*args, **kwargs):
        group, store = make(*args, **kwargs)
        ranks = args[2] if len(args) > 2 else kwargs["global_ranks_in_group"]
        if isinstance(group, dist.ProcessGroup):
            members[group.group_name] = tuple(ranks) or tuple(range(group.size()))
        return group, store

    if dist.is_initialized():
        for config in distributed_c10d._get_all_pg_configs():
            members[config["pg_name"]] = tuple(config["ranks"])
    distributed_c10d._new_process_group_helper = made
    try:
        yield members
    finally:
        distributed_c10d._new_process_group_helper = make


@contextmanager
def _labelled_messages():
    """While open, each send and receive stands in the profile under a label with its bytes, peer and group.

    Gives {number: work} of the receipts whose sender is known only once they have ended; the numbers are negative
    and stand in the label for the peer.
    """
    # as the class has them: what getattr gives of pybind's methods would come back unbound
    plain = {name: vars(dist.ProcessGroup)[name] for name in ("send", "recv", "recv_anysource")}
    unknown_senders, numbers = {}, count(-1, -1)

    def label(group, tensors, peer):
        size = sum(t.numel() * t.element_size() for t in tensors)
        return _RecordFunctionFast(f"{LABEL}{size} {peer} {group.group_name}")

    def labelled(call):
        def message(group, tensors, peer, *args, **kwargs):
            with label(group, tensors, peer):
                return call(group, tensors, peer, *args, **kwargs)

        return message

    def receipt(group, tensors, *args, **kwargs):
        number = next(numbers)
        with label(group, tensors, number):
            work = unknown_senders[number] = plain["recv_anysource"](group, tensors, *args, **kwargs)
        return work

    for name, call in plain.items():
        setattr(dist.ProcessGroup, name, receipt if name == "recv_anysource" else labelled(call))
    try:
        yield unknown_senders
    finally:
        for name, call in plain.items():
            setattr(dist.ProcessGroup, name, call)


# ---- from the profile to plain data ---------------------------------------------------------------------------


class _Call:
    """A call to torch.distributed: its label or the flight recorder's entries, and when its work was done."""

    def __init__(self, start, end, name):
        self.start, self.end, self.name = start, end, name
        self.label, self.entries, self.work = None, [], []


def _read(events, members, unknown_senders):
    """(start, end, messages, compute, regions) of a record from the profiler's events."""
    talk, operations, device, regions = _sorted_out(events)
    run = [(start, -end) for start, end, _, name in talk if name == RUN]
    if len(run) != 1:
        raise RuntimeError(_DISTURBED)
    calls, works = _calls(talk)
    _give_entries(calls, run[0][0])
    _give_works(calls, works)
    compute = _kernels(device, events, calls) if device else _operations(talk, operations)
    messages = [_message(call, members, unknown_senders) for call in calls]
    numbers = {}
    table = [(numbers.setdefault(name, len(numbers)), start, end) for name, start, end in compute]
    table = np.array(table, dtype=np.int64).reshape(-1, 3)
    return *run[0], [m for m in messages if m is not None], (list(numbers), table), regions


def _sorted_out(events):
    """Events that tell of communication and those of tensor operations, as (start, -end, thread, name) in such an
    order that what contains comes before what it contains; the GPU's events; and regions, (name, start, end)."""
    talk, operations, device, regions, lists = [], [], [], [], {}
    on_host, gpu = torch.autograd.DeviceType.CPU, torch.cuda.is_available()
    for e in events:
        name = e.name()
        if name not in lists:
            operation = "::" in name and not name.startswith(NOT_COMPUTE) and not e.is_user_annotation()
            lists[name] = talk if name.startswith(COMMUNICATION) else operations if operation else None
        if gpu and e.device_type() != on_host:
            device.append(e)
        elif (rows := lists[name]) is not None:
            rows.append((e.start_ns(), -e.end_ns(), e.device_resource_id(), name))
        elif e.is_user_annotation():
            regions.append((name, e.start_ns(), e.end_ns()))
    return sorted(talk), sorted(operations), device, sorted(regions, key=lambda row: row[1])


def _calls(talk):
    """The calls to torch.distributed (the outermost), and the work done in gloo's threads, by thread."""
    calls, works, last, label = [], defaultdict(list), {}, {}
    for start, end, thread, name in talk:
        end, call = -end, last.get(thread)
        inside = call is not None and start < call.end
        if name in OPERATIONS and not inside:
            last[thread] = _Call(start, end, OPERATIONS[name])
            if thread in label and start < label[thread][0]:
                last[thread].label = label[thread][1]
            calls.append(last[thread])
        elif name.startswith(LABEL):
            label[thread] = end, name.removeprefix(LABEL).split(" ", 2)
        elif name in ("gloo:send", "gloo:recv"):  # these last from the call to the end of their wait()
            if inside and call.name == name[5:]:
                call.work.append((call.start, end))
        elif name.startswith("gloo:"):
            works[thread].append((start, end, name))
    return calls, works


def _give_entries(calls, start):
    """Hand each collective the flight recorder's entries that were made during its call."""
    calls = [c for c in calls if c.name not in ("send", "recv")]
    if not calls:
        return
    starts, entries = [c.start for c in calls], []
    for dump in ("_dump_fr_trace", "_dump_nccl_trace"):
        if hasattr(c10d, dump):
            kept = pickle.loads(getattr(c10d, dump)(True, False, False))["entries"]
            kept.sort(key=lambda e: e["record_id"])
            if kept and kept[0]["record_id"] and kept[0]["time_created_ns"] > calls[0].start - SLACK:
                raise RuntimeError(_TOO_LONG.format(len(calls), len(kept)))
            entries += [e for e in kept if e["time_created_ns"] > start and not e["is_p2p"]]
    if not entries and any(c.name != "barrier" for c in calls):
        raise RuntimeError(_TOO_LONG.format(len(calls), 0))
    for entry in entries:
        at = bisect_right(starts, entry["time_created_ns"]) - 1
        if at >= 0 and entry["time_created_ns"] < calls[at].end + SLACK:
            calls[at].entries.append(entry)


_TOO_LONG = (
    "this run made {} collectives, but torch's flight recorder, which knows their sizes, kept {}: trace fewer "
    "steps, or start the ranks with a larger TORCH_FR_BUFFER_SIZE"
)


def _give_works(calls, works):
    """Hand each collective its work: a group works on its calls in the order in which they were made."""
    owners, queues = _owners_of_threads(), defaultdict(list)
    for thread, done in works.items():
        queues[owners.get(thread)] += done
    for queue in queues.values():
        queue.sort()
    made = [(e["time_created_ns"], e["record_id"], call, e) for call in calls for e in call.entries]
    for when, _, call, entry in sorted(made, key=lambda row: row[:2]):
        group = entry["process_group"][0]
        queue = queues[group if group in queues else None]
        for i, (start, end, name) in enumerate(queue):
            if name == entry["profiling_name"] and start > when - SLACK:
                call.work.append((start, end))
                del queue[i]
                break


def _owners_of_threads():
    """{thread id: group name} of gloo's worker threads, or {} where that cannot be told (on macOS).

    A group starts two when it is made, so in the order of their age they belong to the groups in the order of
    making. Matters only where a rank has the same operation under way in two groups at once.
    """
    if not dist.is_initialized():
        return {}
    groups = [c["pg_name"] for c in distributed_c10d._get_all_pg_configs() if "gloo" in c["backend_config"]]
    threads = []
    for path in glob("/proc/self/task/*/stat"):
        with suppress(OSError), open(path) as file:  # a thread may end meanwhile
            about, _, rest = file.read().rpartition(")")
            if "(pt_gloo_runloop" in about:
                threads.append((int(rest.split()[19]), int(about.split()[0])))  # start time, thread id
    if len(threads) != 2 * len(groups):
        return {}
    return {thread: groups[i // 2] for i, (_, thread) in enumerate(sorted(threads))}


def _message(call, members, unknown_senders):
    """(name, start, end, bytes, group, peer, name of the group) of a call, or None for one that was refused before it
    sent anything."""
    size, group, peer = 0, None, None
    if call.label:
        size, peer, group = int(call.label[0]), int(call.label[1]), call.label[2]
        peer = unknown_senders[peer]._source_rank() if peer in unknown_senders else peer
    elif call.entries:
        size = sum(_bytes(e, "input" if e["input_sizes"] else "output") for e in call.entries)
        group = call.entries[0]["process_group"][0]
    elif call.name not in ("send", "recv", "barrier"):
        return None
    known, group = group, members.get(group, ())
    start = min((w[0] for w in call.work), default=call.start)
    end = max((w[1] for w in call.work), default=call.end)
    return call.name, start, end, size, group, group[peer] if peer in range(len(group)) else None, known


def _bytes(entry, side):
    tensors = zip(entry[f"{side}_sizes"], entry[f"{side}_dtypes"], strict=True)
    return sum(prod(shape) * _ITEMSIZE.get(dtype, 1) for shape, dtype in tensors)


# bytes of an element by C++'s name of the dtype; where not listed, one
_ITEMSIZE = {"Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8, "Double": 8}
_ITEMSIZE |= {"UInt16": 2, "UInt32": 4, "UInt64": 8, "ComplexHalf": 4, "ComplexFloat": 8, "ComplexDouble": 16}


def _operations(talk, operations):
    """The outermost tensor operations as (name, start, end). One in which a rank sends, or waits for a message
    (as DTensor's do), is not compute; the operations inside it are. What torch and gloo do inside a call or its
    work is communication."""
    talks, closed = defaultdict(list), []
    for start, end, thread, name in talk:
        if name.startswith(("c10d::", "_c10d_functional::")):
            talks[thread].append(start)
        if name in OPERATIONS or name.startswith("gloo:") and name not in ("gloo:send", "gloo:recv"):
            closed.append((start, end, thread, None))
    covered, found = defaultdict(int), []
    for start, end, thread, name in sorted(operations + closed, key=lambda row: row[:2]):
        if start < covered[thread]:
            continue
        at = bisect_left(talks[thread], start)
        if name is None:
            covered[thread] = -end
        elif at == len(talks[thread]) or talks[thread][at] >= -end:
            covered[thread] = -end
            found.append((name.removeprefix("aten::"), start, -end))
    return found


def _kernels(device, events, calls):
    """On a GPU compute is what the GPU did, under the name of the operation that launched it; what a call to
    torch.distributed launched is that call's work."""
    launched_by = {e.correlation_id(): e for e in events if e.device_type() == torch.autograd.DeviceType.CPU}
    starts, found = [c.start for c in calls], []
    for e in device:
        launch = launched_by.get(e.linked_correlation_id(), e)
        at = bisect_right(starts, launch.start_ns()) - 1
        if launch is not e and at >= 0 and launch.start_ns() < calls[at].end:
            calls[at].work.append((e.start_ns(), e.end_ns()))
        elif not e.is_user_annotation():
            found.append((launch.name().removeprefix("aten::"), e.start_ns(), e.end_ns()))
    return found
