"""Secure aggregation on ranks: every rank hosts some clients, one of them also serves, and carries their messages.

What is sent and why is in secure_aggregation.py. n: clients; d: numbers in a vector; k: clients that a rank hosts.
Bytes, where nobody falls silent (the server's own clients' messages stay where they are):

    rank → server    k · (64 keys + 64·(n - 1) shares + 4·d masked + 16·n answers)
    server → rank    64·n keys + k · 64·(n - 1) shares; and 4·d, the sum, broadcast
    on each rank     4·n to all_reduce, to see who is there, before each of the four messages; 8·n + 16 at the start

Of a client that fell silent after its shares every answer has 32 bytes instead of 16. Between machines there would be
timeouts where the ranks here agree on who is there. All of it passes through the host's memory, over gloo.
"""

import torch
import torch.distributed as dist

from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size, within
from .secure_aggregation import (
    KEY_BYTES,
    MESSAGES,
    SHARE_BYTES,
    Client,
    check_enough,
    check_threshold,
    decode,
    encode,
    unmask,
)


def secure_sum(vectors, clients, threshold=None, *, fraction_bits=16, silent=None, server=0, group=None):
    """(the sum of the clients' vectors, whose they are): (d,) float64 and a list of numbers, on every rank.

    vectors        {client: (d,)}, of the clients that this rank hosts, any or none. Every client from 0 to clients - 1
                   is on exactly one rank.
    threshold      how many have to answer, more than half; None: the smallest such number
    fraction_bits  of the fixed point; the sum is exactly that of the rounded values, to the last bit
    silent         {client: "keys", "shares", "masked" or "answers"}: the first message that a client no longer sends
    server         the global rank that adds up; it may host clients too

    Raises TooFewClients, on every rank, where too many fell silent; ValueError for values that could wrap, a client on
    two ranks or on none, vectors of different lengths, and thresholds that hide nothing.
    """
    threshold = clients // 2 + 1 if threshold is None else threshold
    check_threshold(clients, threshold)
    silent = silent or {}
    if unknown := sorted(set(silent) - set(range(clients))):
        raise ValueError(f"silent: there is no client {unknown[0]}, they are numbered 0 to {clients - 1}")
    if wrong := set(silent.values()) - set(MESSAGES):
        raise ValueError(f"silent says from which message on: one of {', '.join(MESSAGES)}, not {sorted(wrong)[0]!r}")
    hosts, size = _agree(vectors, clients, group)
    encoded = {c: encode(v.flatten(), clients, fraction_bits) for c, v in vectors.items()}
    post = _Post(hosts, within(group, server), group)
    here = {c: Client(c, clients, threshold) for c in sorted(vectors)}

    def there(did):
        """The clients that still send this message, known to all ranks."""
        until = MESSAGES.index(did)
        flags = torch.zeros(clients, dtype=torch.int32)
        for c in here:
            flags[c] = MESSAGES.index(silent.get(c, MESSAGES[-1])) > until or c not in silent
        dist.all_reduce(flags, group=group)
        found = [c for c in range(clients) if flags[c]]
        check_enough(found, range(clients), threshold, f"sent {did}" + " vectors" * (did == "masked"))
        return found

    first = there("keys")
    keys = post.up({c: here[c].keys() for c in first if c in here}, first, KEY_BYTES)
    keys = post.to_all(keys, first, KEY_BYTES)

    second = there("shares")
    to = {c: [o for o in first if o != c] for c in second}
    sealed = {c: here[c].shares(keys) for c in second if c in here}
    sealed = post.up(
        {c: b"".join(s[o] for o in to[c]) for c, s in sealed.items()}, second, SHARE_BYTES * (len(first) - 1)
    )
    boxes = {c: _cut(whole, to[c], SHARE_BYTES) for c, whole in sealed.items()}
    mail = {c: b"".join(boxes[o][c] for o in second if o != c) for c in second} if post.serving else {}
    mail = post.down(mail, second, SHARE_BYTES * (len(second) - 1))

    third = there("masked")
    sent = {c: here[c].masked(encoded[c], _cut(mail[c], [o for o in second if o != c], SHARE_BYTES))
            for c in third if c in here}  # fmt: skip
    arrived = post.up({c: m.numpy().tobytes() for c, m in sent.items()}, third, 4 * size)

    fourth = there("answers")
    widths = [(c, 16 if c in third else 32) for c in second]
    said = {c: here[c].answers(third) for c in fourth if c in here}
    said = post.up({c: b"".join(a[o] for o, _ in widths) for c, a in said.items()}, fourth, sum(w for _, w in widths))
    total = torch.zeros(size, dtype=torch.int32)
    if post.serving:
        arrived = {c: torch.frombuffer(bytearray(m), dtype=torch.int32) if size else total for c, m in arrived.items()}
        answers = {c: _cut_widths(whole, widths) for c, whole in said.items()}
        total = unmask(arrived, keys, second, answers, threshold)
    dist.broadcast(total, server, group=group)
    return decode(total, fraction_bits), third


def _agree(vectors, clients, group):
    """(which rank of the group hosts each client, how many numbers a vector has), the same on all ranks."""
    rank, _ = rank_and_size(group)
    if unknown := sorted(c for c in vectors if not 0 <= c < clients):
        raise ValueError(f"there is no client {unknown[0]}: they are numbered 0 to {clients - 1}")
    owners = torch.zeros(clients, 2, dtype=torch.int32)  # how many ranks have it; one of those
    for c in vectors:
        owners[c] = torch.tensor([1, rank])
    dist.all_reduce(owners, group=group)
    if wrong := [c for c in range(clients) if owners[c, 0] != 1]:
        raise ValueError(f"client {wrong[0]} is on {owners[wrong[0], 0]} ranks: each is hosted by exactly one")
    sizes = {v.numel() for v in vectors.values()}
    extremes = torch.tensor([max(sizes, default=0), max((-s for s in sizes), default=-(2**62))])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"vectors of {-extremes[1]} and of {extremes[0]} numbers cannot be added up")
    return owners[:, 1].tolist(), int(extremes[0])


def _cut(whole, names, width):
    return {name: whole[i * width : (i + 1) * width] for i, name in enumerate(names)}


def _cut_widths(whole, widths):
    pieces, at = {}, 0
    for name, width in widths:
        pieces[name] = whole[at : at + width]
        at += width
    return pieces


class _Post:
    """Carries messages of a known length between hosts and server: all of a rank's clients' in one piece."""

    def __init__(self, hosts, server, group):
        self.hosts, self.server, self.group = hosts, server, group
        self.rank, self.n = rank_and_size(group)
        self.serving = self.rank == server

    def _of(self, rank, clients):
        return [c for c in clients if self.hosts[c] == rank]

    def _send(self, pieces, to):
        if pieces := b"".join(pieces):
            wait(exchange([(torch.frombuffer(bytearray(pieces), dtype=torch.uint8), to)], group=self.group))

    def _receive(self, names, width, source):
        whole = torch.empty(len(names) * width, dtype=torch.uint8)
        wait(exchange((), [(whole, source)], group=self.group))
        return _cut(whole.numpy().tobytes(), names, width)

    def up(self, mine, clients, width):
        """{client: bytes} from all ranks, on the server; elsewhere only what was there."""
        if not self.serving:
            self._send([mine[c] for c in self._of(self.rank, clients)], self.server)
            return mine
        for rank in range(self.n):
            if rank != self.rank:
                mine |= self._receive(self._of(rank, clients), width, rank)
        return mine

    def down(self, messages, clients, width):
        """Each client's own message, to its host."""
        if not self.serving:
            return self._receive(self._of(self.rank, clients), width, self.server)
        for rank in range(self.n):
            if rank != self.rank:
                self._send([messages[c] for c in self._of(rank, clients)], rank)
        return messages

    def to_all(self, messages, names, width):
        """All of the messages to every rank that hosts clients."""
        if not self.serving:
            return self._receive(names, width, self.server) if self.rank in self.hosts else {}
        for rank in set(self.hosts) - {self.rank}:
            self._send([messages[c] for c in names], rank)
        return messages
