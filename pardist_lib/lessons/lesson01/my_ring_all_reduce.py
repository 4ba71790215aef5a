"""my_ring_all_reduce: the sum on every rank, a piece at a time. Typically wrong: a step too few, or whole tensors."""

import torch

from pardist_lib.ranks.report import plural

from ..exercises.cases import in_place
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, own_dtype, peers, sent
from .shared import on_every_tensor

hints = (
    "tensor.view(-1).tensor_split(n) gives n pieces that are views: writing into a piece writes into tensor. A "
    "rank sends to (rank - 1) % n and receives from (rank + 1) % n, in every step.",
    "First n - 1 steps: in step s send piece (rank + s) % n, receive into a spare tensor, and add that to piece "
    "(rank + s + 1) % n. After them, rank r has the finished piece (r - 1) % n.",
    "Then n - 1 steps more in which finished pieces go round: with s counting on from n - 1 the same two indices "
    "are right; what arrives replaces the piece instead of being added.",
    "In each step: message = dist.isend(piece, left); dist.recv(spare, right); message.wait().",
)


def check(run):
    on_every_tensor(run, _judge, split=True)


def _judge(seen, before, about):
    n, total, to = len(seen), torch.stack(before).sum(0), peers(seen)
    if any(who - {(r - 1) % n} for r, who in enumerate(to)) and all(who <= {(r + 1) % n} for r, who in enumerate(to)):
        why = "it runs the other way round, as the ring of the lesson does: rank 0 sends to rank 1, and this ring goes "
        why += "to rank - 1, so that other pieces leave and arrive in each step"
        raise Wrong(why, about, f"to rank {n - 1}", "to rank 1")
    few = "one step too few in the first half: n - 1 steps until a piece has every rank's share"
    many = "one step too many in the first half: a rank's own share comes back to it and is added twice"
    copied = (
        "the first half copies what arrives (it has to be added to the rank's own share), or the second half starts "
    )
    copied += "with the wrong piece: rank r has finished piece r - 1, and that one goes out first"
    unused = few  # both give the same
    if _messages(seen[0]) == 2 * (n - 1):
        unused = "what arrives is added into a new tensor, x = x + y: the piece itself has to grow, x += y"
    over = "what arrives is received into the piece itself, over the rank's own share: receive into a spare tensor"
    mistakes = [
        ("only the first half was done: each rank has one finished piece, which has to go round", {"second": 0}),
        ("one step too few in the second half: n - 1 steps bring the finished pieces everywhere", {"second": n - 2}),
        (few, {"first": n - 2}),
        (unused, {"add": None}),
        (many, {"first": n}),
        (many, {"first": n, "second": n - 2}),
        ("the second half adds what arrives: those pieces are finished and have to be copied", {"copy": False}),
        (copied, {"add": False}),
        (over, {"add": "over"}),
    ]
    mistakes = [(why, _ring(before, **how)) for why, how in mistakes]
    if total.is_floating_point():
        mistakes.append((f"divided by {n}: the sum is asked for, not the mean", total / n))
    in_place(seen, [total] * n, before, about, mistakes)
    _judge_traffic(seen, n, before[0], about)
    _judge_pieces(seen, n, before[0], about)


def _messages(one):
    return sum(call.op == "send" for call in one.calls)


def _ring(before, first=None, second=None, add=True, copy=True):
    """What a ring gives with some of its steps left out or done wrong, all ranks in one process.

    add: True; False: it copies; None: it does nothing; "over": what arrives takes the piece's place and is added to
    itself.
    """
    n = len(before)
    first, second = n - 1 if first is None else first, n - 1 if second is None else second
    tensors = [b.clone() for b in before]
    pieces = [t.view(-1).tensor_split(n) for t in tensors]
    for step in range(first + second):
        moved = [pieces[r][(r + step) % n].clone() for r in range(n)]
        how = add if step < first else not copy
        for r in range(n):
            piece, arrived = pieces[r][(r + step + 1) % n], moved[(r + 1) % n]
            if how is not None:
                piece.copy_(2 * arrived if how == "over" else piece + arrived if how else arrived)
    return tensors


def _judge_traffic(seen, n, tensor, about):
    made, to, size, steps = sent(seen), peers(seen), tensor.nbytes, 2 * (n - 1)
    least, most, each = steps * size, steps * n * -(-tensor.numel() // n) * tensor.element_size(), steps * size / n
    shown = about, f"{each:,g} bytes from each rank", ", ".join(f"{b:,}" for b in made) + " bytes"
    if max(made) > sum(made) / n * 1.5 and max(made) > most / n:
        why = f"everything passes through rank {made.index(max(made))}: its link carries {max(made):,} bytes while a "
        raise Wrong(f"the sum is right, but {why}ring asks {each:,g} of each rank", *shown)
    for rank, who in enumerate(to):
        if who - {(rank - 1) % n}:
            why = f"this is no ring: rank {rank} sends to {plural(sorted(who))}, and only rank {(rank - 1) % n} is its "
            raise Wrong(f"the sum is right, but {why}left neighbour", *shown)
    if not least <= sum(made) <= most or (tensor.numel() % n == 0 and made != [each] * n):
        own_dtype(seen, tensor.dtype, about)
        _judge_pieces(seen, n, tensor, about)
        why = f"the sum is right, but {made[0]:,} bytes leave rank 0 where 2(n - 1)/n · S = {each:,g} are enough"
        if made == [(n - 1) * size] * n:
            why += ": whole tensors go round, a ring passes on one n-th at a time"
        elif made == [steps * size] * n:
            why += ": it passes on the whole tensor in each step, one n-th is enough"
        elif all(b and b % size == 0 for b in made):
            why += ": whole tensors are sent, a ring passes on one n-th at a time"
        elif _messages(seen[0]) != steps:
            why += f": it makes {_messages(seen[0])} steps, {steps} are enough"
        raise Wrong(why, *shown)


def _judge_pieces(seen, n, tensor, about):
    """Raise Wrong where n pieces go round that are not n-ths of the tensor: some a whole element larger at most."""
    elements, item = tensor.numel(), tensor.element_size()
    sizes = [[call.bytes / item for call in one.calls if call.op == "send"] for one in seen]
    few, many = elements // n, -(-elements // n)
    if any(len(one) != 2 * (n - 1) for one in sizes) or all(few <= s <= many for one in sizes for s in one):
        return
    pieces = sorted({s for one in sizes for s in one})
    row = elements // tensor.shape[0] if tensor.dim() > 1 else 0
    why = f"the pieces differ by more than one element: {pieces[0]:g} to {pieces[-1]:g}"
    if row and all(s % row == 0 for s in pieces):
        why = "it cuts along the first dimension: tensor.view(-1) first, and then into n pieces"
    elif few in pieces and pieces[-1] > many:
        why = f"one piece takes all that is left over, {pieces[-1]:g} elements: the first ones can take one more each"
    elif many in pieces and pieces[0] < few:
        why = f"every piece but the last is rounded up, and {pieces[0]:g} elements remain for that one"
    fair = f"{few}" if few == many else f"{few} or {many}"
    got = f"{', '.join(f'{s:g}' for s in sizes[0])} elements"
    raise Wrong(f"the sum is right, but {why}", f"rank 0, {about}", f"{fair} elements in each message", got)


WHY = (
    "Adding up and passing round each send (n - 1)/n of the tensor, and no way of sending needs less. NCCL runs "
    "such rings too, in small slices and several at once, and takes trees where the 2(n - 1) latencies weigh more "
    "than the bytes."
)
exercise = Exercise(hints, check, minutes=35, level="hard", why=WHY)
