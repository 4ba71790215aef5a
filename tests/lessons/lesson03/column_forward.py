"""column_forward: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
from torch.nn import functional as F

from pardist_lib.mechanisms.tensor_parallel.linear import ColumnParallelLinear
from tests.lessons.lesson03.shared import function, place, summed
from tests.lessons.planted import mistake, right


@mistake("column_forward", "every rank has all output features")
def the_whole_layer(x, weight, bias):
    return F.linear(x, weight, bias)


@mistake("column_forward", "the bias is left out")
def no_bias(x, weight, bias):
    rank, n = place()
    return x @ weight.tensor_split(n)[rank].T


@mistake("column_forward", "the bias is rank 0's")
def first_bias(x, weight, bias):
    rank, n = place()
    w = weight.tensor_split(n)[rank]
    return x @ w.T if bias is None else x @ w.T + bias[: len(w)]


@mistake("column_forward", "no other rank adds to these features")
def a_share_of_the_bias(x, weight, bias):
    rank, n = place()
    y = F.linear(x, weight.tensor_split(n)[rank])
    return y if bias is None else y + bias.tensor_split(n)[rank] / n


@mistake("column_forward", "must match the size of tensor b")
def the_whole_bias(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.tensor_split(n)[rank]) + bias


@mistake("column_forward", "cannot be multiplied")
def cuts_the_input_features(x, weight, bias):
    rank, n = place()
    return x @ weight.tensor_split(n, dim=1)[rank].T + bias


@mistake("column_forward", "the remainder is on no rank")
def rounds_down(x, weight, bias):
    rank, n = place()
    own = len(weight) // n
    part = slice(rank * own, (rank + 1) * own)
    return F.linear(x, weight[part], None if bias is None else bias[part])


@mistake("column_forward", "cut as torch.chunk cuts")
def chunks(x, weight, bias):
    rank, n = place()

    def mine(t):
        return [*t.chunk(n), *[t[:0]] * n][rank]

    return F.linear(x, mine(weight), None if bias is None else mine(bias))


@mistake("column_forward", "every n-th feature")
def every_nth(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight[rank::n], None if bias is None else bias[rank::n])


@mistake("column_forward", "every rank has rank 0's features")
def forgets_the_rank(x, weight, bias):
    _, n = place()
    return F.linear(x, weight.tensor_split(n)[0], None if bias is None else bias.tensor_split(n)[0])


@mistake("column_forward", "cut the weight before, not the result after")
def cuts_the_result(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight, bias).tensor_split(n, -1)[rank]


@mistake("column_forward", "it calls all_gather")
def gathers_the_output(x, weight, bias):
    rank, n = place()
    y = F.linear(x, weight.tensor_split(n)[rank], bias.tensor_split(n)[rank])
    parts = [torch.empty_like(y) for _ in range(n)]
    dist.all_gather(parts, y)
    return torch.cat(parts, -1)


@mistake("column_forward", "with 3 ranks (is a 4 written into it?)")
def four_ranks_only(x, weight, bias):
    rank, _ = place()
    return F.linear(x, weight.tensor_split(4)[rank], None if bias is None else bias.tensor_split(4)[rank])


@mistake("column_forward", "where bias is None")
def no_thought_of_none(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.tensor_split(n)[rank], bias.tensor_split(n)[rank])


@mistake("column_forward", "the course's own")
def the_courses_own_layer(x, weight, bias):
    layer = torch.nn.Linear(weight.shape[1], len(weight), bias is not None)
    layer.weight.data = weight
    if bias is not None:
        layer.bias.data = bias
    return ColumnParallelLinear.from_module(layer)(x)


@mistake("column_forward", "`weight` gets no gradient")
def weights_cut_off(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.detach().tensor_split(n)[rank], None if bias is None else bias.tensor_split(n)[rank])


@mistake("column_forward", "`x` gets no gradient")
def computes_without_autograd(x, weight, bias):
    rank, n = place()
    with torch.no_grad():
        y = F.linear(x, weight.tensor_split(n)[rank])
    return y if bias is None else y + bias.tensor_split(n)[rank]


@mistake("column_forward", "that is the work of f")
def sums_the_gradient_of_x(x, weight, bias):
    rank, n = place()
    x = function(lambda x: x.view_as(x), summed)(x)
    return F.linear(x, weight.tensor_split(n)[rank], None if bias is None else bias.tensor_split(n)[rank])


@right("column_forward")
def by_linear_on_moved_dimensions(x, weight, bias):
    rank, n = place()
    begin, end = (sum(len(w) for w in weight.tensor_split(n)[:r]) for r in (rank, rank + 1))
    y = torch.einsum("...i,oi->...o", x, weight[begin:end])
    return y if bias is None else y.add_(bias[begin:end])


@mistake("column_forward", "is the weight cut along dim=1, its input features? An output feature is a row of it, dim=0")
def cuts_the_inputs(x, weight, bias):
    n, rank = dist.get_world_size(), dist.get_rank()
    return x @ weight.tensor_split(n, dim=1)[rank].T + bias.tensor_split(n)[rank]


@mistake("column_forward", "is the bias still whole? To this rank's output features belongs the same part of it")
def adds_the_whole_bias(x, weight, bias):
    return x @ weight.tensor_split(dist.get_world_size())[dist.get_rank()].T + bias


@mistake("column_forward", "so it has to be turned: x @ w.T")
def does_not_turn_the_weight(x, weight, bias):
    rank, n = place()
    return x @ weight.tensor_split(n)[rank]


@mistake("column_forward", "(of weight.T, dim=1)")
def cuts_rows_of_the_turned_weight(x, weight, bias):
    rank, n = place()
    return x @ weight.T.tensor_split(n)[rank]


@mistake("column_forward", "is the bias still whole?")
def the_whole_bias_in_linear(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.tensor_split(n)[rank], bias)


@mistake("column_forward", "split(n) cuts parts of n each")
def splits_into_fours(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.split(n)[rank], bias.split(n)[rank])


@mistake("column_forward", "rank r has the part of rank r - 1")
def one_rank_off(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.tensor_split(n)[rank - 1], None if bias is None else bias.tensor_split(n)[rank - 1])


@mistake("column_forward", "a new Parameter")
def a_linear_layer_of_new_parameters(x, weight, bias):
    rank, n = place()
    own = torch.nn.Parameter(weight.tensor_split(n)[rank])
    return F.linear(x, own, None if bias is None else bias.tensor_split(n)[rank])


@mistake("column_forward", "cut by the number of input features")
def as_many_as_inputs(x, weight, bias):
    rank, n = place()
    part = slice(rank * (weight.shape[1] // n), (rank + 1) * (weight.shape[1] // n))
    return F.linear(x, weight[part], None if bias is None else bias[part])


@mistake("column_forward", "bias[rank] is one number")
def one_number_of_the_bias(x, weight, bias):
    rank, n = place()
    return F.linear(x, weight.tensor_split(n)[rank]) + bias[rank]
