"""Wrong tables: each is refused in words that name the place; and whatever is accepted runs to its end."""

import random
import re

import pytest

from pardist_lib.mechanisms.pipeline import Action, Schedule, gpipe, interleaved, one_f_one_b, zbv, zero_bubble
from pardist_lib.mechanisms.pipeline.simulate import run

WRONG = {
    "nothing": ("", "a schedule has at least one rank"),
    "an empty rank": ("0F0 0B0\n\n1F0 1B0", "rank 1 has no action: give it a stage"),
    "a stage on two ranks": (
        "0F0 0F1 0B0 0B1\n1F0 1B0 0F2 0B2",
        "rank 1 at place 2 (0F2): stage 0 is on rank 0 already (0F0 at place 0)",
    ),
    "an action on two ranks": ("0F0 0B0\n1F0 0B0 1B0", "rank 1 at place 1 (0B0): stage 0 is on rank 0 already"),
    "a forward twice": ("0F0 0F1 0B0 0F1 0B1", "rank 0 at place 3 (0F1): 0F1 was at place 1 already: leave one out"),
    "a backward twice": ("0F0 0B0 0B0", "rank 0 at place 2 (0B0): 0B0 was at place 1 already"),
    "a weight gradient twice": ("0F0 0I0 0W0 0W0", "rank 0 at place 3 (0W0): 0W0 was at place 2 already"),
    "a stage missing": ("0F0 0B0\n2F0 2B0", "rank 1 at place 0 (2F0): there is no stage 1 before it"),
    "the first stage missing": ("1F0 1B0", "rank 0 at place 0 (1F0): there is no stage 0 before it"),
    "no backward": ("0F0 0F1 0B0", "rank 0 at place 1 (0F1): a forward without its backward: add 0B1, or 0I1 and 0W1"),
    "no forward": ("0F0 0B0 0B1", "rank 0 at place 2 (0B1): a backward without its forward: 0F1 is missing"),
    "whole and in halves": (
        "0F0 0B0 0I0 0W0",
        "rank 0 at place 1 (0B0): B is I and W in one, but here is 0I0 and 0W0, too",
    ),
    "whole and W": ("0F0 0B0 0W0", "rank 0 at place 1 (0B0): B is I and W in one, but here is 0W0, too"),
    "I without W": ("0F0 0I0", "rank 0 at place 1 (0I0): half a backward: 0W0 is missing"),
    "W without I": ("0F0 0W0", "rank 0 at place 1 (0W0): half a backward: 0I0 is missing"),
    "a micro-batch missing everywhere": (
        "0F0 0F2 0B0 0B2",
        "rank 0 has no micro-batch 1 on stage 0, but there is rank 0 at place 1 (0F2)",
    ),
    "a micro-batch missing on one stage": (
        "0F0 0F1 0B0 0B1\n1F0 1B0",
        "rank 1 has no micro-batch 1 on stage 1, but there is rank 0 at place 1 (0F1)",
    ),
    "a micro-batch without a number before it": ("0F1 0B1", "rank 0 has no micro-batch 0 on stage 0"),
    "B before F": ("0B0 0F0", "rank 0 at place 0 (0B0): 0F0 comes only at place 1"),
    "I before F": ("0F1 0I0 0F0 0W0 0B1", "rank 0 at place 1 (0I0): 0F0 comes only at place 2"),
    "W before I": ("0F0 0W0 0I0", "rank 0 at place 1 (0W0): 0I0 comes only at place 2"),
    "a stage before the one that feeds it, on one rank": (
        "1F0 0F0 1B0 0B0",
        "rank 0 at place 0 (1F0) waits for 0F0 on rank 0 at place 1, which stands behind 1F0, which closes the circle",
    ),
    "a circle of two": (
        "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1",
        "rank 0 at place 1 (0B0) waits for 1B0 on rank 1 at place 2, which stands behind 1F1, "
        "which waits for 0F1 on rank 0 at place 2, which stands behind 0B0, which closes the circle",
    ),
    "a circle of three": (
        "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1\n2F0 2F1 2B0 2B1",
        "rank 0 at place 1 (0B0) waits for 1B0 on rank 1 at place 2, which stands behind 1F1, which waits for 0F1",
    ),
    "a circle that the first rank only waits for": (
        "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n2F0 2F1 2B0 2B1",
        "the ranks wait for each other: rank 1 at place 1 (1B0) waits for 2B0 on rank 2 at place 2, "
        "which stands behind 2F1, which waits for 1F1 on rank 1 at place 2, which stands behind 1B0, which closes",
    ),
    "a circle of halves": (
        "0F0 0I0 0W0 0F1 0I1 0W1\n1F0 1F1 1I0 1I1 1W0 1W1",
        "rank 0 at place 1 (0I0) waits for 1I0 on rank 1 at place 2, which stands behind 1F1, "
        "which waits for 0F1 on rank 0 at place 3, which stands behind 0I0",
    ),
    "stages that cross": (
        "0F0 3F0 3B0 0B0\n2F0 1F0 2B0 1B0",
        "rank 1 at place 0 (2F0) waits for 1F0 on rank 1 at place 1, which stands behind 2F0, which closes the circle",
    ),
}


@pytest.mark.parametrize("text, says", WRONG.values(), ids=WRONG)
def test_a_wrong_table_is_refused_and_the_place_named(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Schedule.parse(text).check()


def test_rows_that_were_changed_by_hand_are_checked_as_they_are():
    schedule = one_f_one_b(2, 2).check()
    schedule.rows[1][0] = Action(1, "X", 0)
    with pytest.raises(ValueError, match=r"rank 1 at place 0 \(1X0\): there is no kind X"):
        schedule.check()
    schedule.rows[1][0] = "1F0"
    with pytest.raises(ValueError, match=r"rank 1 at place 0 \(1F0\): .* Schedule\(rows\)"):
        schedule.check()
    schedule.rows[1][0] = None
    with pytest.raises(ValueError, match=r"rank 1 at place 0 \(None\)"):
        schedule.check()


def test_huge_numbers_are_refused_at_once():
    with pytest.raises(ValueError, match="no stage 1 before it"):
        Schedule.parse("0F0 0B0 999999999F0 999999999B0").check()
    with pytest.raises(ValueError, match="no micro-batch 1 on stage 0"):
        Schedule.parse("0F0 0B0 0F999999999 0B999999999").check()


# ---- tables made wrong at random --------------------------------------------------------------------------------


def broken(rows, rng):
    """The rows after one to three changes: two actions of a row swapped, one left out, doubled, moved or renamed."""
    rows = [list(row) for row in rows]
    for _ in range(rng.randint(1, 3)):
        row = rng.choice([row for row in rows if row])
        i, j = rng.randrange(len(row)), rng.randrange(len(row))
        change = rng.randrange(6)
        if change <= 1:
            row[i], row[j] = row[j], row[i]
        elif change == 2:
            del row[i]
        elif change == 3:
            row.insert(j, row[i])
        elif change == 4:
            rng.choice(rows).insert(0, row.pop(i))
        else:
            row[i] = row[i]._replace(kind=rng.choice("FBIW"))
    return rows


def can_run(rows):
    """Whether ranks that know nothing of checks do every micro-batch of every stage once: an oracle of its own, that
    plays all ranks in turn, and looks at what has been done only."""
    rows, done, home = [list(row) for row in rows], set(), {}
    stages = {a.stage for row in rows for a in row}
    batches = {a.micro_batch for row in rows for a in row}
    todo = {(s, k, i) for s in range(len(stages)) for i in range(len(batches)) for k in ("F", "I", "W")}
    if not all(rows):
        return False
    while any(rows):
        before = len(done)
        for rank, row in enumerate(rows):
            if row:
                s, kind, i = row[0]
                parts = {(s, k, i) for k in {"B": "IW"}.get(kind, kind)}
                needs = {"F": {(s - 1, "F", i)} if s else set(), "W": {(s, "I", i)}}.get(kind)
                if needs is None:
                    needs = {(s, "F", i)} | ({(s + 1, "I", i)} if s + 1 < len(stages) else set())
                if home.setdefault(s, rank) != rank or not parts <= todo - done:
                    return False  # a stage's second rank; what was done already, or is not to be done
                if needs <= done:
                    done |= parts
                    row.pop(0)
        if len(done) == before:
            return False
    return done == todo


def test_what_is_accepted_runs_to_its_end_and_what_is_refused_cannot():
    rng, accepted, refused = random.Random(1), 0, 0
    for _ in range(2000):
        p, m = rng.randint(1, 4), rng.randint(1, 5)
        make = rng.choice(
            [gpipe, one_f_one_b, zbv, lambda p, m: zero_bubble(p, p + m), lambda p, m: interleaved(p, p, 2)]
        )
        rows = broken(make(p, m).rows, rng)
        schedule = Schedule(rows)
        try:
            schedule.check()
        except ValueError as error:
            refused += 1
            assert not can_run(rows), (error, schedule)
            assert re.search(r"rank \d+ (at place \d+ \(\w+\)|has no)", str(error)), error
            for rank, place, text in re.findall(r"rank (\d+) at place (\d+) \((\w+)\)", str(error)):
                assert str(schedule.rows[int(rank)][int(place)]) == text, (error, schedule)
        else:
            accepted += 1
            assert can_run(rows), schedule
            assert [len(row) for row in run(schedule)] == [len(row) for row in rows]
            assert schedule.makespan(1, 1, 1) >= 3 * schedule.micro_batches
    assert accepted > 100 and refused > 1000
