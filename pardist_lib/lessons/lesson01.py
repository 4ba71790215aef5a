"""The exercises of lesson 01: hints, and how an answer is checked."""

import torch

from pardist_lib.ranks.report import plural

from .cases import call_with_tensor, every_case, in_place, number, numbers, unchanged, values
from .judge import Wrong, by_hand, equal, peers, same, sent, show, type_of
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
    mistakes = [
        (f"src is ignored: every rank has rank {r}'s values, and src is {src}", [before[r]] * n)
        for r in range(n) if r != src
    ]  # fmt: skip
    mistakes += [
        ("a message arrives, but not in `tensor`: give recv tensor itself" if got_mail else "nobody receives", before),
        ("what arrives is added to what was there: it has to replace it", [b + before[src] for b in before]),
        ("every rank has its left neighbour's values, not rank src's", [before[r - 1] for r in range(n)]),
    ]  # fmt: skip
    in_place(seen, [before[src]] * n, before, about, mistakes)
    messages = sum(call.op == "send" for one in seen for call in one.calls)
    if sum(sent(seen)) != len(others) * size:
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
    without_own, hand_over = [], "row r must be rank r's on every rank, here the rows are in order of arrival"
    for rank in range(n):
        without_own.append(rows.clone())
        without_own[-1][rank] = 0
    mistakes = [
        (hand_over, shifted),
        (hand_over, backward),
        (hand_over, [torch.stack([before[r], *before[:r], *before[r + 1 :]]) for r in range(n)]),
        ("the rows are in reverse order: row r must be rank r's", [rows.flip(0)] * n),
        ("a rank's own row is empty: nobody sends it, the rank has to put it there", without_own),
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
    if late == [[(rank + 1) % n] for rank in range(n)] or late == [[(rank - 1) % n] for rank in range(n)]:
        raise Wrong("one row is not filled on any rank: n - 1 steps are needed", f"every rank, {about}")
    same(got, [rows] * n, "the result", about, mistakes)
    made, fair = sent(seen), (n - 1) * size
    if made != [fair] * n:
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


class ring_all_reduce:
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
    mistakes = [
        ("only the first half was done: each rank has one finished piece, which has to go round", {"second": 0}),
        ("one step too few in the second half: n - 1 steps bring the finished pieces everywhere", {"second": n - 2}),
        ("one step too few in the first half: n - 1 steps until a piece has every rank's share", {"first": n - 2}),
        ("one step too few in the first half: n - 1 steps until a piece has every rank's share",
         {"first": n - 2, "gap": 1}),
        ("one step too many in the first half: a rank's own share comes back to it and is added twice", {"first": n}),
        ("one step too many in the first half: a rank's own share comes back to it and is added twice",
         {"first": n, "second": n - 2}),
        ("the second half adds what arrives: those pieces are finished and have to be copied", {"copy": False}),
        ("the first half copies what arrives: a rank's own share is lost, it has to be added", {"add": False}),
    ]  # fmt: skip
    mistakes = [(why, _ring(before, **how)) for why, how in mistakes]
    if total.is_floating_point():
        mistakes.append((f"divided by {n}: the sum is asked for, not the mean", [total / n] * n))
    in_place(seen, [total] * n, before, about, mistakes)
    _judge_ring_traffic(seen, n, size, before[0].element_size(), about)


def _ring(before, first=None, second=None, gap=0, add=True, copy=True):
    """What a ring gives with some of its steps left out or done wrong, all ranks in one process. gap: how many
    steps the second half counts on after the first."""
    n = len(before)
    first, second = n - 1 if first is None else first, n - 1 if second is None else second
    tensors = [b.clone() for b in before]
    pieces = [t.view(-1).tensor_split(n) for t in tensors]
    for step in [*range(first), *range(first + gap, first + gap + second)]:
        moved = [pieces[r][(r - step) % n].clone() for r in range(n)]
        for r in range(n):
            piece = pieces[r][(r - step - 1) % n]
            if add if step < first else not copy:
                piece += moved[r - 1]
            else:
                piece.copy_(moved[r - 1])
    return tensors


def _judge_ring_traffic(seen, n, size, item, about):
    made, to, steps = sent(seen), peers(seen), sum(call.op == "send" for call in seen[0].calls)
    elements = size // item
    least, most = 2 * (n - 1) * size, 2 * (n - 1) * n * -(-elements // n) * item
    each = 2 * (n - 1) * size / n
    shown = {"expected": f"{each:,g} bytes from each rank", "got": ", ".join(f"{b:,}" for b in made) + " bytes"}
    strangers = [(r, sorted(who - {(r + 1) % n})) for r, who in enumerate(to) if who - {(r + 1) % n}]
    everyone_left = all(who <= {(r - 1) % n} for r, who in enumerate(to))
    if strangers and everyone_left:
        raise Wrong("the sum is right, but it runs the other way round: send to rank + 1, receive from rank - 1", about,
                    f"to rank {(strangers[0][0] + 1) % n}", f"to rank {strangers[0][1][0]}")  # fmt: skip
    if max(made) > sum(made) / n * 1.5 and max(made) > most / n:
        busy = max(range(n), key=lambda r: made[r])
        raise Wrong(f"the sum is right, but everything passes through rank {busy}: its link carries {made[busy]:,} "
                    f"bytes while a ring asks {each:,g} of each rank", about, **shown)  # fmt: skip
    if strangers:
        rank, who = strangers[0]
        raise Wrong(f"the sum is right, but this is no ring: rank {rank} sends to {plural(sorted(to[rank]))}, and only "
                    f"rank {(rank + 1) % n} is its right neighbour", about, **shown)  # fmt: skip
    if not least <= sum(made) <= most or (elements % n == 0 and made != [each] * n):
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


# ---- formulas -------------------------------------------------------------------------------------------------


class ring_bytes:
    hints = (
        "How many steps are there, and how large is what a rank sends in one step?",
        "n - 1 steps in the first half, n - 1 in the second, and size_in_bytes / n in each.",
    )

    @staticmethod
    def check(run):
        inputs = [(1000, 4), (64 << 20, 2), (1 << 20, 8), (4096, 1), (3000, 3)]
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
        ]  # fmt: skip
        numbers(run, inputs, expected, labels, mistakes)


class bus_bandwidth:
    hints = (
        "A bandwidth is bytes per second. Which bytes does a rank send in a ring all-reduce?",
        "ring_bytes(size_in_bytes, n) / seconds.",
    )

    @staticmethod
    def check(run):
        inputs = [(1000, 0.5, 4), (64 << 20, 0.05, 2), (1 << 20, 2e-3, 8), (3000, 1e-4, 3)]
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
        ]  # fmt: skip
        numbers(run, inputs, expected, labels, mistakes)


class fit_alpha_beta:
    hints = (
        "Drawn with size to the right and seconds upwards, the model is a straight line: latency is where it meets the "
        "axis, and its slope is seconds per byte, the inverse of the bandwidth.",
        "The best line has slope = Σ (x - mean x)(y - mean y) / Σ (x - mean x)², and goes through (mean x, mean y).",
        "latency = mean y - slope * mean x; return latency, 1 / slope.",
    )

    @staticmethod
    def check(run):
        for seed, (latency, bandwidth) in enumerate([(2e-4, 1.5e9), (5e-5, 4e8)]):
            _judge_fit(run, *_measured(seed, latency, bandwidth))


def _measured(seed, latency, bandwidth):
    """Sizes in mixed order and made-up times, up to a quarter off."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1024 << k for k in range(0, 13)]
    sizes = [sizes[i] for i in torch.randperm(len(sizes), generator=generator)]
    off = 0.75 + 0.5 * torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    return sizes, [(latency + size / bandwidth) * o for size, o in zip(sizes, off.tolist(), strict=True)]


def _line(x, y, weights=None):
    """(intercept, slope) of the least-squares line."""
    w = torch.ones_like(x) if weights is None else weights
    x0, y0 = (w * x).sum() / w.sum(), (w * y).sum() / w.sum()
    slope = (w * (x - x0) * (y - y0)).sum() / (w * (x - x0) ** 2).sum()
    return (y0 - slope * x0).item(), slope.item()


def _judge_fit(run, sizes, seconds):
    [seen] = run(_pair, sizes, seconds, n=1)
    result = seen.result
    if isinstance(result, torch.Tensor) and result.numel() == 2:
        result = result.flatten().tolist()
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong(f"it returns {type_of(result)}: the pair (latency, bandwidth) is asked for")
    got = [number(value) for value in result]
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    latency, slope = _line(x, y)
    small, large = x.argmin(), x.argmax()
    ends = ((y[large] - y[small]) / (x[large] - x[small])).item()
    listed = ((y[-1] - y[0]) / (x[-1] - x[0])).item()
    turned, turned_slope = _line(y, x)
    logarithmic, power = _line(x.log(), y.log())
    relative, relative_slope = _line(x, y, 1 / y**2)
    through = ((x * y).sum() / (x * x).sum()).item()
    mistakes = [
        ("bandwidth and latency are swapped: (latency, bandwidth) is asked for", (1 / slope, latency)),
        ("the slope is in seconds per byte: bandwidth is its inverse, 1 / slope", (latency, slope)),
        ("slope and latency are swapped, and the slope is not the bandwidth but its inverse", (slope, latency)),
        ("the line goes through the origin: the model has a latency too", (0.0, 1 / through)),
        ("the line goes through the smallest and the largest message only: all measurements count",
         (y[small].item() - ends * x[small].item(), 1 / ends)),
        ("the line goes through the first and the last measurement only: all of them count",
         (y[0].item() - listed * x[0].item(), 1 / listed)),
        ("sizes are fitted to seconds: seconds = latency + size / bandwidth is the other way round",
         (-turned / turned_slope, turned_slope)),
        ("fitted on logarithms: that is a power of the size, not a straight line", (logarithmic, 1 / power)),
        ("fitted on logarithms: that is a power of the size, not a straight line",
         (torch.tensor(logarithmic).exp().item(), 1 / power)),
        ("each measurement counts alike: here small times weigh more", (relative, 1 / relative_slope)),
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
    mistakes = [(why, [torch.tensor(v, dtype=torch.float64) for v in pair]) for why, pair in mistakes]
    same(got, numbers, "", f"{len(sizes)} measurements", mistakes, labels=["latency", "bandwidth"],
         tolerance=(1e-3, 0))  # fmt: skip


def _pair(answer, sizes, seconds):
    return watched(answer, list(sizes), list(seconds))
