"""Answers to exposed: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


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
