"""Wrong answers to in_flight, as people really write them, and unusual right ones."""

import re

from tests.lessons.planted import mistake, right


@mistake("in_flight", "I lets go of nothing")
def frees_at_i(row):
    held = most = 0
    for action in row:
        held += ("F" in action) - ("B" in action or "I" in action)
        most = max(most, held)
    return most


@mistake("in_flight", "I and W together let go of one micro-batch")
def frees_twice(row):
    held = most = 0
    for action in row:
        held += 1 if "F" in action else -1
        most = max(most, held)
    return most


@mistake("in_flight", "where backward is in halves nothing is let go of")
def knows_only_b(row):
    held = most = 0
    for action in row:
        held += ("F" in action) - ("B" in action)
        most = max(most, held)
    return most


@mistake("in_flight", "where backward is whole, B, nothing is let go of")
def knows_only_w(row):
    held = most = 0
    for action in row:
        held += ("F" in action) - ("W" in action)
        most = max(most, held)
    return most


@mistake("in_flight", "these are all forwards of the row")
def counts_forwards(row):
    return sum("F" in action for action in row)


@mistake("in_flight", "this is what is kept at the end of the row")
def returns_the_last(row):
    held = 0
    for action in row:
        held += ("F" in action) - ("B" in action or "W" in action)
    return held


@mistake("in_flight", "a micro-batch counts once for each stage that keeps it")
def a_set_of_numbers(row):
    held, most = set(), 0
    for action in row:
        _, kind, i = re.match(r"(\d+)([FBIW])(\d+)", action).groups()
        if kind == "F":
            held.add(i)
        elif kind in "BW":
            held.discard(i)
        most = max(most, len(held))
    return most


@mistake("in_flight", "these are the micro-batches of one stage")
def the_fullest_stage(row):
    held, most = {}, 0
    for action in row:
        stage, kind, _ = re.match(r"(\d+)([FBIW])(\d+)", action).groups()
        held[stage] = held.get(stage, 0) + (kind == "F") - (kind in "BW")
        most = max(most, *held.values())
    return most


@mistake("in_flight", "a stage may have two digits")
def by_the_second_character(row):
    held = most = 0
    for action in row:
        held += {"F": 1, "B": -1, "W": -1}.get(action[1], 0)
        most = max(most, held)
    return most


@mistake("in_flight", "one too few")
def looks_before_the_forward(row):
    held = most = 0
    for action in row:
        most = max(most, held if "F" in action else 0)
        held += ("F" in action) - ("B" in action or "W" in action)
    return most


@mistake("in_flight", "did you print it instead of returning it?")
def prints_it(row):
    held = most = 0
    for action in row:
        held += ("F" in action) - ("B" in action or "W" in action)
        most = max(most, held)
    print(most)


@mistake("in_flight", "")
def reads_one_digit(row):
    """Stages from 10 on have two."""
    held = most = 0
    for action in row:
        held += (action[1] == "F") - (action[1] in "BW")
        most = max(most, held)
    return most


@right("in_flight")
def all_beginnings(row):
    def kept(k):
        return sum("F" in a for a in row[:k]) - sum("B" in a or "W" in a for a in row[:k])

    return max(kept(k) for k in range(len(row) + 1))


@right("in_flight")
def a_set_of_pairs(row):
    held, most = set(), 0
    for action in row:
        stage, kind, i = re.match(r"(\d+)([FBIW])(\d+)", action).groups()
        if kind == "F":
            held |= {(stage, i)}
        elif kind != "I":
            held -= {(stage, i)}
        most = max(most, len(held))
    return most
