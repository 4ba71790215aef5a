"""Wrong answers to my_schedule, as people really write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def one_f_one_b(p, m, halves=False):
    rows = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        row = [f"{rank}F{i}" for i in range(ahead)]
        for i in range(m):
            row += [f"{rank}F{ahead + i}"] if ahead + i < m else []
            row += [f"{rank}I{i}", f"{rank}W{i}"] if halves else [f"{rank}B{i}"]
        rows.append(row)
    return rows


def late(p, m, by):
    """1F1B with I, and W `by(rank)` micro-batches late."""
    rows = []
    for rank in range(p):
        ahead = min(p - rank - 1, m)
        row = [f"{rank}F{i}" for i in range(ahead)]
        for i in range(m):
            row += [f"{rank}F{ahead + i}"] if ahead + i < m else []
            row += [f"{rank}I{i}"]
            row += [f"{rank}W{i - by(rank)}"] if i >= by(rank) else []
        rows.append(row + [f"{rank}W{i}" for i in range(max(0, m - by(rank)), m)])
    return rows


@mistake("my_schedule", "its bubble is 1F1B's: with whole backwards there is nothing to be gained")
def hands_in_1f1b(p, m):
    return one_f_one_b(p, m)


@right("my_schedule")
def splits_only(p, m):
    """Every W right behind its I: the rank before does not wait for it."""
    return one_f_one_b(p, m, halves=True)


@mistake("my_schedule", "more than 1F1B anywhere")
def all_weights_at_the_end(p, m):
    return late(p, m, lambda rank: m)


@mistake("my_schedule", "micro-batches in flight, more than 1F1B anywhere")
def gpipe(p, m):
    return [[f"{r}F{i}" for i in range(m)] + [f"{r}B{i}" for i in range(m)] for r in range(p)]


@mistake("my_schedule", "half a backward: 0W7 is missing")
def forgets_the_last_w(p, m):
    return [row[:-1] for row in late(p, m, lambda rank: rank)]


@mistake("my_schedule", "it cannot run")
def w_before_i(p, m):
    return [[a.replace("I", "?").replace("W", "I").replace("?", "W") for a in row] for row in late(p, m, lambda r: r)]


@mistake("my_schedule", "the ranks wait for each other")
def a_backward_too_early(p, m):
    rows = late(p, m, lambda rank: rank)
    rows[0].remove("0F1")
    rows[0].insert(rows[0].index("0I1"), "0F1")
    rows[1].remove("1I0")
    rows[1].insert(1, "1I0")
    rows[1].remove("1F1")
    rows[1].insert(0, "1F1")
    return rows


@mistake("my_schedule", "there are 1 rows for 4 ranks")
def one_row(p, m):
    return late(p, m, lambda rank: rank)[:1]


@mistake("my_schedule", "lists of texts such as '2F0' are asked for")
def one_text(p, m):
    return "\n".join(",".join(row) for row in late(p, m, lambda rank: rank))


@mistake("my_schedule", "micro-batches, not 8")
def too_few_micro_batches(p, m):
    return late(p, p, lambda rank: rank)


@mistake("my_schedule", "one stage a rank is asked for, stage r on r")
def ranks_reversed(p, m):
    return late(p, m, lambda rank: rank)[::-1]


@mistake("my_schedule", "it has 8 micro-batches, not 3")
def written_for_eight(p, m):
    return late(4, 8, lambda rank: rank)[:p]


@mistake("my_schedule", "an action is a stage, a kind and a micro-batch")
def without_stages(p, m):
    return [[action[1:] for action in row] for row in late(p, m, lambda rank: rank)]


@mistake("my_schedule", "its bubble is larger than 1F1B's")
def one_after_the_other(p, m):
    return [[f"{rank}{kind}{i}" for i in range(m) for kind in "FIW"] for rank in range(p)]


@right("my_schedule")
def the_papers(p, m):
    return late(p, m, lambda rank: rank)


@right("my_schedule")
def a_little_better(p, m):
    """Only the last rank's W's are late."""
    return late(p, m, lambda rank: 1 if rank else 0)


@right("my_schedule")
def tuples(p, m):
    return tuple(tuple(row) for row in late(p, m, lambda rank: rank))
