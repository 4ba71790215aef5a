"""The exercise heads_of_rank."""

from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong
from ..exercises.watch import watched

hints = (
    "With equally many heads on each rank, where does rank r begin? What if the division leaves a remainder?",
    "Query head h uses key-value head h // (num_heads // num_kv_heads). Which ones do the first and the last of a "
    "rank's query heads use?",
    "From the key-value head of the first query head to that of the last one: range(first // group, last // group "
    "+ 1), where group = num_heads // num_kv_heads. There may be one key-value head for several ranks.",
)


def check(run):
    cases = [(8, 8, 4), (12, 4, 4), (12, 12, 3), (8, 2, 4), (12, 3, 2), (6, 2, 6), (16, 1, 4), (4, 2, 1)]
    [seen] = run(_all_heads, cases, n=1)
    for case, ranks in zip(cases, seen.result, strict=True):
        for rank, got in enumerate(ranks):
            _judge_heads(*case, rank, got, _by_remainder(*case, ranks))
    [seen] = run(_all_heads, [(5, 5, 4), (6, 2, 4), (3, 3, 4)], n=1)
    for (heads, kv, n), ranks in zip([(5, 5, 4), (6, 2, 4), (3, 3, 4)], seen.result, strict=True):
        for rank, got in enumerate(ranks):
            if got != "ValueError":
                raise Wrong(
                    f"{heads} heads cannot be shared out equally over {n} ranks: raise ValueError, or heads are "
                    "lost or computed twice", f"heads_of_rank({heads}, {kv}, {rank}, {n})", "ValueError", f"{got}",
                )  # fmt: skip


def _all_heads(answer, cases):
    def one(*case):
        try:
            return answer(*case)
        except ValueError:
            return "ValueError"

    return watched(lambda: [[one(heads, kv, rank, n) for rank in range(n)] for heads, kv, n in cases])


def _by_remainder(heads, kv, n, ranks):
    """Whether the ranks' key-value heads are those of h % kv: right nowhere but by chance."""
    used = [sorted({h % kv for h in range(r * heads // n, (r + 1) * heads // n)}) for r in range(n)]
    pairs = [got for got in ranks if isinstance(got, (tuple, list)) and len(got) == 2 and isinstance(got[1], range)]
    return len(pairs) == n > 1 and [list(got[1]) for got in pairs] == [list(range(u[0], u[-1] + 1)) for u in used]


def _judge_heads(heads, kv, n, rank, got, by_remainder):
    each, group = heads // n, heads // kv
    queries = range(rank * each, (rank + 1) * each)
    wanted = queries, range(queries[0] // group, queries[-1] // group + 1)
    where = f"heads_of_rank({heads}, {kv}, {rank}, {n})"
    shown = {"expected": f"{wanted}", "got": f"{got}"}
    if got == "ValueError":
        raise Wrong(f"it raises ValueError, but {heads} heads on {n} ranks are {each} each", where, **shown)
    if not isinstance(got, (tuple, list)) or len(got) != 2 or not all(isinstance(g, range) for g in got):
        raise Wrong("two ranges are asked for: (query heads, key-value heads)", where, **shown)
    if list(got[0]) != list(queries):
        if list(got[0]) == list(range(rank, heads, n)):
            why = "the heads are dealt out one by one: a rank takes heads that follow each other, rank 0 the first ones"
        elif list(got[0]) == list(range(heads)):
            why = "every rank takes all heads: rank is not used"
        elif len(got[0]) in (each - 1, each + 1):
            why = f"{len(got[0])} query heads, where {each} are asked for: the stop of a range is not part of it"
        else:
            why = f"rank {rank} of {n} takes {each} of {heads} query heads, from {rank} · {each} on"
        raise Wrong(why, where, **shown)
    if list(got[1]) != list(wanted[1]):
        share = range(rank * kv // n, (rank + 1) * kv // n)
        if by_remainder and kv > 1:
            why = f"query head h uses key-value head h // {group}, not h % {kv}: heads that share one stand together"
        elif list(got[1]) == list(range(kv)):
            why = "every rank takes all key-value heads: only those that its query heads use are asked for"
        elif list(got[1]) == list(queries):
            why = "the key-value heads are counted like query heads, but several query heads share one"
        elif kv < n and (len(got[1]) == 0 or list(got[1]) == list(share)):
            why = f"{kv} key-value heads for {n} ranks: several ranks need the same one, so they cannot be shared out"
        elif list(got[1]) == list(wanted[1])[:-1] and (queries[-1] + 1) % group:
            why = f"key-value head {wanted[1][-1]} is used on two ranks: query head {queries[-1]} uses it, too"
        elif list(got[1]) == list(range(wanted[1][0], wanted[1][-1] + 2)):
            why = f"one key-value head too many: query head {queries[-1]}, the last one here, uses head {wanted[1][-1]}"
        elif list(got[1]) == list(range(wanted[1][0], wanted[1][-1])):
            why = "the last key-value head is missing: the stop of a range is not part of it"
        else:
            why = f"query head h uses key-value head h // {group}, so {_spoken(queries)} use {_spoken(wanted[1])}"
        raise Wrong(why, where, **shown)


def _spoken(heads):
    return f"head {heads[0]}" if len(heads) == 1 else f"heads {heads[0]} to {heads[-1]}"


exercise = Exercise(hints, check)
