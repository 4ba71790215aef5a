"""my_broadcast: rank src's tensor into every rank's. Typically wrong: src is ignored, or the message goes elsewhere."""

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
        for src in range(n - 1, -1, -1) if seed == 0 else [n - 1]:
            where = f"src={src}, {about}"
            seen = run(call_with_tensor, shape, dtype, seed, src, n=n, about=where)
            by_hand(seen)
            _judge(seen, [values(shape, dtype, rank, seed) for rank in range(n)], src, where)

    every_case(one)


def _judge(seen, before, src, about):
    n, size = len(seen), before[0].nbytes
    idle = "nobody receives" + f": to the right of rank {src}, the last one, there is nobody" * (src == n - 1)
    if any(call.op == "recv" for one in seen for call in one.calls):
        idle = "a message arrives, but not in `tensor`: give recv tensor itself"
    ignored = "src is ignored: every rank has rank {}'s values, and src is {}"
    mistakes = [
        *((ignored.format(r, src), before[r]) for r in range(n) if r != src),
        (idle, before),
        ("what arrives is added to what was there: it has to replace it", [b + before[src] for b in before]),
        ("every rank has its left neighbour's values, not rank src's", [before[r - 1] for r in range(n)]),
    ]
    in_place(seen, [before[src]] * n, before, about, mistakes)
    made, fair = sum(sent(seen)), (n - 1) * size
    if made != fair:
        own_dtype(seen, before[0].dtype, about)
        messages = sum(call.op == "send" for one in seen for call in one.calls)
        why = f"the values are right, but {made:,} bytes are sent in {messages} messages: {n - 1} of {size} bytes "
        raise Wrong(f"{why}are enough, each rank but src receives once", about, f"{fair} bytes", f"{made} bytes")


WHY = (
    "Every other rank receives the tensor once, which is the least there is. Where one rank sends to all, its "
    "link carries n - 1 tensors: gloo and MPI go down a tree, NCCL passes pieces along a chain."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=WHY)
