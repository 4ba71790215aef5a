"""Wrong answers to the exercises of lesson 03, as people really write them; and some right ones."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_backward
from planted import mistake, right
from torch.nn import functional as F

from pardist_lib.mechanisms.autograd_collectives import copy_to_group
from pardist_lib.mechanisms.parallel_linear import ColumnParallelLinear


def place(group=None):
    return dist.get_rank(group), dist.get_world_size(group)


# ---- column_forward -------------------------------------------------------------------------------------------


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


# ---- row_forward ----------------------------------------------------------------------------------------------


@mistake("row_forward", "the bias is added 4 times, once by each rank")
def bias_on_every_rank(x, weight, bias, group=None):
    y = F.linear(x, weight, bias)
    dist.all_reduce(y, group=group)
    return y


@mistake("row_forward", "the bias is left out")
def no_bias_at_all(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y


@mistake("row_forward", "in the output of rank 0 only")
def bias_on_rank_0_too_late(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y + bias if dist.get_rank(group) == 0 and bias is not None else y


@mistake("row_forward", "nothing was added up")
def no_sum(x, weight, bias, group=None):
    return F.linear(x, weight, bias)


@mistake("row_forward", "not their mean")
def the_mean(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    y /= dist.get_world_size(group)
    return y if bias is None else y + bias


@mistake("row_forward", "all_gather, which brings every summand")
def gathers_the_summands(x, weight, bias, group=None):
    y = x @ weight.T
    parts = [torch.empty_like(y) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, y, group=group)
    return sum(parts) if bias is None else sum(parts) + bias


@mistake("row_forward", "reduce, which brings the sum to one rank only")
def to_rank_0(x, weight, bias, group=None):
    y = x @ weight.T
    dist.reduce(y, dst=0, group=group)
    return y if bias is None else y + bias


@mistake("row_forward", "the group argument is ignored")
def all_the_world(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y)
    return y if bias is None else y + bias


@mistake("row_forward", "`bias` was changed")
def adds_into_the_bias(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    if bias is None:
        return y
    bias.div_(1)  # harmless so far
    bias += 1
    return y + bias - 1


@mistake("row_forward", "2 all_reduce")
def reduces_the_bias_too(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    if bias is None:
        return y
    mean = bias.clone()
    dist.all_reduce(mean, group=group)
    return y + mean / dist.get_world_size(group)


@mistake("row_forward", "where bias is None")
def always_a_bias(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, group=group)
    return y + bias


@mistake("row_forward", "MAX over the ranks")
def the_largest(x, weight, bias, group=None):
    y = x @ weight.T
    dist.all_reduce(y, op=dist.ReduceOp.MAX, group=group)
    return y if bias is None else y + bias


@mistake("row_forward", "`bias` gets a gradient on some ranks only")
def one_rank_brings_the_bias(x, weight, bias, group=None):
    y = F.linear(x, weight, bias if dist.get_rank(group) == 0 else None)
    dist.all_reduce(y.data, group=group)
    return y


@mistake("row_forward", "gets a share of its gradient")
def everybody_brings_a_share_of_the_bias(x, weight, bias, group=None):
    y = F.linear(x, weight) + (0 if bias is None else bias / dist.get_world_size(group))
    dist.all_reduce(y.data, group=group)
    return y


@mistake("row_forward", "`x` gets no gradient")
def sums_a_copy(x, weight, bias, group=None):
    y = (x @ weight.T).detach()
    dist.all_reduce(y, group=group)
    return y if bias is None else y + bias


@mistake("row_forward", "`weight` gets no gradient")
def weights_without_autograd(x, weight, bias, group=None):
    y = g_of(x @ weight.data.T, group)
    return y if bias is None else y + bias


@mistake("row_forward", "its backward 4 times too large")
def sums_backward_too(x, weight, bias, group=None):
    y = function(lambda y: summed(y, group), lambda g: summed(g, group))(x @ weight.T)
    return y if bias is None else y + bias


@mistake("row_forward", "goes on to each summand whole")
def divides_backward(x, weight, bias, group=None):
    y = function(lambda y: summed(y, group), lambda g: g / dist.get_world_size(group))(x @ weight.T)
    return y if bias is None else y + bias


@mistake("row_forward", "but backward calls all_reduce")
def averages_equal_gradients(x, weight, bias, group=None):
    n = dist.get_world_size(group)
    y = function(lambda y: summed(y, group), lambda g: summed(g, group) / n)(x @ weight.T)
    return y if bias is None else y + bias


def g_of(y, group=None):
    return function(lambda y: summed(y, group), lambda g: g)(y)


@right("row_forward")
def with_g(x, weight, bias, group=None):
    y = g_of(F.linear(x, weight), group)
    return y if bias is None else y + bias


@right("row_forward")
def behind_autograds_back(x, weight, bias, group=None):
    y = x @ weight.T
    others = summed(y.detach(), group) - y.detach()
    return y + others if bias is None else y + others + bias


# ---- my_copy_to_group -----------------------------------------------------------------------------------------


def function(forward, backward):
    """A torch.autograd.Function of two functions, applied."""
    parts = {"forward": staticmethod(lambda ctx, x: forward(x)), "backward": staticmethod(lambda ctx, g: backward(g))}
    return type("Made", (torch.autograd.Function,), parts).apply


def summed(g, group=None, op=dist.ReduceOp.SUM):
    total = g.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, op=op, group=group)
    return total


@mistake("my_copy_to_group", "the all_reduce is missing")
def nothing_backward(x, group=None):
    return x.view_as(x) * 1


@mistake("my_copy_to_group", "their mean is 4 times too small")
def mean_backward(x, group=None):
    return function(lambda x: x.view_as(x), lambda g: summed(g, group) / dist.get_world_size(group))(x)


@mistake("my_copy_to_group", "forward sends nothing")
def sums_forward(x, group=None):
    return function(lambda x: summed(x, group), lambda g: g)(x)


@mistake("my_copy_to_group", "the gradient that came in was changed")
def sums_in_place(x, group=None):
    def backward(g):
        dist.all_reduce(g, group=group)
        return g

    return function(lambda x: x.view_as(x), backward)(x)


@mistake("my_copy_to_group", "autograd does not know where the result comes from")
def cut_off(x, group=None):
    return x.detach().clone()


@mistake("my_copy_to_group", "give the result a hook of its own, not x")
def hook_on_x(x, group=None):
    if x.requires_grad:
        x.register_hook(lambda g: summed(g, group))
    return x.view_as(x)


@mistake("my_copy_to_group", "the group argument is ignored")
def everybody(x, group=None):
    return function(lambda x: x.view_as(x), summed)(x)


@mistake("my_copy_to_group", "where x needs no gradient")
def hook_on_data(x, group=None):
    y = x.view_as(x)
    y.register_hook(lambda g: summed(g, group))
    return y


@mistake("my_copy_to_group", "the course's own")
def the_courses_own_f(x, group=None):
    return copy_to_group(x, group)


@mistake("my_copy_to_group", "where the gradient is one number for all elements")
def contiguous_gradients_only(x, group=None):
    def backward(g):
        total = g.clone() if g.stride() == torch.empty(g.shape).stride() else g.clone().mul_(torch.tensor(0.5))
        dist.all_reduce(total, group=group)
        return total

    def backward_of_strided(g):
        return summed(g, group) if 0 not in g.stride() else backward(g)

    return function(lambda x: x.view_as(x), backward_of_strided)(x)


@mistake("my_copy_to_group", "backward calls all_gather")
def gathers_the_gradients(x, group=None):
    def backward(g):
        g = g.contiguous()
        parts = [torch.empty_like(g) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, g, group=group)
        return sum(parts)

    return function(lambda x: x.view_as(x), backward)(x)


@mistake("my_copy_to_group", "backward's async_op=True was never waited for")
def does_not_wait(x, group=None):
    def backward(g):
        total = g.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group, async_op=True)
        return total

    return function(lambda x: x.view_as(x), backward)(x)


@mistake("my_copy_to_group", "autograd does not come back to x")
def begins_anew(x, group=None):
    return function(lambda x: x.view_as(x), lambda g: summed(g, group))(x.detach().requires_grad_())


@right("my_copy_to_group")
def hook_on_the_result(x, group=None):
    y = x.view_as(x)
    if y.requires_grad:
        y.register_hook(lambda g: summed(g, group))
    return y


# ---- my_gather_from_group -------------------------------------------------------------------------------------


def gathered(x, group=None):
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    return parts


@mistake("my_gather_from_group", "autograd does not know where the result comes from")
def no_backward(x, group=None):
    return torch.cat(gathered(x, group), -1)


@mistake("my_gather_from_group", "adding 4 equal ones counts it 4 times")
def sums_slices(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1),
                    lambda g: summed(g, group).tensor_split(n, -1)[rank])(x)  # fmt: skip


@mistake("my_gather_from_group", "4 times too large")
def torchs_own_backward(x, group=None):
    return torch.cat(with_backward.all_gather(x, group or dist.group.WORLD), -1)


@mistake("my_gather_from_group", "the parts lie one under the other")
def under_each_other(x, group=None):
    parts = gathered(x, group)
    parts[dist.get_rank(group)] = x
    return torch.cat(parts)


@mistake("my_gather_from_group", "every rank gets rank 0's slice")
def slice_of_rank_0(x, group=None):
    _, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g.tensor_split(n, -1)[0])(x)


@mistake("my_gather_from_group", "x stands where rank 0's part belongs")
def in_the_first_place(x, group=None):
    parts = gathered(x, group)
    parts[0] = x
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "a rank's own part comes first")
def own_part_first(x, group=None):
    rank, parts = dist.get_rank(group), gathered(x, group)
    return torch.cat([x, *parts[:rank], *parts[rank + 1 :]], -1)


@mistake("my_gather_from_group", "a rank's slice goes on as it is")
def divides(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g.tensor_split(n, -1)[rank] / n)(x)


@mistake("my_gather_from_group", "which adds the parts up")
def adds(x, group=None):
    return function(lambda x: summed(x, group), lambda g: g)(x)


@mistake("my_gather_from_group", "the group argument is ignored")
def of_all(x, group=None):
    parts = gathered(x)
    parts[dist.get_rank()] = x
    return torch.cat(parts, -1)


@mistake("my_gather_from_group", "but backward calls all_reduce")
def an_average_of_equals(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1),
                    lambda g: (summed(g, group) / n).tensor_split(n, -1)[rank])(x)  # fmt: skip


@mistake("my_gather_from_group", "the gradient that came in was changed")
def scales_in_place(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1),
                    lambda g: g.mul_(n).div_(n).add_(0.5).tensor_split(n, -1)[rank] - 0.5)(x)  # fmt: skip


@right("my_gather_from_group")
def with_a_function(x, group=None):
    rank, n = place(group)
    return function(lambda x: torch.cat(gathered(x, group), -1), lambda g: g.tensor_split(n, -1)[rank])(x)


# ---- order_bytes ----------------------------------------------------------------------------------------------


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
