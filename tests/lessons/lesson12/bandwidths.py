"""Answers to bandwidths: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def factor(op, n):
    return {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0}.get(op, (n - 1) / n)


def whole(op, payload, n):
    return n * payload if op == "all_gather" else payload


@mistake("bandwidths", "one rank's shard: what it gathers is n times that")
def payload_is_the_size(op, payload, n, seconds):
    return payload / seconds, factor(op, n) * payload / seconds


@mistake("bandwidths", "a reduce_scatter's payload is all n pieces already")
def both_halves_are_shards(op, payload, n, seconds):
    size = n * payload if op in ("all_gather", "reduce_scatter") else payload
    return size / seconds, factor(op, n) * size / seconds


@mistake("bandwidths", "bus bandwidth equals algorithm bandwidth here")
def without_a_factor(op, payload, n, seconds):
    return whole(op, payload, n) / seconds, whole(op, payload, n) / seconds


@mistake("bandwidths", "the factor of an all_reduce is twice that of the others")
def one_factor_for_all(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds
    return a, a * (1 if op == "broadcast" else (n - 1) / n)


@mistake("bandwidths", "2(n-1)/n is the factor of an all_reduce alone")
def two_rounds_for_all(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds
    return a, a * (1 if op == "broadcast" else 2 * (n - 1) / n)


@mistake("bandwidths", "a broadcast has the factor 1")
def broadcast_as_a_ring(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds
    return a, a * (2 if op == "all_reduce" else 1) * (n - 1) / n


@mistake("bandwidths", "the factor is turned round")
def divided_by_the_factor(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds
    return a, a / factor(op, n)


@mistake("bandwidths", "this is in GB: bytes a second are asked for")
def in_gigabytes(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds / 1e9
    return a, a * factor(op, n)


@mistake("bandwidths", "algorithm bandwidth first")
def bus_first(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds
    return a * factor(op, n), a


@mistake("bandwidths", "2 numbers are asked for, (algorithm, bus)")
def only_one(op, payload, n, seconds):
    return factor(op, n) * whole(op, payload, n) / seconds


@mistake("bandwidths", "it is rounded to whole bytes")
def rounded(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds
    return float(round(a)), float(round(a * factor(op, n)))


@mistake("bandwidths", "it is rounded to whole bytes")
def whole_division(op, payload, n, seconds):
    a = whole(op, payload, n) // seconds
    return a, a * factor(op, n)


@mistake("bandwidths", "n of them, not n - 1")
def without_its_own(op, payload, n, seconds):
    a = ((n - 1) * payload if op == "all_gather" else payload) / seconds
    return a, a * factor(op, n)


@mistake("bandwidths", "all that was handed in")
def one_piece_of_n(op, payload, n, seconds):
    a = {"all_gather": n * payload, "reduce_scatter": payload / n}.get(op, payload) / seconds
    return a, a * factor(op, n)


@mistake("bandwidths", "in MiB")
def in_mebibytes(op, payload, n, seconds):
    a = whole(op, payload, n) / seconds / 2**20
    return a, a * factor(op, n)


@right("bandwidths")
def with_branches(op, payload, n, seconds):
    if op == "all_gather":
        payload = payload * n
    algorithm = payload / seconds
    if op == "broadcast":
        return [algorithm, algorithm]
    rounds = 2 if op == "all_reduce" else 1
    return [algorithm, rounds * algorithm * (1 - 1 / n)]
