"""may_proceed: wrong answers as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("may_proceed", "exactly `staleness` steps ahead may still go on")
def too_strict(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min(clocks) < staleness


@mistake("may_proceed", "the wrong way round: it holds the slow worker back")
def holds_the_slow_one(clocks, worker, staleness):
    return staleness is None or max(clocks) - clocks[worker] <= staleness


@mistake("may_proceed", "compared with the fastest")
def looks_at_the_spread(clocks, worker, staleness):
    return staleness is None or max(clocks) - min(clocks) <= staleness


@mistake("may_proceed", "compared with the mean of the clocks")
def looks_at_the_mean(clocks, worker, staleness):
    return staleness is None or clocks[worker] - sum(clocks) / len(clocks) <= staleness


@mistake("may_proceed", "True and False are swapped")
def has_to_wait(clocks, worker, staleness):
    return staleness is not None and clocks[worker] - min(clocks) > staleness


@mistake("may_proceed", "NoneType")
def forgets_none(clocks, worker, staleness):
    return clocks[worker] - min(clocks) <= staleness


@mistake("may_proceed", "staleness None means that nobody waits")
def none_is_zero(clocks, worker, staleness):
    return staleness is not None and clocks[worker] - min(clocks) <= staleness


@mistake("may_proceed", "True or False is asked for")
def how_far(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min(clocks)


@mistake("may_proceed", "clocks was changed")
def sorts_it(clocks, worker, staleness):
    mine = clocks[worker]
    clocks.sort()
    return staleness is None or mine - clocks[0] <= staleness


@mistake("may_proceed", "compared with worker 0's clock")
def looks_at_worker_0(clocks, worker, staleness):
    return staleness is None or clocks[worker] - clocks[0] <= staleness


@mistake("may_proceed", "([4], 0, 0): rank 0 raised ValueError: min() arg is an empty sequence: there can be nothing")
def looks_at_the_others(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min(clocks[:worker] + clocks[worker + 1 :]) <= staleness


@mistake("may_proceed", "0 is a bound like any other, not None")
def takes_zero_for_none(clocks, worker, staleness):
    return not staleness or clocks[worker] - min(clocks) <= staleness


@mistake("may_proceed", "workers that have not begun are left out: they are the slowest")
def leaves_out_who_has_not_begun(clocks, worker, staleness):
    return staleness is None or clocks[worker] - min([c for c in clocks if c], default=0) <= staleness


@right("may_proceed")
def nobody_is_too_far_behind(clocks, worker, staleness):
    if staleness is None:
        return True
    return all(clock >= clocks[worker] - staleness for clock in clocks)
