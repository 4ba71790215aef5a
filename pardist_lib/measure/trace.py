"""What a run did: every operation and every message of every rank, on one clock.

`record` (of recording.py) runs a function on a rank and notes what happened; `Trace` puts the ranks together.
"""

from dataclasses import dataclass
from functools import cached_property
from html import escape

from .recording import record

__all__ = ["Event", "Trace", "record"]


@dataclass(frozen=True, slots=True)
class Event:
    """One operation or one message of one rank."""

    rank: int
    kind: str  # "compute" | "communication"
    name: str  # "addmm", ... | "all_reduce", "send", ...
    start: float  # seconds from the trace's zero, the same on all ranks
    end: float
    bytes: int = 0  # payload, see `Trace`
    group: tuple[int, ...] = ()  # global ranks
    peer: int | None = None  # global rank at the other end of a send or receive


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

    A call that raises before anything was sent is left out. gloo does some operations by way of another; they
    stand here under the name that was called.
    """

    def __init__(self, records):
        results, self._ranks = zip(*records, strict=True)
        self.results = list(results)
        self.world_size = len(results)
        self._zero = min(start for _, start, *_ in self._ranks)

    @property
    def seconds(self):
        """From the first rank's start to the last rank's end."""
        return (max(end for _, _, end, *_ in self._ranks) - self._zero) / 1e9

    @cached_property
    def collectives(self):
        """The communication events, sends and receives too, by start."""
        zero = self._zero
        found = [
            Event(rank, "communication", name, (start - zero) / 1e9, (end - zero) / 1e9, size, group, peer)
            for rank, _, _, messages, _ in self._ranks
            for name, start, end, size, group, peer in messages
        ]
        return sorted(found, key=lambda e: e.start)

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
        """For each rank: calls, payload bytes, and how long it computed and communicated (in ms; what overlaps
        on a rank is counted once), as a list of dicts."""
        rows = []
        for rank, _, _, messages, (_, table) in self._ranks:
            rows.append(
                {
                    "rank": rank,
                    "calls": len(messages),
                    "bytes": sum(m[3] for m in messages),
                    "compute ms": round(_covered(table[:, 1:]) / 1e6, 1),
                    "communication ms": round(_covered([m[1:3] for m in messages]) / 1e6, 1),
                }
            )
        return rows

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
