"""What the ranks of a pipeline send one another: outputs to the next stage, their gradients to the one before.

Who sends what, and in which order, stands in the schedule, which all ranks have. So a receive is posted before it is
needed, while the rank still computes what comes before, and no message has a header, but for the first of its size.
"""

import json

import torch

from ..collectives.point_to_point import exchange, wait

HEADER = 2048  # bytes
# Receives are posted for the next action while this one is computed, and for those after it until so many bytes are
# expected. gloo sends at once what the other side waits for already: with small messages that is a third of the time.
EXPECTED = 1 << 20


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
        self.expected = {}  # {rank: [keys, in the order in which it sends them to this one]}
        self.sent_at = {}  # {key: its place in the sender's row}
        self.used_at = {}  # {key: its place in the row of whom it is for}
        for sender, row in enumerate(rows):
            for place, action in enumerate(row):
                if (key := needed(action, self.last)) is not None:
                    self.used_at[key] = place
                if (message := sent(action, rank_of)) is not None:
                    key, receiver = message
                    self.sent_at[key] = place
                    if receiver == rank != sender:
                        self.expected.setdefault(sender, []).append(key)
        self.sender = {key: sender for sender, keys in self.expected.items() for key in keys}


class Mail:
    """One rank's messages during one step.

    shapes: the `Shapes` of what travels. device: where received tensors are made.
    """

    def __init__(self, routes, shapes, group, device):
        self.routes, self.shapes, self.group, self.device = routes, shapes, group, device
        self.posted = dict.fromkeys(routes.expected, 0)  # {sender: receives that are posted}
        self.arriving, self.here = {}, {}  # {key: (tensors, works)}, {key: tensors}, the latter from this rank itself
        self.ahead, self.bytes = 0, 0  # the place up to which receives are posted; of those that arrive
        self.under_way = {}  # {rank: [(place where it uses it, tensors, works)]}

    # ---- sending --------------------------------------------------------------------------------------------------

    def give(self, key, receiver, tensors, header=None):
        """Send, without waiting; `header` is what the receiver has to know first."""
        if receiver == self.routes.rank:
            self.here[key] = tensors
            return
        messages = [t.detach().contiguous() for t in tensors]
        if header is not None:
            messages.insert(0, _written(header, self.device))
        works = exchange(sends=[(t, receiver) for t in messages], group=self.group)
        self.under_way.setdefault(receiver, []).append((self.routes.used_at[key], messages, works))

    # ---- receiving ------------------------------------------------------------------------------------------------

    def post(self, place):
        """Receives for the action at this place of the row, for the next one, and for more of them."""
        row, self.ahead = self.routes.row, max(self.ahead, place)
        while self.ahead < len(row) and (self.ahead <= place + 1 or self.bytes < EXPECTED):
            key = needed(row[self.ahead], self.routes.last)
            if key in self.routes.sender and not self._post_up_to(key, waiting=False):
                return
            self.ahead += 1

    def take(self, key):
        """Wait for a message: its tensors."""
        if key not in self.routes.sender:
            return self.here.pop(key)
        self._post_up_to(key, waiting=True)
        tensors, works = self.arriving.pop(key)
        self.bytes -= sum(t.nbytes for t in tensors)
        wait(works)
        self._let_go(self.routes.sender[key], self.routes.sent_at[key])
        return tensors

    def _post_up_to(self, key, waiting):
        """In the order in which they are sent. Where a shape is not known it stops, and says so by False; with
        waiting=True it waits to be told."""
        sender = self.routes.sender[key]
        keys = self.routes.expected[sender]
        while key not in self.arriving:
            following = keys[self.posted[sender]]
            shapes = self.shapes.of(following)
            if shapes is None:
                if not waiting:
                    return False
                header = torch.empty(HEADER, dtype=torch.uint8, device=self.device)
                wait(exchange(receives=[(header, sender)], group=self.group))
                shapes = self.shapes.learn(following, _read(header))
            tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in shapes]
            works = exchange(receives=[(t, sender) for t in tensors], group=self.group)
            self.arriving[following] = tensors, works
            self.posted[sender] += 1
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
