"""A shared page on which every rank notes each collective before it makes it.

torch's own check (TORCH_DISTRIBUTED_DEBUG=DETAIL) compares calls by extra messages before each one. All ranks of
a `Ranks` live on one machine, so they can look instead: each writes "my 7th call in this group: all_reduce of
float32 [4], cell line 9" into shared memory, then reads what the others wrote for *their* 7th call. Whoever comes
later sees a difference and raises at once, before gloo crashes or hangs; nothing is sent and nobody waits (about
10 microseconds a call). The page outlives a killed rank, so it also tells what that rank did last.

Calls are seen where Python makes them (`torch.distributed.*`, hence FSDP2 too); the C++ reducer of
DistributedDataParallel and functional collectives make their own, which agree by construction.
"""

import functools
import glob
import mmap
import os
import re
import struct
import sys
import sysconfig
import threading
import zlib

SLOTS, SLOT = 64, 512  # the last calls of a rank, bytes for each
CHANNELS = 512  # counters of a rank: one for each group and each direction of a pair
HEADER = 64
PAGE = HEADER + CHANNELS * 16 + SLOTS * SLOT
_entry = struct.Struct("<QQHH")  # channel, number, length of the call's text, length of the place's text
_count = struct.Struct("<QQ")  # channel, calls so far
_total = struct.Struct("<QQ")  # calls so far in all channels, 1 + slot written last


ANY_SOURCE = 1 << 32  # the channel of receipts whose sender is not known beforehand


def channel(ranks, *key):
    """A channel's 64 bits: a hash of what it is called, then its ranks as a bit set (worlds of up to 32)."""
    return zlib.crc32(repr(key).encode()) << 32 | sum(1 << r for r in set(ranks)) & 0xFFFFFFFF


def ranks_of(channel):
    return [r for r in range(32) if channel >> r & 1]


def _slot_of(channel, number):
    return (channel >> 32 ^ number * 0x9E3779B1) % SLOTS


class CollectiveMismatch(RuntimeError):
    """Two ranks of a group made different calls where they had to make the same one."""


class Ledger:
    """One page for each of `n` ranks, in a file that the notebook and all ranks map."""

    def __init__(self, path, n, create=False):
        self.n, self.writing = n, threading.Lock()
        with open(path, "w+b" if create else "r+b") as file:
            if create:
                # not truncate: on a full disk this is an error, but a hole in a mapped file is a crash
                file.write(bytes(n * PAGE))
                file.flush()
            self.memory = mmap.mmap(file.fileno(), n * PAGE)

    def clear(self):
        self.memory[:] = bytes(self.n * PAGE)

    def write(self, rank, channel, call, place):
        """Note a call on `rank`'s page; returns its number in the channel (from 1). Threads may call it at once."""
        with self.writing:
            return self._write(rank, channel, call, place)

    def _write(self, rank, channel, call, place):
        base = rank * PAGE
        where, number = self._find(rank, channel)
        if where is None:  # more groups and pairs than there are counters: this one goes unnoted
            return 0
        number += 1
        slot = _slot_of(channel, number)
        at = self._at(rank, slot)
        call, place = call.encode()[:200], place.encode()[-250:]
        self.memory[at : at + 8] = bytes(8)  # nobody reads a half-written entry: its channel is written last
        body = _entry.pack(channel, number, len(call), len(place)) + call + place
        self.memory[at + 8 : at + len(body)] = body[8:]
        self.memory[at : at + 8] = body[:8]
        _count.pack_into(self.memory, where, channel, number)
        _total.pack_into(self.memory, base, _total.unpack_from(self.memory, base)[0] + 1, slot + 1)
        return number

    def read(self, rank, channel, number):
        """(call, place) that `rank` noted as its `number`-th in the channel, or None."""
        found = self._entry(self._at(rank, _slot_of(channel, number)))
        return found[2:] if found and found[:2] == (channel, number) else None

    def last(self, rank):
        """(call, place) of the newest note of `rank`, or None."""
        slot = _total.unpack_from(self.memory, rank * PAGE)[1]
        found = self._entry(self._at(rank, slot - 1)) if slot else None
        return found and found[2:]

    def total(self, rank):
        return _total.unpack_from(self.memory, rank * PAGE)[0]

    def calls(self, rank, channel):
        return self._find(rank, channel)[1]

    def counts(self, rank):
        """{channel: calls so far}"""
        start = rank * PAGE + HEADER
        table = _count.iter_unpack(self.memory[start : start + CHANNELS * 16])
        return {channel: number for channel, number in table if channel}

    def behind(self):
        """What does not add up: [(ranks that are ahead, ranks that are behind)], one for each channel on which
        its ranks have not made the same number of calls."""
        counts = [self.counts(rank) for rank in range(self.n)]
        loose = any(ANY_SOURCE in c for c in counts)  # then sends cannot be matched with receipts one by one
        found = []
        for here in sorted(set().union(*counts) - {ANY_SOURCE}):
            made = {rank: counts[rank].get(here, 0) for rank in ranks_of(here) if rank < self.n}
            most = max(made.values())
            late = [rank for rank, number in made.items() if number < most]
            if late and not (loose and len(made) == 2):
                found.append(([rank for rank in made if rank not in late], late))
        return found

    def _find(self, rank, channel):
        start = rank * PAGE + HEADER
        for probe in range(CHANNELS):
            where = start + ((channel >> 32) + probe) % CHANNELS * 16
            known, number = _count.unpack_from(self.memory, where)
            if known in (0, channel):
                return where, number
        return None, 0

    def _at(self, rank, slot):
        return rank * PAGE + HEADER + CHANNELS * 16 + slot * SLOT

    def _entry(self, at):
        channel, number, a, b = _entry.unpack_from(self.memory, at)
        if not channel:
            return None
        text = self.memory[at + _entry.size : at + _entry.size + a + b]
        if _entry.unpack_from(self.memory, at) != (channel, number, a, b):
            return None  # overwritten meanwhile: its rank is many calls further on
        return channel, number, text[:a].decode(errors="replace"), text[a:].decode(errors="replace")


# ---- which code is the reader's -------------------------------------------------------------------------------

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_NOT_THE_READERS = tuple(
    {_PACKAGE, "<frozen", "<string>"}
    | {os.path.abspath(p) + os.sep for k, p in sysconfig.get_paths().items() if k in ("stdlib", "purelib", "platlib")}
)
_PACKAGES = re.compile(r"[/\\](site|dist)-packages[/\\]")


@functools.lru_cache(maxsize=4096)
def is_readers(filename):
    """True for code of the reader (a cell, a script, a module beside it), False for this package, the standard library
    and what pip has installed, wherever that is."""
    if filename.startswith(_NOT_THE_READERS) or _PACKAGES.search(filename):
        return False
    return not filename.startswith(_folders_of_pip(tuple(sys.path)))


@functools.lru_cache
def _folders_of_pip(path):
    """Folders of sys.path into which pip has installed something, as `pip install --target` does."""
    return tuple(
        f"{os.path.abspath(p)}{os.sep}" for p in path if p and glob.glob(os.path.join(glob.escape(p), "*.dist-info"))
    )


def is_ours(filename):
    """True for code of this package."""
    return filename.startswith(_PACKAGE)


def place(frame=None):
    """`file:line` of the innermost frame that is the reader's own, or of the caller where none is."""
    frame = first = frame or sys._getframe(1)
    while frame is not None:
        if is_readers(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{first.f_code.co_filename}:{first.f_lineno}"


# ---- noting the calls -----------------------------------------------------------------------------------------

_SAME = {  # method of ProcessGroup: (its public name, where in its arguments the tensors are that must agree)
    "allreduce": ("all_reduce", 0),
    "allreduce_coalesced": ("all_reduce_coalesced", 0),
    "broadcast": ("broadcast", 0),
    "reduce": ("reduce", 0),
    "allgather": ("all_gather", 1),
    "_allgather_base": ("all_gather_into_tensor", 1),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor_coalesced", 1),
    "reduce_scatter": ("reduce_scatter", 0),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced", 1),
    "alltoall": ("all_to_all", None),
    "alltoall_base": ("all_to_all_single", None),
    "gather": ("gather", 1),
    "scatter": ("scatter", 0),
    "barrier": ("barrier", None),
}


def _what(tensors):
    import torch

    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return ", ".join(f"{str(t.dtype)[6:]} {list(t.shape)}" for t in tensors)


def _told(name, at, args, kwargs):
    """A call as one line of text that must be the same on every rank."""
    parts = [] if at is None else [_what(args[at])]
    options = kwargs.get("opts", args[-1] if args else None)
    if (op := getattr(options, "reduceOp", None)) is not None:
        parts.append(op.op.name)
    if name in ("broadcast", "reduce", "gather", "scatter"):
        parts.append(f"root {options.rootRank}")
    return f"{name}({', '.join(parts)})"


def install(ledger, rank, started):
    """Make every collective and send/recv that Python code starts on this rank note itself first. started: called with
    each one's work, the group's name ("" of a message), channel, number, members, the call and its place; it returns
    the work."""
    import torch.distributed as dist

    cls = dist.ProcessGroup
    for method, (name, at) in _SAME.items():
        if hasattr(cls, method):
            setattr(cls, method, _eager(_noting(ledger, rank, getattr(cls, method), name, at, started)))
    for method in ("send", "recv"):
        setattr(cls, method, _eager(_noting_p2p(ledger, rank, getattr(cls, method), method, started)))
    cls.recv_anysource = _eager(_noting_any_source(ledger, rank, cls.recv_anysource, started))


def _eager(function):
    """Let torch.compile leave it alone, and what it calls: what stands here cannot become part of a graph."""
    # torch.compiler.disable would do, but imports the compiler, which takes a rank as long as all the rest of its start
    from torch._C._dynamo import eval_frame as frames

    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
    frames.set_code_exec_strategy(function.__code__, skip)
    return function


_known = {}  # group name: global ranks


def _members(group):
    import torch.distributed as dist

    name = group.group_name
    if name not in _known:
        _known[name] = tuple(dist.get_process_group_ranks(group))
    return _known[name]


def _noting(ledger, rank, method, name, at, started):
    @functools.wraps(method)
    def call(group, *args, **kwargs):
        members = _members(group)
        here, this = channel(members, group.group_name), _told(name, at, args, kwargs)
        where = place()
        number = ledger.write(rank, here, this, where)
        for other in members:
            that = number and other != rank and ledger.read(other, here, number)
            if that and that[0] != this:
                whose = "" if len(members) == ledger.n else f" (here: the group of ranks {list(members)})"
                raise CollectiveMismatch(
                    f"{_advice(this, that[0])}{whose}\n"
                    f"      rank {rank} makes {this} at {where},\n      but rank {other} makes {that[0]} at {that[1]}"
                )
        work = method(group, *args, **kwargs)
        return started(work, group.group_name, here, number, members, this, where)

    return call


def _advice(mine, theirs):
    if mine.split("(")[0] != theirs.split("(")[0]:
        return "all ranks of a group must make the same calls in the same order"
    return "all ranks of a group must call with the same shape, dtype, operation and root"


def _noting_p2p(ledger, rank, method, name, started):
    @functools.wraps(method)
    def call(group, tensors, peer, tag=0, *args, **kwargs):
        members = _members(group)
        if not 0 <= peer < len(members):
            verb = "send to" if name == "send" else "receive from"
            raise ValueError(f"there is no rank {peer} to {verb}: the group has ranks 0 to {len(members) - 1}")
        other = members[peer]
        if other == rank:
            raise ValueError(f"rank {rank} {'sends to' if name == 'send' else 'receives from'} itself: copy_ does that")
        pair = (rank, other) if name == "send" else (other, rank)
        # a message and its receipt are one entry each in a channel of this pair, numbered alike
        here, where = channel(pair, group.group_name, pair, tag), place()
        this = f"{name}({_what(tensors)}, {'to' if name == 'send' else 'from'} rank {other})"
        number = ledger.write(rank, here, this, where)
        loose = ledger.calls(rank, ANY_SOURCE) or ledger.calls(other, ANY_SOURCE)  # their numbers do not match up
        that = number and other != rank and not loose and ledger.read(other, here, number)
        if that and _size(that[0]) != _size(this):
            raise CollectiveMismatch(
                "a message must be received into a tensor of the same size and dtype\n"
                f"      rank {rank} makes {this} at {where},\n      but rank {other} makes {that[0]} at {that[1]}"
            )
        work = method(group, tensors, peer, tag, *args, **kwargs)
        return started(work, "", here, number, (rank, other), this, where)

    return call


def _noting_any_source(ledger, rank, method, started):
    @functools.wraps(method)
    def call(group, tensors, *args, **kwargs):
        this, where = f"recv({_what(tensors)}, from any rank)", place()
        number = ledger.write(rank, ANY_SOURCE, this, where)
        return started(method(group, tensors, *args, **kwargs), "", ANY_SOURCE, number, _members(group), this, where)

    return call


def _size(text):
    """dtype and number of elements in a noted send or recv: a message may be received in another shape."""
    dtype, _, shape = text[text.index("(") + 1 : text.index("]")].partition(" [")
    count = 1
    for n in filter(None, shape.split(",")):
        count *= int(n)
    return dtype, count
