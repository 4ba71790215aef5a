"""What the ranks of a pipeline send one another: outputs to the next stage, their gradients to the one before.

Who sends what, and in which order, stands in the schedule, which all ranks have. So a receive is posted before it is
needed, while the rank still computes what comes before, and no message has a header, but for the first of its size.

All ranks take all messages in one order, that of the schedule where each action takes as long as any other. gloo's
messages do not wait for each other. Those of an nccl communicator do, each rank's in the order in which it starts them:
there a rank posts, before it sends, the receives that come before in that order, and no others. Who is first among
those that still wait then waits for nobody.
"""

import json

import torch

from ..collectives.point_to_point import exchange, on_nccl, wait
from .schedule import Schedule
from .simulate import run

HEADER = 2048  # bytes
# Receives are posted for the next action while this one is computed, and for those after it until so many bytes are
# expected. gloo sends at once what the other side waits for already: with small messages that is a third of the time.
EXPECTED = 4 << 20


def sent(action, rank_of):
    """(key, rank that needs it) of what this action gives another stage; None where nobody waits for it.

    key: ("F" or "B", the stage it is for, micro-batch).
    """
    stage = action.stage + {"F": 1, "B": -1, "I": -1, "W": -len(rank_of)}[action.kind]
    if stage not in range(len(rank_of)):
        return None
    return ("F" if action.kind == "F" else "B", stage, action.micro_batch), rank_of[stage]


def needed(action, last):
    """The key of what this action waits for from another stage; None where it waits for nothing."""
    if action.kind == "F":
        return ("F", action.stage, action.micro_batch) if action.stage else None
    return ("B", action.stage, action.micro_batch) if action.kind in "BI" and action.stage < last else None


class Routes:
    """One rank's messages, as far as the schedule says. rows: every rank's actions of a step."""

    def __init__(self, rows, rank, rank_of):
        self.rank, self.last, self.row = rank, len(rank_of) - 1, rows[rank]
        self.used_at = {}  # {key: its place in the row of whom it is for}
        messages = []  # [(end of the action that sends it, sender, place in the sender's row, key, receiver)]
        alike = {(stage, kind): 1 for stage in range(len(rank_of)) for kind in "FBIW"}
        for sender, timed in enumerate(run(Schedule(rows), alike)):
            for place, (action, _, end) in enumerate(timed):
                if (key := needed(action, self.last)) is not None:
                    self.used_at[key] = place
                if (message := sent(action, rank_of)) is not None and message[1] != sender:
                    messages.append((end, sender, place, *message))
        self.coming = []  # [(key, sender, place in its row)] of what others send to this rank, in the order of all
        self.before = {}  # {key of what this rank sends or receives: how many of `coming` are before it}
        for _, sender, place, key, receiver in sorted(messages):
            if rank in (sender, receiver):
                self.before[key] = len(self.coming)
            if rank == receiver:
                self.coming.append((key, sender, place))


class Mail:
    """One rank's messages during one step.

    shapes: the `Shapes` of what travels; device: where received tensors are made.
    """

    def __init__(self, routes, shapes, group, device):
        self.routes, self.shapes, self.group, self.device = routes, shapes, group, device
        self.in_order = on_nccl(torch.empty(0, device=device), group)
        self.posted = self.bytes = 0  # how many of `coming` are; bytes of those that are not yet taken
        self.arriving, self.here = {}, {}  # {key: (tensors, works)}, {key: tensors}, the latter from this rank itself
        self.under_way = {}  # {rank: [(place where it uses it, tensors, works)]}

    # ---- sending --------------------------------------------------------------------------------------------------

    def give(self, key, receiver, tensors, header=None):
        """Send, without waiting; `header` is what the receiver has to know first."""
        if receiver == self.routes.rank:
            self.here[key] = tensors
            return
        if self.in_order:
            self._post_up_to(self.routes.before[key])
        messages = [t.detach().contiguous() for t in tensors]
        if header is not None:
            messages.insert(0, _written(header, self.device))
        works = [work for t in messages for work in exchange(sends=[(t, receiver)], group=self.group)]
        self.under_way.setdefault(receiver, []).append((self.routes.used_at[key], messages, works))

    # ---- receiving ------------------------------------------------------------------------------------------------

    def post(self, place):
        """Receives for the action at this place of the row, for the next one, and for more of them."""
        if self.in_order:
            return
        keys = [needed(action, self.routes.last) for action in self.routes.row[place : place + 2]]
        soon = max(self.routes.before.get(key, -1) for key in keys)
        while self.posted < len(self.routes.coming) and (self.posted <= soon or self.bytes < EXPECTED):
            if not self._post_next(waiting=False):
                return

    def take(self, key):
        """Wait for a message: its tensors."""
        if key in self.here:
            return self.here.pop(key)
        place = self.routes.before[key]
        self._post_up_to(place + 1)
        tensors, works = self.arriving.pop(key)
        self.bytes -= sum(t.nbytes for t in tensors)
        wait(works)
        self._let_go(*self.routes.coming[place][1:])
        return tensors

    def _post_up_to(self, count):
        while self.posted < count:
            self._post_next(waiting=True)

    def _post_next(self, waiting):
        """Whether the shapes are known, without which there can be no receive; with waiting=True waits to be told."""
        key, sender, _ = self.routes.coming[self.posted]
        shapes = self.shapes.of(key)
        if shapes is None:
            if not waiting:
                return False
            header = torch.empty(HEADER, dtype=torch.uint8, device=self.device)
            wait(exchange(receives=[(header, sender)], group=self.group))
            shapes = self.shapes.learn(key, _read(header))
        tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in shapes]
        works = [work for t in tensors for work in exchange(receives=[(t, sender)], group=self.group)]
        self.arriving[key] = tensors, works
        self.posted += 1
        self.bytes += sum(t.nbytes for t in tensors)
        return True

    def _let_go(self, other, place):
        """What `other` sent after this place of its row tells that it has received all that it used up to there."""
        kept = []
        for used, tensors, works in self.under_way.get(other, ()):
            if used <= place:
                wait(works)  # returns at once
            else:
                kept.append((used, tensors, works))
        self.under_way[other] = kept

    def end(self):
        """Wait until all that this rank has sent is received."""
        for messages in self.under_way.values():
            for *_, works in messages:
                wait(works)
        self.under_way.clear()


def _written(header, device):
    text = json.dumps(header).encode()
    if len(text) > HEADER:
        raise ValueError(f"the shapes of {len(header[1])} tensors between two stages do not fit in {HEADER} bytes")
    return torch.frombuffer(bytearray(text.ljust(HEADER)), dtype=torch.uint8).to(device)


def _read(header):
    return json.loads(bytes(header.tolist()))


class Shapes:
    """What travels between two stages, by the number of rows of the micro-batch: told once, by who computes it first.

    rows: of each micro-batch of this step; training: whether gradients come back.
    """

    def __init__(self):
        self.known = {}  # {(receiving stage, rows, training): [packed, [[shape, dtype's name, requires_grad], …]]}

    def begin(self, rows, training):
        self.rows, self.training = rows, training

    def _place(self, stage, micro_batch):
        return stage, self.rows[micro_batch], self.training

    def of(self, key):
        """[(shape, dtype)] of a message, None where it is not known yet."""
        kind, stage, i = key
        found = self.known.get(self._place(stage + (kind == "B"), i))
        if found is None:
            return None
        return [(s, getattr(torch, d)) for s, d, requires_grad in found[1] if kind == "F" or requires_grad]

    def learn(self, key, header):
        self.known[self._place(key[1], key[2])] = header
        return self.of(key)

    def tell(self, stage, i, tensors, packed):
        """What micro-batch i gives this stage. Returns it as a header where it is the first of its size; None for the
        others. RuntimeError where its shapes are not those of the first."""
        header = [packed, [[list(t.shape), str(t.dtype)[6:], t.requires_grad] for t in tensors]]
        first = self.known.setdefault(self._place(stage, i), header)
        if first != header:
            raise RuntimeError(
                f"stage {stage - 1} gives {_spoken(header)} for micro-batch {i}, and gave {_spoken(first)} for another "
                "one with as many rows: what goes from stage to stage may depend on the number of rows only"
            )
        return header if first is header else None

    def received(self, stage, i):
        """(whether it is a tuple, which of its tensors require a gradient) of what this stage was given."""
        packed, tensors = self.known[self._place(stage, i)]
        return packed, [requires_grad for *_, requires_grad in tensors]


def _spoken(header):
    return " and ".join(f"{dtype} {shape}" for shape, dtype, _ in header[1])
