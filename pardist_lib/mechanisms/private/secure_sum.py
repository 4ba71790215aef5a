"""Secure aggregation on ranks: every rank hosts some clients, one of them also serves, and carries their messages.

What is sent and why is in secure_aggregation.py. n: clients; d: numbers in a vector; k: clients that a rank hosts.
Bytes, where nobody falls silent (the server's own clients' messages stay where they are):

    rank → server    k · (64 keys + 64·(n - 1) shares + 4·d masked + 16·n answers)
    server → rank    64·n keys + k · 64·(n - 1) shares; and 4·d, the sum, broadcast
    on each rank     all-reduces 4·n before each of the four messages, to see who is there; 8·n + 16 at the start

For a client that fell silent after its shares every answer has 32 bytes instead of 16. An all-reduce tells here who is
still there; between machines there would be timeouts. All messages pass through the host's memory, over gloo.
"""

from itertools import accumulate

import torch
import torch.distributed as dist

from ..collectives.point_to_point import exchange, wait
from ..group import rank_and_size, within
from .checks import check_enough, check_names, check_one_host, check_same_length, check_threshold
from .secure_aggregation import KEY_BYTES, MESSAGES, SHARE_BYTES, Client, decode, encode, unmask


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
    silent = silent or {}
    check_threshold(clients, threshold)
    check_names(vectors, silent, clients, MESSAGES)
    hosts = _hosts(vectors, clients, group)
    size = check_same_length(vectors, group)
    encoded = {c: encode(v.flatten(), clients, fraction_bits) for c, v in vectors.items()}
    post = _Post(hosts, within(group, server), group)
    here = {c: Client(c, clients, threshold) for c in sorted(vectors)}

    def there(message):
        """The clients that still send this message, known to all ranks."""
        flags = torch.zeros(clients, dtype=torch.int32)
        for c in here:
            flags[c] = c not in silent or MESSAGES.index(message) < MESSAGES.index(silent[c])
        dist.all_reduce(flags, group=group)
        found = [c for c in range(clients) if flags[c]]
        check_enough(found, range(clients), threshold, f"sent {message}" + " vectors" * (message == "masked"))
        return found

    first = there("keys")
    keys = post.up({c: here[c].keys() for c in first if c in here}, first, KEY_BYTES)
    keys = post.to_all(keys, first, KEY_BYTES)

    second = there("shares")
    to = {c: [o for o in first if o != c] for c in second}  # whom each client gives shares
    sealed = {c: here[c].shares(keys) for c in second if c in here}
    sealed = {c: b"".join(boxes[o] for o in to[c]) for c, boxes in sealed.items()}
    sealed = post.up(sealed, second, SHARE_BYTES * (len(first) - 1))

    boxes = {c: _cut(whole, dict.fromkeys(to[c], SHARE_BYTES)) for c, whole in sealed.items()}
    givers = {c: [o for o in second if o != c] for c in second}  # from whom each client gets shares
    mail = {c: b"".join(boxes[o][c] for o in givers[c]) for c in second} if post.serving else {}
    mail = post.down(mail, second, SHARE_BYTES * (len(second) - 1))

    third = there("masked")
    got = {c: _cut(mail[c], dict.fromkeys(givers[c], SHARE_BYTES)) for c in third if c in here}
    masked = {c: here[c].masked(encoded[c], shares) for c, shares in got.items()}
    masked = post.up({c: m.numpy().tobytes() for c, m in masked.items()}, third, 4 * size)

    fourth = there("answers")
    widths = {c: 16 if c in third else 32 for c in second}
    answers = {c: here[c].answers(third) for c in fourth if c in here}
    answers = {c: b"".join(shares[o] for o in second) for c, shares in answers.items()}
    answers = post.up(answers, fourth, sum(widths.values()))

    total = torch.zeros(size, dtype=torch.int32)
    if post.serving:
        masked = {c: torch.frombuffer(bytearray(m), dtype=torch.int32) if size else total for c, m in masked.items()}
        answers = {c: _cut(whole, widths) for c, whole in answers.items()}
        total = unmask(masked, keys, second, answers, threshold)
    dist.broadcast(total, server, group=group)
    return decode(total, fraction_bits), third


def _hosts(vectors, clients, group):
    """[the rank of the group that hosts each client], the same on all ranks."""
    rank, _ = rank_and_size(group)
    hosts = torch.zeros(clients, 2, dtype=torch.int32)  # how many ranks have it; the number of one of those
    for c in vectors:
        hosts[c] = torch.tensor([1, rank])
    dist.all_reduce(hosts, group=group)
    check_one_host(dict(enumerate(hosts[:, 0].tolist())))
    return hosts[:, 1].tolist()


def _cut(whole, widths):
    """{name: its bytes}. widths: {name: how many bytes}, in the order in which they lie there."""
    ends = zip(widths.items(), accumulate(widths.values()), strict=True)
    return {name: whole[end - width : end] for (name, width), end in ends}


class _Post:
    """Carries messages of known length between hosts and server, those of all clients of a rank in one piece."""

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
        return _cut(whole.numpy().tobytes(), dict.fromkeys(names, width))

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
