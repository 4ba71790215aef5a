"""The exercise order_bytes."""

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "Go through the two layers forward: a column-parallel layer sends nothing and leaves its output in parts, a "
    "row-parallel layer leaves summands. What does the next one need, and what does the caller?",
    "Backward is forward in a mirror: after column the input's gradient is a summand on each rank (all-reduce), "
    "after row it is in parts (nothing, where the layer before left parts; else a gather).",
    "column, row: the output's all-reduce forward, the input's all-reduce backward, 2(n - 1)/n · 4 · tokens · "
    "width each. In all other orders something as wide as hidden travels, too.",
)


def check(run):
    sizes = [(8, 10, 20, 4), (3, 12, 24, 2), (5, 12, 6, 3), (7, 10, 40, 1)]
    orders = ("column, row", "row, column", "column, column", "row, row")
    inputs = [(order, *size) for size in sizes for order in orders]
    labels = [f"order_bytes({', '.join(map(repr, given))})" for given in inputs]
    mistakes = [
        ("only forward is counted: a training step goes backward, too", lambda *a: _bytes(*a, back=0)),
        ("only backward is counted", lambda *a: _bytes(*a, ahead=0)),
        ("an all-reduce is counted as (n - 1)/n · S: it is two halves, 2(n - 1)/n · S",
         lambda *a: _bytes(*a, reduce=1)),
        ("an all-reduce is counted as S and a gather as S: each rank sends 2(n - 1)/n · S and (n - 1)/n · S",
         lambda *a: _bytes(*a, reduce=1, factor=1)),
        ("the factor (n - 1)/n is missing", lambda *a: _bytes(*a, factor=1)),
        ("these are numbers, not bytes: a float32 has 4", lambda *a: _bytes(*a) / 4),
        ("all ranks' bytes are counted together: each one's are asked for", lambda *a: _bytes(*a) * a[-1]),
        ("a gather is counted like an all-reduce: it costs half of it", lambda *a: _bytes(*a, gather=2)),
        ("the gathers are left out: what is in parts but needed whole has to be gathered",
         lambda *a: _bytes(*a, gather=0)),
        ("forward's gathers are counted, backward's are not: what is in parts on the way back is gathered, too",
         lambda *a: _bytes(*a, back=0) + _bytes(*a, ahead=0, gather=0)),
        ("backward's gathers are counted, forward's are not: an output in parts is gathered, too",
         lambda *a: _bytes(*a, ahead=0) + _bytes(*a, back=0, gather=0)),
        ("every order is counted like column, row", lambda order, *a: _bytes("column, row", *a)),
        ("width and hidden are swapped", lambda o, t, w, h, n: _bytes(o, t, h, w, n)),
    ]  # fmt: skip
    expected = [_bytes(*given) for given in inputs]
    numbers(run, inputs, expected, labels, mistakes)


def _bytes(order, tokens, width, hidden, n, reduce=2, gather=1, ahead=1, back=1, factor=None):
    wide, narrow = 4 * tokens * hidden, 4 * tokens * width
    forward = {
        "column, row": reduce * narrow,
        "row, column": reduce * wide + gather * narrow,
        "column, column": gather * wide + gather * narrow,
        "row, row": reduce * wide + reduce * narrow,
    }
    backward = {
        "column, row": reduce * narrow,
        "row, column": reduce * wide + gather * narrow,
        "column, column": reduce * wide + reduce * narrow,
        "row, row": gather * wide + gather * narrow,
    }
    factor = (n - 1) / n if factor is None else factor
    return factor * (ahead * forward[order] + back * backward[order])


exercise = Exercise(hints, check)
