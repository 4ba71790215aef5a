"""heads_of_rank: wrong answers as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("heads_of_rank", "cannot be shared out equally over 4 ranks: raise ValueError")
def rounds_down(num_heads, num_kv_heads, rank, world_size):
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries.start // group, (queries.stop - 1) // group + 1)


@mistake("heads_of_rank", "several ranks need the same one")
def shares_out_both(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    q, kv = num_heads // world_size, num_kv_heads // world_size
    return range(rank * q, (rank + 1) * q), range(rank * kv, (rank + 1) * kv)


@mistake("heads_of_rank", "it raises ValueError, but 8 heads on 4 ranks are 2 each")
def refuses_shared_kv_heads(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size or num_kv_heads % world_size:
        raise ValueError
    q, kv = num_heads // world_size, num_kv_heads // world_size
    return range(rank * q, (rank + 1) * q), range(rank * kv, (rank + 1) * kv)


@mistake("heads_of_rank", "every rank takes all key-value heads")
def all_kv_heads(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each = num_heads // world_size
    return range(rank * each, (rank + 1) * each), range(num_kv_heads)


@mistake("heads_of_rank", "counted like query heads, but several query heads share one")
def kv_as_queries(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each = num_heads // world_size
    return range(rank * each, (rank + 1) * each), range(rank * each, (rank + 1) * each)


@mistake("heads_of_rank", "the heads are dealt out one by one")
def dealt_out(num_heads, num_kv_heads, rank, world_size):
    return range(rank, num_heads, world_size), range(rank, num_kv_heads, world_size)


@mistake("heads_of_rank", "the stop of a range is not part of it")
def a_head_too_few(num_heads, num_kv_heads, rank, world_size):
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries[0] // group, queries[-1] // group)


@mistake("heads_of_rank", "one key-value head too many: query head 1, the last one here, uses head 1")
def a_head_too_many(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each, group = num_heads // world_size, num_heads // num_kv_heads
    queries = range(rank * each, (rank + 1) * each)
    return queries, range(queries[0] // group, queries[-1] // group + 2)


@mistake("heads_of_rank", "h // 3, not h % 4: heads that share one stand together")
def by_remainder(num_heads, num_kv_heads, rank, world_size):
    if num_heads % world_size:
        raise ValueError
    each = num_heads // world_size
    queries = range(rank * each, (rank + 1) * each)
    used = sorted({h % num_kv_heads for h in queries})
    return queries, range(used[0], used[-1] + 1)


@mistake("heads_of_rank", "rank is not used")
def rank_forgotten(num_heads, num_kv_heads, rank, world_size):
    return range(num_heads), range(num_kv_heads)


@mistake("heads_of_rank", "two ranges are asked for")
def how_many(num_heads, num_kv_heads, rank, world_size):
    return num_heads // world_size, num_kv_heads // world_size


@mistake("heads_of_rank", "key-value head 1 is used on two ranks")
def kv_heads_divided(num_heads, num_kv_heads, rank, world_size):
    """As many libraries do it, and right as long as no group of query heads lies on two ranks."""
    if num_heads % world_size:
        raise ValueError
    q, kv = num_heads // world_size, max(1, num_kv_heads // world_size)
    first = rank * num_kv_heads // world_size
    return range(rank * q, (rank + 1) * q), range(first, first + kv)


@right("heads_of_rank")
def by_their_kv_heads(num_heads, num_kv_heads, rank, world_size):
    each, rest = divmod(num_heads, world_size)
    if rest:
        raise ValueError(f"{rest} heads left over")
    queries = range(num_heads)[rank * each : (rank + 1) * each]
    used = [h * num_kv_heads // num_heads for h in queries]
    return [queries, range(min(used), max(used) + 1)]
