"""What a run did: every operation and every message of every rank, on one clock.

`record` (of recording.py) runs a function on a rank and notes what happened; `Trace` puts the ranks together.
"""

import gzip
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

from .memory import KINDS, Memory
from .recording import record

__all__ = ["Event", "Trace", "record"]


@dataclass(frozen=True, slots=True)
class Event:
    """One operation or one message of one rank."""

    rank: int
    kind: str  # "compute" | "communication" | "region"
    name: str  # "addmm", ... | "all_reduce", "send", ...
    start: float  # seconds from the trace's zero, the same on all ranks
    end: float
    bytes: int = 0  # payload, see `Trace`
    group: tuple[int, ...] = ()  # global ranks
    peer: int | None = None  # global rank at the other end of a send or receive
    waited_for: int | None = None  # global rank that came last to this call, where this rank came earlier
    waited: float = 0.0  # seconds until it came, at most until `end`


class Trace:
    """What every rank of a run computed and communicated, on one clock; `trace.results` is what it returned.

    records: what `record` gave on each rank, in the order of ranks.

    Compute: the outermost tensor operations (`addmm`, not the `copy_` inside it); on a GPU, its kernels.

    Communication: every collective, send and receive, hand-written or made by DistributedDataParallel, FSDP2 or
    DTensor. On gloo it lasts while gloo works on it (after its call and its turn in the group's queue, until it
    is done: waiting for other ranks is part of it); a send or receive lasts from its call until its `wait`
    returns, or to the end of the trace where nobody waits. On nccl it lasts from its first kernel to its last. Of
    a collective whose work had not begun when the trace ended, only the call is shown.

    Bytes are the payload: the size of the tensors that the call was given on that rank, not what went over the
    wire. Where a call has an input and an output it is the input:

        all_reduce, broadcast, reduce    the tensor, on every rank
        all_gather                       the rank's own shard
        reduce_scatter, all_to_all       all that is handed in: n pieces
        gather                           the rank's own tensor, on the root too
        scatter                          the whole list on the root; elsewhere the one tensor that is filled
        send, recv                       the tensor
        barrier                          0

    Waiting: the k-th call of a group on one rank is the k-th on all its ranks; the rank that began it last is whom the
    others waited for. A receive waits for its sender, the k-th receive from a rank for its k-th send. (A broadcast's or
    scatter's own ranks may leave before the last one comes: then nobody is named.)

    Communication is *hidden* while the same rank computes, and *exposed* the rest of the time: `rows` has both.

    With memory=True (`ranks.trace(fn, memory=True)`) `memory` is what each rank held, `Memory` by rank; that costs
    about 25 µs for each operation more, so read the times of such a trace with care.

    A call that raises before anything was sent is left out. gloo does some operations by way of another; they
    stand here under the name that was called.
    """

    def __init__(self, records):
        results, ranks = zip(*records, strict=True)
        self._ranks, self._regions = [r[:5] for r in ranks], [r[6] if len(r) > 6 else [] for r in ranks]
        self.results = list(results)
        self.world_size = len(results)
        self._zero = min(start for _, start, *_ in ranks)
        self._memory = [r[5] if len(r) > 5 else None for r in ranks]

    @property
    def seconds(self):
        """From the first rank's start to the last rank's end."""
        return (max(end for _, _, end, *_ in self._ranks) - self._zero) / 1e9

    @cached_property
    def collectives(self):
        """The communication events, sends and receives too, by start."""
        zero, waits = self._zero, _waits(self._ranks)
        found = []
        for (rank, _, _, messages, _), waited in zip(self._ranks, waits, strict=True):
            for (name, start, end, size, group, peer, *_), (who, late) in zip(messages, waited, strict=True):
                times = (start - zero) / 1e9, (end - zero) / 1e9
                found.append(Event(rank, "communication", name, *times, size, group, peer, who, late / 1e9))
        return sorted(found, key=lambda e: e.start)

    @cached_property
    def regions(self):
        """What the run marked with `torch.profiler.record_function(name)`, by start: a Pipeline its actions, a reader
        what they like."""
        found = []
        for (rank, *_), regions in zip(self._ranks, self._regions, strict=True):
            for name, start, end in regions:
                found.append(Event(rank, "region", name, (start - self._zero) / 1e9, (end - self._zero) / 1e9))
        return sorted(found, key=lambda e: e.start)

    @property
    def memory(self):
        """{rank: `Memory`}; {} unless the trace was taken with memory=True."""
        return {
            rank: Memory(rank, (history[0] - self._zero) / 1e9, history[1])
            for (rank, *_), history in zip(self._ranks, self._memory, strict=True)
            if history is not None
        }

    @cached_property
    def events(self):
        """All events by start."""
        found = list(self.collectives)
        for rank, _, _, _, (names, table) in self._ranks:
            times = (table[:, 1:] - self._zero) / 1e9
            for index, (start, end) in zip(table[:, 0].tolist(), times.tolist(), strict=True):
                found.append(Event(rank, "compute", names[index], start, end))
        return sorted(found, key=lambda e: e.start)

    def bytes(self, op=None, rank=None):
        """Payload bytes of all communication, or of one operation ("all_reduce"), or of one rank."""
        return sum(e.bytes for e in self.collectives if op in (None, e.name) and rank in (None, e.rank))

    def rows(self):
        """For each rank: calls, payload bytes, how long it computed and communicated, how much of the communication
        was hidden behind compute and how much exposed (in ms; what overlaps is counted once), as a list of dicts."""
        rows = []
        for rank, _, _, messages, (_, table) in self._ranks:
            compute, talk = [table[:, 1:].tolist(), [m[1:3] for m in messages]]
            worked, talked, both = _covered(compute), _covered(talk), _covered([*compute, *talk])
            rows.append(
                {
                    "rank": rank,
                    "calls": len(messages),
                    "bytes": sum(m[3] for m in messages),
                    "compute ms": round(worked / 1e6, 1),
                    "communication ms": round(talked / 1e6, 1),
                    "hidden ms": round((worked + talked - both) / 1e6, 1),
                    "exposed ms": round((both - worked) / 1e6, 1),
                }
            )
        return rows

    def to_perfetto(self, path):
        """Write the trace as a file that ui.perfetto.dev and chrome://tracing open: each rank a process with a track
        for compute, tracks for communication (what overlaps lies on several) and, where there are any, for regions and
        for memory by kind; sends are tied to their receives. A path that ends in .gz is compressed. Returns the path.

        Raises ValueError for a path that ends in neither .json nor .json.gz.
        """
        path = Path(path)
        if not path.name.endswith((".json", ".json.gz")):
            raise ValueError(f"to_perfetto: {str(path)!r} must end in .json or .json.gz")
        text = json.dumps({"traceEvents": list(_chrome(self)), "displayTimeUnit": "ms"}, separators=(",", ":"))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return path

    def _cells(self):
        rows = self.rows()
        return [list(rows[0])] + [[f"{v:,}" for v in row.values()] for row in rows]

    def __repr__(self):
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(v.rjust(w) for v, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([f"Trace of {self.world_size} ranks, {self.seconds * 1e3:,.1f} ms", *lines])

    def _repr_html_(self):
        head, *body = [[escape(v) for v in row] for row in self._cells()]
        lines = ["<tr>" + "".join(f"<td>{v}</td>" for v in row) + "</tr>" for row in body]
        caption = f"<caption>Trace of {self.world_size} ranks, {self.seconds * 1e3:,.1f} ms</caption>"
        return f"<table>{caption}<tr><th>{'</th><th>'.join(head)}</th></tr>{''.join(lines)}</table>"


def _covered(intervals):
    """The length of the union of (start, end) pairs."""
    total = until = 0
    for start, end in sorted(map(tuple, intervals)):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def _waits(ranks):
    """For each rank's messages, in their order: (who came last to that call or None, ns waited for it)."""
    met, ends = defaultdict(list), {}  # (which call of which group): [(start, rank, place)]
    for rank, _, _, messages, _ in ranks:
        counts = defaultdict(int)
        for i, (name, start, end, _, group, peer, *known) in enumerate(messages):
            which = *known, group
            if name in ("send", "recv"):
                which = (*which, *((rank, peer) if name == "send" else (peer, rank)))
            turn = counts[which, name == "recv"] = counts[which, name == "recv"] + 1
            met[which, turn].append((start, rank, i, name))
            ends[rank, i] = end
    waits = {rank: [(None, 0)] * len(messages) for rank, _, _, messages, _ in ranks}
    for came in met.values():
        last, who, _, name = max(came)
        if len({rank for _, rank, *_ in came}) < 2 or name == "recv":
            continue  # alone, or a message that was there before it was asked for
        for start, rank, i, _ in came:
            if start < last <= ends[rank, i] and rank != who:
                waits[rank][i] = who, last - start
    return [waits[rank] for rank, *_ in ranks]


def _chrome(trace):
    """The events of Chrome's trace format; times in µs."""
    for rank in range(trace.world_size):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
        yield {"ph": "M", "pid": rank, "tid": 0, "name": "thread_name", "args": {"name": "compute"}}
    free, sent, named = defaultdict(list), defaultdict(list), set()
    for e in trace.events:
        track, args = 0, {}
        if e.kind == "communication":
            lanes = free[e.rank]  # when each track is free again
            track = next((i for i, until in enumerate(lanes) if until <= e.start), len(lanes))
            lanes[track : track + 1] = [e.end]
            args = {"bytes": e.bytes, "group": list(e.group)}
            args |= {"peer": e.peer} if e.peer is not None else {}
            args |= {"waited for": f"rank {e.waited_for}", "waited ms": e.waited * 1e3} if e.waited else {}
            track += 1
            if (e.rank, track) not in named:
                named.add((e.rank, track))
                name = "communication" + (f" {track}" if track > 1 else "")
                yield {"ph": "M", "pid": e.rank, "tid": track, "name": "thread_name", "args": {"name": name}}
            if e.name in ("send", "recv") and e.peer is not None:
                pair = (e.rank, e.peer) if e.name == "send" else (e.peer, e.rank)
                sent[e.group, pair, e.name].append((e, track))
        yield {
            "ph": "X", "cat": e.kind, "name": e.name, "pid": e.rank, "tid": track, "ts": e.start * 1e6,
            "dur": (e.end - e.start) * 1e6, "args": args,
        }  # fmt: skip
    number = 0
    for (group, pair, name), sends in sent.items():
        if name == "send":
            for (s, out), (r, into) in zip(sends, sent.get((group, pair, "recv"), []), strict=False):
                number += 1
                flow = {"cat": "message", "name": "message", "id": number}
                yield {"ph": "s", "pid": s.rank, "tid": out, "ts": s.start * 1e6} | flow
                yield {"ph": "f", "bp": "e", "pid": r.rank, "tid": into, "ts": r.end * 1e6} | flow
    for e in trace.regions:
        track = {"pid": e.rank, "tid": 1000}
        if ("regions", e.rank) not in named:
            named.add(("regions", e.rank))
            yield {"ph": "M", "name": "thread_name", "args": {"name": "regions"}} | track
        yield {"ph": "X", "cat": e.kind, "name": e.name, "ts": e.start * 1e6, "dur": (e.end - e.start) * 1e6} | track
    for rank, memory in trace.memory.items():
        for when, held in zip(memory.times.tolist(), memory.bytes.tolist(), strict=True):
            args = dict(zip(KINDS, held, strict=True))
            yield {"ph": "C", "pid": rank, "name": "memory", "ts": max(when, 0.0) * 1e6, "args": args}
