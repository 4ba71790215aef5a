"""Wrong answers to the exercises of lesson 12, as people really write them; and some more right ones."""

from planted import mistake, right

# ---- bandwidths -----------------------------------------------------------------------------------------------


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


# ---- exposed --------------------------------------------------------------------------------------------------


def union(spans):
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@mistake("exposed", "this is what is hidden: exposed is the rest")
def the_hidden_part(compute, communication):
    return union(compute) + union(communication) - union(compute + communication)


@mistake("exposed", "this is all communication, hidden or not")
def all_of_it(compute, communication):
    return union(communication)


@mistake("exposed", "calls that overlap each other are counted twice")
def sums_of_lengths(compute, communication):
    hidden = sum(max(0.0, min(b, d) - max(a, c)) for a, b in compute for c, d in communication)
    return sum(d - c for c, d in communication) - hidden


@mistake("exposed", "totals are subtracted, as if all compute lay beside communication")
def difference_of_totals(compute, communication):
    return max(0.0, union(communication) - union(compute))


@mistake("exposed", "the events are in no order: sort them by start first")
def as_they_come(compute, communication):
    def length(spans):
        total, until = 0.0, float("-inf")
        for start, end in spans:
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total

    return length(compute + communication) - length(compute)


@mistake("exposed", "only communication after the last computation counts here")
def the_tail(compute, communication):
    last = max((end for _, end in compute), default=float("-inf"))
    return union([(max(start, last), end) for start, end in communication if end > last])


@mistake("exposed", "only the part beside compute is")
def all_or_nothing(compute, communication):
    return union([(s, e) for s, e in communication if not any(a < e and s < b for a, b in compute)])


@mistake("exposed", "the two are mixed up")
def compute_alone(compute, communication):
    return union(compute + communication) - union(communication)


@mistake("exposed", "the lists that were given have changed")
def sorts_in_place(compute, communication):
    compute.sort()
    return union(compute + communication) - union(compute)


@mistake("exposed", "this is in milliseconds: seconds are asked for")
def milliseconds(compute, communication):
    return 1e3 * (union(compute + communication) - union(compute))


@mistake("exposed", "times are rounded to milliseconds")
def by_milliseconds(compute, communication):
    def ticks(spans):
        return {t for a, b in spans for t in range(round(1000 * a), round(1000 * b))}

    return len(ticks(communication) - ticks(compute)) / 1000


@mistake("exposed", "rounded to microseconds")
def by_microseconds(compute, communication):
    compute, communication = ([(round(a, 6), round(b, 6)) for a, b in spans] for spans in (compute, communication))
    return union(compute + communication) - union(compute)


@mistake("exposed", "it hides a message only once")
def compute_not_merged(compute, communication):
    talk = []
    for start, end in sorted(communication):
        if talk and start <= talk[-1][1]:
            talk[-1] = talk[-1][0], max(talk[-1][1], end)
        else:
            talk.append((start, end))
    hidden = sum(max(0.0, min(b, d) - max(a, c)) for a, b in compute for c, d in talk)
    return sum(end - start for start, end in talk) - hidden


@right("exposed")
def edge_by_edge(compute, communication):
    edges = [(t, i, step) for i, spans in enumerate((compute, communication)) for s in spans
             for t, step in zip(s, (1, -1), strict=True)]  # fmt: skip
    open_, total, before = [0, 0], 0.0, 0.0
    for t, i, step in sorted(edges):
        total += t - before if open_[1] and not open_[0] else 0.0
        open_[i] += step
        before = t
    return total


@right("exposed")
def by_every_moment(compute, communication):
    times = sorted({t for span in compute + communication for t in span})
    total = 0.0
    for a, b in zip(times, times[1:], strict=False):
        middle = (a + b) / 2
        talks = any(c < middle < d for c, d in communication)
        works = any(c < middle < d for c, d in compute)
        total += (b - a) * (talks and not works)
    return total


# ---- amdahl ---------------------------------------------------------------------------------------------------


def serial(t1, tn, n):
    return (tn / t1 - 1 / n) / (1 - 1 / n)


@mistake("amdahl", "or the efficiency of weak scaling")
def weak_efficiency(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "the efficiency is upside down")
def inverse_efficiency(t1, tn, n, m):
    s = serial(t1, tn, n)
    return tn / t1 / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "that is what is lost, and s is not all of it")
def what_is_lost(t1, tn, n, m):
    s = 1 - t1 / tn / n
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "this is the parallel fraction, 1 - s")
def the_other_part(t1, tn, n, m):
    p = 1 - serial(t1, tn, n)
    return t1 / tn / n, p, 1 / (1 - p + p / m)


@mistake("amdahl", "1 - 1/n is missing below")
def not_divided(t1, tn, n, m):
    s = tn / t1 - 1 / n
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "the speedup is for n ranks again: m are asked for")
def for_n_again(t1, tn, n, m):
    return t1 / tn / n, serial(t1, tn, n), t1 / tn


@mistake("amdahl", "this is what infinitely many ranks would have")
def the_limit(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn / n, s, 1 / s if s > 1e-9 else m


@mistake("amdahl", "this is Gustafson's law")
def gustafson(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn / n, s, s + (1 - s) * m


@mistake("amdahl", "it falls with m")
def same_efficiency(t1, tn, n, m):
    return t1 / tn / n, serial(t1, tn, n), t1 / tn / n * m


@mistake("amdahl", "a bound is put on it")
def between_nought_and_one(t1, tn, n, m):
    s = min(1.0, max(0.0, serial(t1, tn, n)))
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def not_below_nought(t1, tn, n, m):
    s = max(0.0, serial(t1, tn, n))
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def not_above_one(t1, tn, n, m):
    s = min(1.0, serial(t1, tn, n))
    return t1 / tn / n, s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def efficiency_at_most_one(t1, tn, n, m):
    s = serial(t1, tn, n)
    return min(1.0, t1 / tn / n), s, 1 / (s + (1 - s) / m)


@mistake("amdahl", "a bound is put on it")
def at_most_m(t1, tn, n, m):
    s = serial(t1, tn, n)
    return t1 / tn / n, s, min(m, 1 / (s + (1 - s) / m))


@mistake("amdahl", "the result is None")
def prints_it(t1, tn, n, m):
    print(t1 / tn / n)


@right("amdahl")
def by_time(t1, tn, n, m):
    s = (n * tn - t1) / (t1 * (n - 1))
    time = t1 * s + t1 * (1 - s) / m
    return t1 / (n * tn), s, t1 / time
