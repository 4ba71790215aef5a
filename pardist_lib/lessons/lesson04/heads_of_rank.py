"""A rank's query heads and the key-value heads they use; typically those are dealt out, where ranks share one."""

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong
from ..exercises.watch import told, watched

hints = (
    "With equally many heads on each rank, where does rank r begin? What if the division leaves a remainder?",
    "Query head h uses key-value head h // (num_heads // num_kv_heads). Which ones do the first and the last of a "
    "rank's query heads use?",
    "From the key-value head of the first query head to that of the last one: range(first // group, last // group "
    "+ 1), where group = num_heads // num_kv_heads. There may be one key-value head for several ranks.",
)


def check(run):
    even = [(8, 8, 4), (12, 4, 4), (12, 12, 3), (8, 2, 4), (12, 3, 2), (6, 2, 6), (16, 1, 4), (4, 2, 1)]
    uneven = [(5, 5, 4), (6, 2, 4), (3, 3, 4)]  # query heads, key-value heads, ranks
    for cases in even, uneven:
        [seen] = run(_all_ranks, cases, n=1)
        for case, ranks in zip(cases, seen.result, strict=True):
            for rank, got in enumerate(ranks):
                _judge(*case, rank, got, ranks)


def _all_ranks(answer, cases):
    def one(*case):
        try:
            return told(answer, *case)
        except ValueError:
            return "ValueError"

    return watched(lambda: [[one(heads, kv, rank, n) for rank in range(n)] for heads, kv, n in cases])


def _judge(heads, kv, n, rank, got, ranks):
    each, group, wanted = heads // n, heads // kv, "ValueError"
    if not heads % n:
        queries = range(rank * each, (rank + 1) * each)
        wanted = queries, range(queries[0] // group, queries[-1] // group + 1)
    if got == wanted:
        return
    if heads % n:
        lost = "raise ValueError, or heads are lost or computed twice"
        why = f"{heads} heads cannot be shared out equally over {n} ranks: {lost}"
    elif got == "ValueError":
        why = f"it raises ValueError, but {heads} heads on {n} ranks are {each} each"
    elif not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(g, range) for g in got):
        why = "two ranges are asked for: (query heads, key-value heads)"
    else:
        why = _why_queries(got[0], queries, heads, n, rank) or _why_kv(got[1], *wanted, heads, kv, n, rank, ranks)
    if why:
        raise Wrong(why, f"heads_of_rank({heads}, {kv}, {rank}, {n})", f"{wanted}", f"{got}")


def _why_queries(got, queries, heads, n, rank):
    each = len(queries)
    if got == queries:
        return ""
    if got == range(rank, heads, n):
        return "the heads are dealt out one by one: a rank takes heads that follow each other, rank 0 the first ones"
    if got == range(heads):
        return "every rank takes all heads: rank is not used"
    if abs(len(got) - each) == 1:
        return f"{len(got)} query heads, where {each} are asked for: the stop of a range is not part of it"
    return f"rank {rank} of {n} takes {each} of {heads} query heads, from {rank} · {each} on"


def _why_kv(got, queries, wanted, heads, kv, n, rank, ranks):
    group, last = heads // kv, queries[-1]
    if got == wanted:
        return ""
    if kv > 1 and _by_remainder(heads, kv, n, ranks):
        return f"query head h uses key-value head h // {group}, not h % {kv}: heads that share one stand together"
    if got == range(kv):
        return "every rank takes all key-value heads: only those that its query heads use are asked for"
    if got == queries:
        return "the key-value heads are counted like query heads, but several query heads share one"
    if kv < n and (not got or got == range(rank * kv // n, (rank + 1) * kv // n)):
        return f"{kv} key-value heads for {n} ranks: several ranks need the same one, so they cannot be shared out"
    if got == wanted[:-1] and (last + 1) % group:
        return f"key-value head {wanted[-1]} is used on two ranks: query head {last} uses it, too"
    if got == range(wanted[0], wanted[-1] + 2):
        return f"one key-value head too many: query head {last}, the last one here, uses head {wanted[-1]}"
    if got == wanted[:-1]:
        return "the last key-value head is missing: the stop of a range is not part of it"
    return f"query head h uses key-value head h // {group}, so {_spoken(queries)} use {_spoken(wanted)}"


def _by_remainder(heads, kv, n, ranks):
    """Whether the ranks' key-value heads are those of h % kv: right nowhere but by chance."""
    used = [sorted({h % kv for h in range(r * heads // n, (r + 1) * heads // n)}) for r in range(n)]
    pairs = [got for got in ranks if isinstance(got, (tuple, list)) and len(got) == 2]
    return n > 1 and [got[1] for got in pairs] == [range(u[0], u[-1] + 1) for u in used]


def _spoken(heads):
    return f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]} to {heads[-1]}"


why = (
    "Heads do not look at each other, so a rank needs its queries' heads and the key-value heads that they "
    "share. With fewer key-value heads than ranks two ranks need the same one: vLLM keeps a copy of it on "
    "each of them."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=why)
