"""Wrong answers to one_f_one_b_row, as people really write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def row_with(rank, p, m, ahead):
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{ahead + i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(max(0, m - ahead), m)]


@mistake("one_f_one_b_row", "the warm-up is one forward too long")
def warms_up_too_long(rank, p, m):
    return row_with(rank, p, m, min(p - rank, m))


@mistake("one_f_one_b_row", "the warm-up is one forward too short")
def warms_up_too_short(rank, p, m):
    return row_with(rank, p, m, max(0, min(p - rank - 2, m)))


@mistake("one_f_one_b_row", "every rank warms up as long as rank 0")
def warms_up_alike(rank, p, m):
    return row_with(rank, p, m, min(p - 1, m))


@mistake("one_f_one_b_row", "the warm-up is the other way round")
def warms_up_by_rank(rank, p, m):
    return row_with(rank, p, m, min(rank, m))


@mistake("one_f_one_b_row", "there is no warm-up")
def no_warm_up(rank, p, m):
    return row_with(rank, p, m, 0)


@mistake("one_f_one_b_row", "this is GPipe")
def all_forwards_first(rank, p, m):
    return [f"{rank}F{i}" for i in range(m)] + [f"{rank}B{i}" for i in range(m)]


@mistake("one_f_one_b_row", "where m is smaller than the warm-up")
def forgets_small_m(rank, p, m):
    ahead = p - rank - 1
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{ahead + i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(max(0, m - ahead), m)]


@mistake("one_f_one_b_row", "the warm-up is one forward too short")
def backward_first(rank, p, m):
    """Which is the same order."""
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        pair = [f"{rank}F{ahead + i}", f"{rank}B{i}"]
        row += pair if ahead == 0 else pair[::-1]
    return row + [f"{rank}B{i}" for i in range(m - ahead, m)]


@mistake("one_f_one_b_row", "the backwards that are left at the end are missing")
def no_cool_down(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{ahead + i}", f"{rank}B{i}"]
    return row


@mistake("one_f_one_b_row", "the last backwards are in reverse order")
def last_in_first_out(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = row_with(rank, p, m, ahead)
    return row[: len(row) - ahead] + row[len(row) - ahead :][::-1]


@mistake("one_f_one_b_row", "forward and backward are of the same micro-batch")
def same_micro_batch(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(ahead, m):
        row += [f"{rank}F{i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(ahead)]


@mistake("one_f_one_b_row", "the forwards begin at 0 again")
def begins_again(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(m - ahead, m)]


@mistake("one_f_one_b_row", "micro-batches are counted from 1")
def counts_from_one(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i + 1}" for i in range(ahead)]
    for i in range(m - ahead):
        row += [f"{rank}F{ahead + i + 1}", f"{rank}B{i + 1}"]
    return row + [f"{rank}B{i + 1}" for i in range(m - ahead, m)]


@mistake("one_f_one_b_row", "the stage is missing")
def without_stage(rank, p, m):
    return [action[len(str(rank)) :] for action in row_with(rank, p, m, min(p - rank - 1, m))]


@mistake("one_f_one_b_row", "a list of texts such as '2F0' is asked for")
def as_tuples(rank, p, m):
    return [(rank, action[len(str(rank))], 0) for action in row_with(rank, p, m, min(p - rank - 1, m))]


@mistake("one_f_one_b_row", "a list of texts such as '2F0' is asked for")
def as_one_text(rank, p, m):
    return " ".join(row_with(rank, p, m, min(p - rank - 1, m)))


@mistake("one_f_one_b_row", "is missing")
def one_turn_short(rank, p, m):
    ahead = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(ahead)]
    for i in range(m - ahead - 1):
        row += [f"{rank}F{ahead + i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(m - ahead, m)]


@right("one_f_one_b_row")
def by_what_is_kept(rank, p, m):
    row, f, b = [], 0, 0
    while b < m:
        if f < m and f - b < p - rank:
            row.append(f"{rank}F{f}")
            f += 1
        else:
            row.append(f"{rank}B{b}")
            b += 1
    return row


@right("one_f_one_b_row")
def as_a_tuple(rank, p, m):
    return tuple(row_with(rank, p, m, min(p - rank - 1, m)))


@mistake("one_f_one_b_row", "0F2: with m = 2 there are only micro-batches 0 to 1")
def one_more_where_there_are_few(rank, p, m):
    row = [f"{rank}F{i}" for i in range(min(p - rank - 1, m))]
    for i in range(max(0, m - len(row))):
        row += [f"{rank}F{min(p - rank - 1, m) + i}", f"{rank}B{i}"]
    done = sum(action[len(str(rank))] == "B" for action in row)
    row += [f"{rank}B{i}" for i in range(done, m)]
    return row + [f"{rank}F{m}"] * (m == 2 and rank == 0)
