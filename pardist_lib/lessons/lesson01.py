"""The exercises of lesson 01: hints, and how an answer is checked."""

import math

import torch

from pardist_lib.ranks.report import plural

from .cases import call_with_tensor, every_case, in_place, number, numbers, unchanged, values
from .judge import Wrong, by_hand, equal, own_dtype, peers, same, sent, show, type_of
from .watch import watched


class my_broadcast:
    hints = (
        "dist.get_rank() tells a rank which one it is: rank src sends, all the others receive.",
        "dist.recv(tensor, src) writes into `tensor` what rank src sends; every other rank needs a send of its own, "
        "and a rank cannot send to itself.",
        "On rank src: for other in range(dist.get_world_size()), if other != src, dist.send(tensor, other). "
        "On the others: one dist.recv(tensor, src).",
    )

    @staticmethod
    def check(run):
        def one(n, shape, dtype, seed, about):
            before = [values(shape, dtype, rank, seed) for rank in range(n)]
            for src in range(n - 1, -1, -1) if seed == 0 else [n - 1]:
                where = f"src={src}, {about}"
                seen = run(call_with_tensor, shape, dtype, seed, src, n=n, about=where)
                by_hand(seen)
                _judge_broadcast(seen, before, src, where)

        every_case(one)


def _judge_broadcast(seen, before, src, about):
    n, size = len(seen), before[0].nbytes
    others = [r for r in range(n) if r != src]
    got_mail = any(call.op == "recv" for one in seen for call in one.calls)
    nobody = "nobody receives" + f": to the right of rank {src}, the last one, there is nobody" * (src == n - 1)
    mistakes = [
        (f"src is ignored: every rank has rank {r}'s values, and src is {src}", [before[r]] * n)
        for r in range(n) if r != src
    ]  # fmt: skip
    mistakes += [
        ("a message arrives, but not in `tensor`: give recv tensor itself" if got_mail else nobody, before),
        ("what arrives is added to what was there: it has to replace it", [b + before[src] for b in before]),
        ("every rank has its left neighbour's values, not rank src's", [before[r - 1] for r in range(n)]),
    ]  # fmt: skip
    in_place(seen, [before[src]] * n, before, about, mistakes)
    messages = sum(call.op == "send" for one in seen for call in one.calls)
    if sum(sent(seen)) != len(others) * size:
        own_dtype(seen, before[0].dtype, about)
        raise Wrong(
            f"the values are right, but {sum(sent(seen)):,} bytes are sent in {messages} messages: {n - 1} messages of "
            f"{size} bytes are enough, each rank but src receives once", about, f"{len(others) * size} bytes",
            f"{sum(sent(seen))} bytes",
        )  # fmt: skip


class exchange:
    hints = (
        "The neighbours are (rank - 1) % n and (rank + 1) % n: the remainder closes the ring.",
        "dist.send comes back when the other side receives. If all ranks send first, nobody ever receives. dist.isend "
        "and dist.irecv come back at once with a message that you wait for later.",
        "Start two isend and two irecv (into torch.empty_like(tensor)), keep the four messages in a list, then call "
        "wait() on each, then return what was received.",
    )

    @staticmethod
    def check(run):
        def one(n, shape, dtype, seed, about):
            seen = run(call_with_tensor, shape, dtype, seed, n=n, about=about)
            by_hand(seen)
            _judge_exchange(seen, [values(shape, dtype, rank, seed) for rank in range(n)], about)

        every_case(one)


def _judge_exchange(seen, before, about):
    n, size = len(seen), before[0].nbytes
    unchanged(seen, before, about)
    for rank, one in enumerate(seen):
        if not isinstance(one.result, (tuple, list)) or len(one.result) != 2:
            why = f"it returns {type_of(one.result)}: the pair (from_left, from_right) is asked for"
            raise Wrong(why, f"rank {rank}, {about}")
    if n > 2 and all(equal(one.result[0], one.result[1]) for one in seen if isinstance(one.result[1], torch.Tensor)):
        raise Wrong("from_left and from_right are the same: receive into two tensors", f"every rank, {about}")
    left, right = [before[r - 1] for r in range(n)], [before[(r + 1) % n] for r in range(n)]
    for i, (name, expected, other) in enumerate((("from_left", left, right), ("from_right", right, left))):
        mistakes = [
            ("left and right are swapped: from_left comes from rank - 1, from_right from rank + 1", other),
            (f"{name} is the rank's own tensor", before),
            (f"{name} is zero: was it received, or returned before?", [torch.zeros_like(b) for b in before]),
        ]
        got, end = [one.result[i] for one in seen], (0, n - 1)[i]
        bad = [r for r in range(n) if not equal(got[r], expected[r])]
        if n > 2 and bad == [end] and isinstance(got[end], torch.Tensor):
            why = f"{name} is wrong on rank {end} only: its neighbour there is rank {n - 1 - end}, the ring is closed"
            raise Wrong(why, f"rank {end}, {about}", show(expected[end]), show(got[end]))
        same(got, expected, name, about, mistakes)
    for rank, made in enumerate(sent(seen)):
        if made != 2 * size:
            own_dtype(seen, before[0].dtype, about)
            raise Wrong(
                f"the values are right, but rank {rank} sends {made:,} bytes: its tensor of {size} bytes goes once to "
                "each side, 2 messages", about, f"{2 * size} bytes", f"{made} bytes",
            )  # fmt: skip


class my_all_gather:
    hints = (
        "Make the result first: tensor.new_empty(n, *tensor.shape), and put the rank's own tensor into row rank.",
        "Either each rank sends its tensor to every other (isend to all, then receive from all), or all pass on to the "
        "right what they received in the step before: n - 1 steps.",
        "In step s of the ring a rank sends row (rank - s) % n to the right and receives row (rank - s - 1) % n from "
        "the left. Use isend before recv, and wait() after it.",
    )

    @staticmethod
    def check(run):
        def one(n, shape, dtype, seed, about):
            seen = run(call_with_tensor, shape, dtype, seed, n=n, about=about)
            by_hand(seen)
            _judge_gather(seen, [values(shape, dtype, rank, seed) for rank in range(n)], about)

        every_case(one)


def _tensor(value):
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _judge_gather(seen, before, about):
    n, size = len(seen), before[0].nbytes
    unchanged(seen, before, about)
    rows = torch.stack(before)
    shifted = [torch.stack([before[(rank + i) % n] for i in range(n)]) for rank in range(n)]
    backward = [torch.stack([before[(rank - i) % n] for i in range(n)]) for rank in range(n)]
    hand_over = "row r must be rank r's on every rank, here the rows are in order of arrival"
    mistakes = [
        (hand_over, shifted),
        (hand_over, backward),
        (hand_over, [torch.stack([before[r], *before[:r], *before[r + 1 :]]) for r in range(n)]),
        ("the rows are in reverse order: row r must be rank r's", [rows.flip(0)] * n),
        ("every row is the rank's own tensor", [torch.stack([b] * n) for b in before]),
        ("every row is the left neighbour's tensor: what was received has to be passed on, not the own tensor again",
         [torch.stack([before[r] if i == r else before[r - 1] for i in range(n)]) for r in range(n)]),
        ("the tensors are added up: gathering keeps each one", [rows.sum(0).expand_as(rows)] * n),
    ]  # fmt: skip
    got = [one.result for one in seen]
    for rank, result in enumerate(got):
        if isinstance(result, (list, tuple)):
            why = f"it returns a {type(result).__name__}: torch.stack makes one tensor of it"
            raise Wrong(why, f"rank {rank}, {about}")
        if isinstance(result, torch.Tensor) and result.shape != rows.shape:
            if torch.equal(result.flatten(), rows.flatten()):
                why = f"the values are right, but the shape is {tuple(result.shape)}"
                raise Wrong(f"{why}, where {tuple(rows.shape)} is asked for", f"rank {rank}, {about}")
    late = [[i for i in range(n) if g.shape == rows.shape and not equal(g[i], rows[i])] for g in got if _tensor(g)]
    if late == [[rank] for rank in range(n)]:
        raise Wrong(
            "a rank's own row is not filled: nobody sends it, the rank has to put it there", f"every rank, {about}"
        )
    if late == [[(rank + 1) % n] for rank in range(n)] or late == [[(rank - 1) % n] for rank in range(n)]:
        raise Wrong("one row is not filled on any rank: n - 1 steps are needed", f"every rank, {about}")
    same(got, [rows] * n, "the result", about, mistakes)
    made, fair = sent(seen), (n - 1) * size
    if made != [fair] * n:
        own_dtype(seen, before[0].dtype, about)
        rank = max(range(n), key=lambda r: made[r])
        many = plural([r for r in range(n) if made[r] == made[rank]])
        if max(made) > sum(made) / n * 1.5:
            why = f"everything passes through {many}: it sends {made[rank]:,} bytes, where n - 1 tensors are {fair:,}"
        else:
            why = f"{made[rank]:,} bytes leave {many}: n - 1 tensors of {size} bytes are enough"
        raise Wrong(
            f"the rows are right, but {why}",
            about,
            f"{fair:,} bytes from each rank",
            ", ".join(f"{b:,}" for b in made) + " bytes",
        )


class my_ring_all_reduce:
    hints = (
        "tensor.view(-1).tensor_split(n) gives n pieces that are views: writing into a piece writes into tensor. A "
        "rank sends to (rank + 1) % n and receives from (rank - 1) % n, in every step.",
        "First n - 1 steps: in step s send piece (rank - s) % n, receive into a spare tensor, and add that to piece "
        "(rank - s - 1) % n. After them, rank r has the finished piece (r + 1) % n.",
        "Then n - 1 steps more in which finished pieces go round: with s counting on from n - 1 the same two indices "
        "are right; what arrives replaces the piece instead of being added.",
        "In each step: message = dist.isend(piece, right); dist.recv(spare, left); message.wait().",
    )

    @staticmethod
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


# ---- formulas -------------------------------------------------------------------------------------------------


class ring_bytes:
    hints = (
        "How many steps are there, and how large is what a rank sends in one step?",
        "n - 1 steps in the first half, n - 1 in the second, and size_in_bytes / n in each.",
    )

    @staticmethod
    def check(run):
        inputs = [(1000, 4), (64 << 20, 2), (1 << 20, 8), (4096, 1), (3000, 3), (3, 4), (1_000_003, 4), (7, 5)]
        expected = [2 * (n - 1) * size / n for size, n in inputs]
        labels = [f"ring_bytes({size}, {n})" for size, n in inputs]
        mistakes = [
            ("this is one half of it: n - 1 steps add the pieces up, n - 1 more bring them round",
             lambda size, n: (n - 1) * size / n),
            ("this is what all ranks send together: the question is what one of them sends",
             lambda size, n: 2 * (n - 1) * size),
            ("in each step a rank passes on one n-th of the tensor, not all of it", lambda size, n: (n - 1) * size),
            ("2 · size_in_bytes is what it comes close to for many ranks: a rank makes n - 1 steps each time, not n",
             lambda size, n: 2 * size),
            ("integer division: 2 * (n - 1) // n is 1 for every n above 1, multiply by the size first",
             lambda size, n: 2 * (n - 1) // n * size),
            ("this counts elements of 4 bytes: size_in_bytes is in bytes already",
             lambda size, n: 8 * (n - 1) * size / n),
            ("this counts elements of 4 bytes: size_in_bytes is in bytes already",
             lambda size, n: (n - 1) * size / n / 2),
            ("this is (n + 1)/n where (n - 1)/n is right", lambda size, n: 2 * (n + 1) * size / n),
            ("this is what a server's link carries, n tensors in and n out", lambda size, n: 2 * n * size),
            ("the size is missing: this is only the factor 2(n - 1)/n", lambda size, n: 2 * (n - 1) / n),
            ("in MB: bytes are asked for", lambda size, n: 2 * (n - 1) * size / n / 1e6),
            ("divided by n - 1: there are n pieces", lambda size, n: 2 * size if n > 1 else 0),
            *_rounded(lambda size, n: 2 * (n - 1) * size / n),
            ("size_in_bytes // n drops what is left over: divide with /",
             lambda size, n: 2 * (n - 1) * (size // n)),
        ]  # fmt: skip
        try:
            numbers(run, inputs, expected, labels, mistakes, tolerance=(1e-7, 0))
        except Wrong as wrong:
            if wrong.diagnosis.endswith("where 0 is right"):
                wrong.diagnosis += ": one rank sends nothing"
            raise


def _rounded(formula):
    """What people get who make a whole number of it."""
    why = "rounded to a whole number: the formula's own value is asked for, divide with / and leave it at that"
    return [(why, lambda *args, whole=whole: whole(formula(*args))) for whole in (math.floor, round, math.ceil)]


class bus_bandwidth:
    hints = (
        "A bandwidth is bytes per second. Which bytes does a rank send in a ring all-reduce?",
        "ring_bytes(size_in_bytes, n) / seconds.",
    )

    @staticmethod
    def check(run):
        inputs = [(1000, 0.5, 4), (64 << 20, 0.05, 2), (1 << 20, 2e-3, 8), (3000, 1e-4, 3), (3, 0.7, 4), (7, 0.9, 5)]
        expected = [2 * (n - 1) * size / n / seconds for size, seconds, n in inputs]
        labels = [f"bus_bandwidth{args}" for args in inputs]
        mistakes = [
            ("this is the algorithm's bandwidth, size / seconds: the bytes a rank sends are 2(n - 1)/n as many",
             lambda size, t, n: size / t),
            ("this counts one half of the ring: 2(n - 1)/n, not (n - 1)/n", lambda size, t, n: (n - 1) * size / n / t),
            ("bytes times seconds: a bandwidth is bytes per second", lambda size, t, n: 2 * (n - 1) * size / n * t),
            ("seconds per byte: a bandwidth is bytes per second", lambda size, t, n: t * n / (2 * (n - 1) * size)),
            ("this adds up all ranks' links", lambda size, t, n: 2 * (n - 1) * size / t),
            ("in GB per second: bytes per second are asked for", lambda size, t, n: 2 * (n - 1) * size / n / t / 1e9),
            ("in MB per second: bytes per second are asked for", lambda size, t, n: 2 * (n - 1) * size / n / t / 1e6),
            ("in bits per second: bytes per second are asked for", lambda size, t, n: 16 * (n - 1) * size / n / t),
            ("the factor is upside down: multiply by 2(n - 1)/n", lambda size, t, n: size / t / (2 * (n - 1) / n)),
            ("the factor is upside down: 2(n - 1)/n, not 2n/(n - 1)", lambda size, t, n: 2 * n / (n - 1) * size / t),
            ("2 · size_in_bytes is what a rank sends with very many ranks: 2(n - 1)/n as many with n",
             lambda size, t, n: 2 * size / t),
            *_rounded(lambda size, t, n: 2 * (n - 1) * size / n / t),
            ("the bytes are rounded to a whole number: divide with /", lambda size, t, n: 2 * (n - 1) * size // n / t),
            ("size_in_bytes // n drops what is left over: divide with /",
             lambda size, t, n: 2 * (n - 1) * (size // n) / t),
        ]  # fmt: skip
        numbers(run, inputs, expected, labels, mistakes)


class fit_alpha_beta:
    hints = (
        "Drawn with size to the right and seconds upwards, the model is a straight line: latency is where it meets the "
        "axis, and its slope is seconds per byte, the inverse of the bandwidth.",
        "(measured - model) / measured is 1 - latency * (1 / measured) - (size / measured) / bandwidth: an ordinary "
        "least-squares problem with two columns, 1 / measured and size / measured, and 1 for every right-hand side.",
        "torch.linalg.lstsq(columns, ones) solves it in float64; or np.polyfit(sizes, seconds, 1, w=1 / seconds), "
        "whose weights multiply the differences. Its slope is 1 / bandwidth.",
    )

    @staticmethod
    def check(run):
        for seed, (latency, bandwidth) in enumerate([(2e-4, 1.5e9), (5e-5, 4e8)]):
            _judge_fit(run, *_measured(seed, latency, bandwidth))


def _measured(seed, latency, bandwidth):
    """Sizes in mixed order and made-up times, up to a quarter off; one message is slower than one twice as large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1024 << k for k in range(0, 13)]
    sizes = [sizes[i] for i in torch.randperm(len(sizes), generator=generator)]
    off = 0.75 + 0.5 * torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    seconds = [(latency + size / bandwidth) * o for size, o in zip(sizes, off.tolist(), strict=True)]
    one, twice = sizes.index(1 << 20), sizes.index(1 << 21)
    seconds[one], seconds[twice] = 1.1 * seconds[twice], 0.9 * seconds[one]
    return sizes, seconds


def _line(x, y, weights=None):
    """(intercept, slope) of the least-squares line."""
    w = torch.ones_like(x) if weights is None else weights
    x0, y0 = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    slope = (w * (x - x0) * (y - y0)).sum() / (w * (x - x0) ** 2).sum()
    return (y0 - slope * x0).item(), slope.item()


_ABSOLUTE = (
    "seconds that it is off count alike here, so that the largest messages alone decide: (measured - model) / measured "
    "is asked for, as a share of what was measured"
)


def _judge_fit(run, sizes, seconds):
    [seen] = run(_pair, sizes, seconds, n=1)
    result = seen.result
    if seen.kept != (sizes, seconds):
        raise Wrong("the lists that it was given have changed: work on copies, sorted(…) instead of .sort()")
    if isinstance(result, torch.Tensor) and result.numel() == 2:
        result = result.flatten().tolist()
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong(f"it returns {type_of(result)}: the pair (latency, bandwidth) is asked for")
    got = [number(value) for value in result]
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    latency, slope = _line(x, y, 1 / y**2)
    absolute, absolute_slope = _line(x, y)
    twice_weighed, twice_slope = _line(x, y, 1 / y)
    apart, apart_slope = _line(x.sort()[0], y.sort()[0], 1 / y.sort()[0] ** 2)
    small, large = x.argmin(), x.argmax()
    ends = ((y[large] - y[small]) / (x[large] - x[small])).item()
    listed = ((y[-1] - y[0]) / (x[-1] - x[0])).item()
    turned, turned_slope = _line(y, x)
    logarithmic, power = _line(x.log(), y.log())
    through, fair = ((x * y).sum() / (x * x).sum()).item(), ((x / y).sum() / ((x / y) ** 2).sum()).item()
    mistakes = [
        ("bandwidth and latency are swapped: (latency, bandwidth) is asked for", (1 / slope, latency)),
        ("the slope is in seconds per byte: bandwidth is its inverse, 1 / slope", (latency, slope)),
        ("slope and latency are swapped, and the slope is not the bandwidth but its inverse", (slope, latency)),
        ("the latency is 0 while the bandwidth is right: was it forgotten?", (0.0, 1 / slope)),
        ("the line goes through the origin: the model has a latency too", (0.0, 1 / through)),
        ("the line goes through the origin: the model has a latency too", (0.0, 1 / fair)),
        ("sizes and seconds were sorted each by itself: which time belongs to which size is lost",
         (apart, 1 / apart_slope)),
        (_ABSOLUTE, (absolute, 1 / absolute_slope)),
        ("the squares are weighed with 1 / seconds: it is the differences that are divided by what was measured, the "
         "squares by its square", (twice_weighed, 1 / twice_slope)),
        ("the line goes through the smallest and the largest message only: all measurements count",
         (y[small].item() - ends * x[small].item(), 1 / ends)),
        ("the line goes through the first and the last measurement only: all of them count",
         (y[0].item() - listed * x[0].item(), 1 / listed)),
        ("sizes are fitted to seconds: seconds = latency + size / bandwidth is the other way round",
         (-turned / turned_slope, turned_slope)),
        ("fitted on logarithms: that is a power of the size, not a straight line", (logarithmic, 1 / power)),
        ("fitted on logarithms: that is a power of the size, not a straight line",
         (torch.tensor(logarithmic).exp().item(), 1 / power)),
        ("the latency is taken from the smallest message: the line says it better", (y[small].item(), 1 / slope)),
        ("the latency is taken from the fastest message: the line says it better", (y.min().item(), 1 / slope)),
        ("bandwidth is the mean of size / seconds: that counts the latency in", (latency, (x / y).mean().item())),
        ("bandwidth is all bytes by all seconds: that counts the latency in", (latency, (x.sum() / y.sum()).item())),
        ("latency is in milliseconds: seconds are asked for", (latency * 1e3, 1 / slope)),
        ("latency is in microseconds: seconds are asked for", (latency * 1e6, 1 / slope)),
        ("bandwidth is in MB per second: bytes per second are asked for", (latency, 1e-6 / slope)),
        ("bandwidth is in GB per second: bytes per second are asked for", (latency, 1e-9 / slope)),
        ("bandwidth is in bits per second: bytes per second are asked for", (latency, 8 / slope)),
    ]  # fmt: skip
    numbers = [torch.tensor(v, dtype=torch.float64) for v in (latency, 1 / slope)]
    if "float32" in seen.dtypes and not all(equal(g, e, (1e-3, 0)) for g, e in zip(got, numbers, strict=True)):
        why = "float32 is too short here, sizes and seconds are ten powers of ten apart: use dtype=torch.float64"
        raise Wrong(why, f"{len(sizes)} measurements")
    mistakes = [(why, [torch.tensor(v, dtype=torch.float64) for v in pair]) for why, pair in mistakes]
    same(got, numbers, "", f"{len(sizes)} measurements", mistakes, labels=["latency", "bandwidth"],
         tolerance=(1e-3, 0))  # fmt: skip


def _pair(answer, sizes, seconds):
    seen = watched(answer, sizes, seconds)
    seen.kept = sizes, seconds
    return seen
