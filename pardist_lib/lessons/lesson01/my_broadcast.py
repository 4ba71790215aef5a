"""The exercise my_broadcast."""

from ..exercises.cases import call_with_tensor, every_case, in_place, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, by_hand, own_dtype, sent

hints = (
    "dist.get_rank() tells a rank which one it is: rank src sends, all the others receive.",
    "dist.recv(tensor, src) writes into `tensor` what rank src sends; every other rank needs a send of its own, "
    "and a rank cannot send to itself.",
    "On rank src: for other in range(dist.get_world_size()), if other != src, dist.send(tensor, other). "
    "On the others: one dist.recv(tensor, src).",
)


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


exercise = Exercise(hints, check)
