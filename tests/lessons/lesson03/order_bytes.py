"""order_bytes: wrong answers as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


def halves(order, tokens, width, hidden, forward=True, backward=True, reduce=2, gather=1):
    """Bytes before the factor (n - 1)/n, layer by layer."""
    wide, narrow = 4 * tokens * hidden, 4 * tokens * width
    total = 0
    for kind, before, after in zip(order.split(", "), (narrow, wide), (wide, narrow), strict=True):
        inside = order == "column, row"
        if kind == "column":
            total += forward * gather * after * (not inside) + backward * reduce * before
        else:
            total += forward * reduce * after + backward * gather * before * (not inside)
    return total


@right("order_bytes")
def layer_by_layer(order, tokens, width, hidden, n):
    return (n - 1) * halves(order, tokens, width, hidden) / n


@mistake("order_bytes", "only forward is counted")
def forward_only(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, width, hidden, backward=False)


@mistake("order_bytes", "an all-reduce is counted as (n - 1)/n · S")
def halves_only(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, width, hidden, reduce=1)


@mistake("order_bytes", "an all-reduce is counted as S and a gather as S")
def sizes_only(order, tokens, width, hidden, n):
    return halves(order, tokens, width, hidden, reduce=1)


@mistake("order_bytes", "numbers, not bytes")
def elements(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, width, hidden) / 4


@mistake("order_bytes", "all ranks' bytes are counted together")
def all_ranks(order, tokens, width, hidden, n):
    return (n - 1) * halves(order, tokens, width, hidden)


@mistake("order_bytes", "the factor (n - 1)/n is missing")
def no_factor(order, tokens, width, hidden, n):
    return halves(order, tokens, width, hidden)


@mistake("order_bytes", "every order is counted like column, row")
def one_for_all(order, tokens, width, hidden, n):
    return 4 * (n - 1) / n * 4 * tokens * width


@mistake("order_bytes", "the gathers are left out")
def no_gathers(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, width, hidden, gather=0)


@mistake("order_bytes", "forward's gathers are counted, backward's are not")
def gathers_forward_only(order, tokens, width, hidden, n):
    backward = halves(order, tokens, width, hidden, forward=False, gather=0)
    return (n - 1) / n * (halves(order, tokens, width, hidden, backward=False) + backward)


@mistake("order_bytes", "backward's gathers are counted, forward's are not")
def gathers_backward_only(order, tokens, width, hidden, n):
    forward = halves(order, tokens, width, hidden, backward=False, gather=0)
    return (n - 1) / n * (halves(order, tokens, width, hidden, forward=False) + forward)


@mistake("order_bytes", "width and hidden are swapped")
def swapped(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, hidden, width)


@mistake("order_bytes", "what is gathered is counted as one rank's part")
def gathers_of_a_part(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, width, hidden, gather=1 / n)


@mistake("order_bytes", "tokens are not counted")
def without_tokens(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, 1, width, hidden)


@mistake("order_bytes", "what is as wide as hidden is counted as one rank's part")
def hidden_of_a_rank(order, tokens, width, hidden, n):
    return (n - 1) / n * halves(order, tokens, width, hidden / n)


@mistake("order_bytes", "these are the weights' bytes")
def weights_travel(order, tokens, width, hidden, n):
    return 2 * (n - 1) / n * 4 * 2 * width * hidden


@mistake("order_bytes", "(n - 1) // n is an integer division")
def divides_whole_numbers(order, tokens, width, hidden, n):
    return (n - 1) // n * halves(order, tokens, width, hidden)


@mistake("order_bytes", "in column, row nothing is gathered")
def each_layer_for_itself(order, tokens, width, hidden, n):
    more = 2 * 4 * tokens * hidden if order == "column, row" else 0
    return (n - 1) / n * (halves(order, tokens, width, hidden) + more)
