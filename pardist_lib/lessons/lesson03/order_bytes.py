"""Bytes of a step by how two layers are split; typically backward, gathers or half of an all-reduce are left out."""

from functools import partial

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
    sizes = (8, 10, 20, 4), (3, 12, 24, 2), (5, 12, 6, 3), (7, 10, 40, 1)
    inputs = [(order, *size) for size in sizes for order in TRAVELS]
    labels = [f"order_bytes({', '.join(map(repr, given))})" for given in inputs]
    mistakes = {
        "only forward is counted: a training step goes backward, too": {"back": 0},
        "only backward is counted": {"ahead": 0},
        "an all-reduce is counted as (n - 1)/n · S: it is two halves, 2(n - 1)/n · S": {"reduce": 1},
        "an all-reduce is counted as S and a gather as S: each rank sends 2(n - 1)/n · S and (n - 1)/n · S": {
            "reduce": 1,
            "share": lambda n: 1,
        },
        "the factor (n - 1)/n is missing": {"share": lambda n: 1},
        "these are numbers, not bytes: a float32 has 4": {"each": 1},
        "all ranks' bytes are counted together: each one's are asked for": {"share": lambda n: n - 1},
        "a gather is counted like an all-reduce: it costs half of it": {"gathers": (2, 2)},
        "the gathers are left out: what is in parts but needed whole has to be gathered": {"gathers": (0, 0)},
        "forward's gathers are counted, backward's are not: what is in parts there is gathered, too": {
            "gathers": (1, 0)
        },
        "backward's gathers are counted, forward's are not: an output in parts is gathered, too": {"gathers": (0, 1)},
    }
    share = "is counted as one rank's part, S/n: S is the size of what all ranks' parts make together"
    mistakes = {why: partial(_bytes, **how) for why, how in mistakes.items()} | {
        f"what is gathered {share}": lambda *a: _bytes(*a, gathers=(1 / a[-1], 1 / a[-1])),
        f"what is as wide as hidden {share}": lambda o, t, w, h, n: _bytes(o, t, w, h / n, n),
        "in column, row nothing is gathered: what the first layer leaves, in parts, is what the second one needs": (
            lambda o, t, w, h, n: _bytes(o, t, w, h, n) + (o == "column, row") * 2 * (n - 1) / n * 4 * t * h
        ),
        "tokens are not counted: every token's numbers travel": lambda o, t, *a: _bytes(o, 1, *a),
        "these are the weights' bytes, tokens or not: the weights stay, it is what the layers compute that travels": (
            lambda o, t, w, h, n: 2 * (n - 1) / n * 4 * 2 * w * h
        ),
        "zero: (n - 1) // n is an integer division": lambda *a: 0,
        "every order is counted like column, row": lambda order, *a: _bytes("column, row", *a),
        "width and hidden are swapped": lambda o, t, w, h, n: _bytes(o, t, h, w, n),
    }
    numbers(run, inputs, [_bytes(*given) for given in inputs], labels, mistakes.items())


TRAVELS = {  # what is all-reduced and what is gathered, forward and backward: h as wide as hidden, w as width
    "column, row": (("w", ""), ("w", "")),
    "row, column": (("h", "w"), ("h", "w")),
    "column, column": (("", "hw"), ("hw", "")),
    "row, row": (("hw", ""), ("", "hw")),
}


def _bytes(order, tokens, width, hidden, n, reduce=2, gathers=(1, 1), ahead=1, back=1, each=4, share=None):
    size, total = {"h": each * tokens * hidden, "w": each * tokens * width}, 0
    for (reduced, gathered), gather, counts in zip(TRAVELS[order], gathers, (ahead, back), strict=True):
        total += counts * (reduce * sum(size[one] for one in reduced) + gather * sum(size[one] for one in gathered))
    return total * (share(n) if share else (n - 1) / n)


why = (
    "Column, row is cheapest where hidden is the wide one, as in an MLP: only the ends are all-reduced; every other "
    "order sends the hidden layer, forward or backward. Megatron has this order written into its MLP and attention; "
    "DTensor works out from a tensor's placements what to send."
)
exercise = Exercise(hints, check, minutes=12, level="hard", why=why)
