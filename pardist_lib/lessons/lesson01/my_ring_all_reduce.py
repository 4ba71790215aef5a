"""The exercise my_ring_all_reduce."""

import torch

from pardist_lib.ranks.report import plural

from ..exercises.cases import call_with_tensor, every_case, in_place, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, own_dtype, peers, sent

hints = (
    "tensor.view(-1).tensor_split(n) gives n pieces that are views: writing into a piece writes into tensor. A "
    "rank sends to (rank + 1) % n and receives from (rank - 1) % n, in every step.",
    "First n - 1 steps: in step s send piece (rank - s) % n, receive into a spare tensor, and add that to piece "
    "(rank - s - 1) % n. After them, rank r has the finished piece (r + 1) % n.",
    "Then n - 1 steps more in which finished pieces go round: with s counting on from n - 1 the same two indices "
    "are right; what arrives replaces the piece instead of being added.",
    "In each step: message = dist.isend(piece, right); dist.recv(spare, left); message.wait().",
)


def check(run):
    def one(n, shape, dtype, seed, about):
        seen = run(call_with_tensor, shape, dtype, seed, n=n, about=about)
        by_hand(seen)
        _judge_ring(seen, [values(shape, dtype, rank, seed) for rank in range(n)], about)

    every_case(one, split=True)


def _judge_ring(seen, before, about):
    n, size = len(seen), before[0].nbytes
    total = torch.stack(before).sum(0)
    to = peers(seen)
    if any(who - {(r + 1) % n} for r, who in enumerate(to)) and all(who <= {(r - 1) % n} for r, who in enumerate(to)):
        raise Wrong(f"it runs the other way round: rank 0 sends to rank {n - 1}, and the ring goes to rank + 1", about,
                    "to rank 1", f"to rank {n - 1}")  # fmt: skip
    mistakes = [
        ("only the first half was done: each rank has one finished piece, which has to go round", {"second": 0}),
        ("one step too few in the second half: n - 1 steps bring the finished pieces everywhere", {"second": n - 2}),
        ("one step too few in the first half: n - 1 steps until a piece has every rank's share", {"first": n - 2}),
        ("what arrives is added into a new tensor, x = x + y: the piece itself has to grow, x += y"
         if sum(call.op == "send" for call in seen[0].calls) == 2 * (n - 1) else  # both give the same
         "one step too few in the first half: n - 1 steps until a piece has every rank's share", {"add": None}),
        ("one step too many in the first half: a rank's own share comes back to it and is added twice", {"first": n}),
        ("one step too many in the first half: a rank's own share comes back to it and is added twice",
         {"first": n, "second": n - 2}),
        ("the second half adds what arrives: those pieces are finished and have to be copied", {"copy": False}),
        ("the first half copies what arrives (it has to be added to the rank's own share), or the second half starts "
         "with the wrong piece: rank r has finished piece r + 1, and that one goes out first", {"add": False}),
        ("what arrives is received into the piece itself, over the rank's own share: receive into a spare tensor",
         {"add": "over"}),
    ]  # fmt: skip
    mistakes = [(why, _ring(before, **how)) for why, how in mistakes]
    if total.is_floating_point():
        mistakes.append((f"divided by {n}: the sum is asked for, not the mean", [total / n] * n))
    in_place(seen, [total] * n, before, about, mistakes)
    _judge_ring_traffic(seen, n, size, before[0], about)


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
        moved = [pieces[r][(r - step) % n].clone() for r in range(n)]
        for r in range(n):
            piece = pieces[r][(r - step - 1) % n]
            if step < first and add is None:
                continue
            if step < first and add == "over":
                piece.copy_(2 * moved[r - 1])
            elif add if step < first else not copy:
                piece += moved[r - 1]
            else:
                piece.copy_(moved[r - 1])
    return tensors


def _judge_ring_traffic(seen, n, size, tensor, about):
    made, to, steps = sent(seen), peers(seen), sum(call.op == "send" for call in seen[0].calls)
    elements, item = tensor.numel(), tensor.element_size()
    least, most = 2 * (n - 1) * size, 2 * (n - 1) * n * -(-elements // n) * item
    each = 2 * (n - 1) * size / n
    shown = {"expected": f"{each:,g} bytes from each rank", "got": ", ".join(f"{b:,}" for b in made) + " bytes"}
    strangers = [(r, sorted(who - {(r + 1) % n})) for r, who in enumerate(to) if who - {(r + 1) % n}]
    if max(made) > sum(made) / n * 1.5 and max(made) > most / n:
        busy = max(range(n), key=lambda r: made[r])
        raise Wrong(f"the sum is right, but everything passes through rank {busy}: its link carries {made[busy]:,} "
                    f"bytes while a ring asks {each:,g} of each rank", about, **shown)  # fmt: skip
    if strangers:
        rank, who = strangers[0]
        raise Wrong(f"the sum is right, but this is no ring: rank {rank} sends to {plural(sorted(to[rank]))}, and only "
                    f"rank {(rank + 1) % n} is its right neighbour", about, **shown)  # fmt: skip
    if not least <= sum(made) <= most or (elements % n == 0 and made != [each] * n):
        own_dtype(seen, tensor.dtype, about)
        _judge_pieces(seen, n, tensor, about)
        why = f"{made[0]:,} bytes leave rank 0 where 2(n - 1)/n · S = {each:,g} are enough"
        if made == [(n - 1) * size] * n:
            why += ": whole tensors go round, a ring passes on one n-th at a time"
        elif made == [2 * (n - 1) * size] * n:
            why += ": it passes on the whole tensor in each step, one n-th is enough"
        elif all(b and b % size == 0 for b in made):
            why += ": whole tensors are sent, a ring passes on one n-th at a time"
        elif steps != 2 * (n - 1):
            why += f": it makes {steps} steps, {2 * (n - 1)} are enough"
        raise Wrong(f"the sum is right, but {why}", about, **shown)
    _judge_pieces(seen, n, tensor, about)


def _judge_pieces(seen, n, tensor, about):
    """Raise Wrong where n pieces go round that are not n-ths of the tensor: some a whole element larger at most."""
    elements, item, steps = tensor.numel(), tensor.element_size(), 2 * (n - 1)
    sizes = [[call.bytes / item for call in one.calls if call.op == "send"] for one in seen]
    few, many = elements // n, -(-elements // n)
    if any(len(one) != steps for one in sizes) or all(few <= s <= many for one in sizes for s in one):
        return
    pieces = sorted({s for one in sizes for s in one})
    row = elements // tensor.shape[0] if tensor.dim() > 1 else 0
    if row and all(s % row == 0 for s in pieces):
        why = "it cuts along the first dimension: tensor.view(-1) first, and then into n pieces"
    elif few in pieces and pieces[-1] > many:
        why = f"one piece takes all that is left over, {pieces[-1]:g} elements: the first ones can take one more each"
    elif many in pieces and pieces[0] < few:
        why = f"every piece but the last is rounded up, and {pieces[0]:g} elements remain for that one"
    else:
        why = f"the pieces differ by more than one element: {pieces[0]:g} to {pieces[-1]:g}"
    size = f"{few}" if few == many else f"{few} or {many}"
    got = ", ".join(f"{s:g}" for s in sizes[0])
    raise Wrong(
        f"the sum is right, but {why}", f"rank 0, {about}", f"{size} elements in each message", f"{got} elements"
    )


exercise = Exercise(hints, check)
