"""Which calls to other ranks are under way, and who waits for whom.

A rank tells what it has started and what has not come to its end (`under_way`): calls that Python made, on whatever
thread, are noted with their place as they start; those that C++ made for itself (DistributedDataParallel's reducer,
DTensor) are in torch's flight recorder. The notebook puts together what all ranks have told (`calls_of`): a rank is
*in* a call where one of its own is open and its main thread waits, and it *misses* those who have not made that call.
"""

import ast
import linecache
import os
import pickle
import sysconfig
import weakref
from collections import deque
from typing import NamedTuple

from .ledger import ANY_SOURCE, is_readers


class Call(NamedTuple):
    """A call to other ranks that a rank has started."""

    group: str  # its name; "" for a message between two ranks
    channel: object  # of the ledger; of the flight recorder: (group, backend)
    number: int  # the how-manieth it is there
    members: tuple  # the ranks that have to make it
    text: str
    place: str  # file:line in the reader's code, "" where C++ made it


class InCall(NamedTuple):
    """What a waiting rank is in: the call, and the ranks that have not made it (nobody, where that is not known)."""

    call: Call
    missing: frozenset


# ---- on a rank ------------------------------------------------------------------------------------------------

_started = deque(maxlen=256)  # (weak reference to the work, Call): a work that nobody holds, nobody waits for


def started(work, *call):
    """Remember a call that Python has just made, without keeping its work alive. Returns the work."""
    if work is not None:
        _started.append((weakref.ref(work), Call(*call)))
    return work


def under_way():
    """(the calls of this rank that have not ended: those that Python made, those of the flight recorder; {channel of
    the flight recorder: calls so far})"""
    still = [call for ref, call in list(_started) if (work := ref()) is not None and not work.is_completed()]
    try:
        return still, *_recorded()
    except Exception:  # no group yet, or none any more; or a torch whose flight recorder is another one
        return still, [], {}


_DTYPES = {"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64",
           "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}  # fmt: skip


def _recorded():
    """Open calls and counts of the flight recorder, which has all collectives and no send or recv."""
    import torch.distributed as dist
    from torch._C import _distributed_c10d
    from torch.distributed.distributed_c10d import _world

    # pg_group_ranks would also have a group that this rank is not in: a number, without a name
    groups = {group.group_name: tuple(dist.get_process_group_ranks(group)) for group in list(_world.pg_map)}
    still, made = [], {}
    for entry in pickle.loads(_distributed_c10d._dump_fr_trace(True, False, False)).get("entries", ()):
        backend, _, name = entry["profiling_name"].partition(":")
        group, number = entry["process_group"][0], entry["collective_seq_id"]
        if entry["is_p2p"] or group not in groups:
            continue
        made[group, backend] = number
        if not entry["retired"]:
            pairs = zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
            what = ", ".join(f"{_DTYPES.get(dtype, dtype)} {list(size)}" for dtype, size in pairs)
            text = f"{name.lstrip('_')}({what})"
            still.append(Call(group, (group, backend), number, groups[group], text, ""))
    return still, made


def spot(frame):
    """Where in its lines a frame is: (first line, last line, first column, last column) of the call that it makes."""
    places = list(frame.f_code.co_positions())
    return places[frame.f_lasti // 2] if frame.f_lasti >= 0 else None


# ---- in the notebook ------------------------------------------------------------------------------------------


def calls_of(ranks, ledger):
    """{rank: its InCall} of those that wait in one. ranks: link.Rank, asked before where they are."""
    told = {r.number: r.under_way for r in ranks if r.under_way}
    found = {}
    for r in ranks:
        if r.outcome[0] != "busy" or not r.outcome[1] or r.number not in told:
            continue
        noted, recorded, _ = told[r.number]
        known = {call.group for call in noted}
        open_calls = noted + [call for call in recorded if call.group not in known]
        if open_calls and _main_thread_waits(r.outcome[1], r.spot):
            here = next((f"{file}:{line}" for file, line, _ in reversed(r.outcome[1]) if is_readers(file)), None)
            on_this_line = [call for call in open_calls if call.place == here]  # others it would wait for later
            each = [InCall(call, _missing(r.number, call, told, ledger)) for call in on_this_line or open_calls]
            found[r.number] = next((one for one in each if one.missing), each[-1])
    return found


def _missing(rank, call, told, ledger):
    others = [r for r in call.members if r != rank]
    if isinstance(call.channel, tuple):
        late = {r for r in others if r in told and _is_elsewhere(call, *told[r][1:])}
    elif not call.group and any(ledger.calls(r, ANY_SOURCE) for r in call.members):
        late = ()  # a message may have been received by a call that did not name its sender
    else:
        late = {r for r in others if ledger.calls(r, call.channel) < call.number}
    return frozenset(late)


def _is_elsewhere(call, recorded, made):
    """True where a rank that told this has not made a call of the flight recorder, or another one in its stead."""
    instead = [c.text for c in recorded if (c.channel, c.number) == (call.channel, call.number)]
    same_size = call.text.startswith("all_reduce")  # others may rightly be given other sizes on each rank
    mine, *theirs = (text if same_size else text.partition("(")[0] for text in (call.text, *instead))
    return made.get(call.channel, 0) < call.number or any(text != mine for text in theirs)


_STDLIB = os.path.abspath(sysconfig.get_paths()["stdlib"]) + os.sep
_WAITS_THERE = ("threading.py", "queue.py", f"futures{os.sep}_base.py")
_WAITS = {"wait", "join", "result", "get", "value", "acquire", "synchronize"}


def _main_thread_waits(frames, where):
    """True where a stack whose rank has a call open is waiting: it is inside of torch, of this package, or of what
    waits for a thread; or the reader's own line is in a call of that name. In time.sleep, or computing, it is not."""
    for filename, _, _ in reversed(frames):
        if is_readers(filename):
            return called_at(filename, where) in _WAITS
        if filename.startswith(_STDLIB) and f"{os.sep}site-packages{os.sep}" not in filename:
            if filename.endswith(_WAITS_THERE):
                return True
        elif not filename.startswith("<"):
            return True
    return False


def called_at(filename, where):
    """The name of what the code at `where` (as from `spot`) calls: `wait` for work[0].wait(); None where unknown."""
    text = source_at(filename, where)
    try:
        node = ast.parse(text, mode="eval").body if text else None
    except SyntaxError:
        return None
    called = node.func if isinstance(node, ast.Call) else None
    return getattr(called, "attr", getattr(called, "id", None))


def source_at(filename, where):
    """The text of one line at `where`, or of more lines in one; "" where there is none."""
    if not where or None in where:
        return ""
    first, last, begin, end = where
    lines = [linecache.getline(filename, n).encode() for n in range(first, last + 1)]  # columns count bytes
    lines[-1] = lines[-1][:end]
    lines[0] = lines[0][begin:]
    return b" ".join(line.strip() for line in lines).decode(errors="replace")
