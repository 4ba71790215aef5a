"""Wrong answers to sharded_linear, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable

from tests.lessons.lesson07.shared import whole
from tests.lessons.planted import mistake, right


def scattered(gradient, shard):
    out = torch.empty_like(shard)
    dist.reduce_scatter(out, list(gradient.flatten().chunk(dist.get_world_size())))
    return out


@mistake("sharded_linear", "the output has no graph")
def no_function(x, shard, out_features):
    return x.detach() @ whole(shard.detach(), out_features).T


@mistake("sharded_linear", "are kept from forward to backward besides x, shard and output")
def saves_the_weight(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            weight = whole(shard, out_features)
            ctx.save_for_backward(x, shard, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            x, shard, weight = ctx.saved_tensors
            return gradient @ weight, scattered(gradient.T @ x, shard) / dist.get_world_size()

    return Linear.apply(x, shard)


@mistake("sharded_linear", "are kept from forward to backward besides x, shard and output")
def keeps_it_in_ctx(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.x, ctx.weight = x, whole(shard, out_features)
            return x @ ctx.weight.T

        @staticmethod
        def backward(ctx, gradient):
            mean = scattered(gradient.T @ ctx.x, shard) / dist.get_world_size()
            return gradient @ ctx.weight, mean

    return Linear.apply(x, shard)


@mistake("sharded_linear", "the sum was not divided by 4: shard.grad is the mean over the ranks")
def sums(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            return gradient @ whole(shard, out_features), scattered(gradient.T @ x, shard)

    return Linear.apply(x, shard)


@mistake("sharded_linear", "nothing was reduced: shard.grad is cut from this rank's own gradient")
def own_part(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            own = (gradient.T @ x).flatten().chunk(dist.get_world_size())[dist.get_rank()]
            return gradient @ whole(shard, out_features), own

    return Linear.apply(x, shard)


@mistake("sharded_linear", "it calls all_reduce, which brings the whole gradient to every rank")
def reduces_all(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            n, total = dist.get_world_size(), gradient.T @ x
            dist.all_reduce(total)
            return gradient @ whole(shard, out_features), total.flatten().chunk(n)[dist.get_rank()] / n

    return Linear.apply(x, shard)


@mistake("sharded_linear", "the weight is (out_features, in_features): here it was read as (in, out)")
def reads_it_transposed(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, x.shape[1])

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            mean = scattered(x.T @ gradient, shard) / dist.get_world_size()
            return gradient @ whole(shard, x.shape[1]).T, mean

    return Linear.apply(x, shard)


@mistake("sharded_linear", "x has the mean of the ranks' gradients: its rows are this rank's own")
def averages_x_too(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            n, own = dist.get_world_size(), gradient @ whole(shard, out_features)
            dist.all_reduce(own)
            return own / n, scattered(gradient.T @ x, shard) / n

    return Linear.apply(x, shard)


@mistake("sharded_linear", "shard has no gradient: return it from backward, in the place of shard")
def only_x(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ whole(*ctx.saved_tensors, out_features), None

    return Linear.apply(x, shard)


@mistake("sharded_linear", "its backward calls scatter, as that of torch.distributed.nn's all_gather does")
def leaves_it_to_autograd(x, shard, out_features):
    weight = torch.cat(differentiable.all_gather(shard)).view(out_features, -1) / 1
    n = dist.get_world_size()
    return x @ (weight / n + (weight - weight / n).detach()).T


def linear_that(keep, weight_of, unchanged=True):
    """A sharded linear layer that keeps `keep(weight)`, and in backward computes with `weight_of` what it kept."""

    def layer(x, shard, out_features):
        class Linear(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, shard):
                weight = whole(shard, out_features)
                ctx.save_for_backward(x, shard)
                ctx.kept = keep(weight)
                return x @ weight.T

            @staticmethod
            def backward(ctx, gradient):
                x, shard = ctx.saved_tensors
                gathered, n = whole(shard, out_features), dist.get_world_size()
                weight = gathered if ctx.kept is None else weight_of(ctx.kept).view(out_features, -1)
                of_x = gradient @ weight
                gradient = gradient.div_(n) if not unchanged else gradient / n
                return of_x, scattered(gradient.T @ x, shard)

        return Linear.apply(x, shard)

    return layer


@mistake("sharded_linear", "are kept from forward to backward besides x, shard and output")
def keeps_the_pieces(x, shard, out_features):
    keep = linear_that(lambda weight: [piece.clone() for piece in weight.flatten().chunk(4)], torch.cat)
    return keep(x, shard, out_features)


@mistake("sharded_linear", "backward computes with a weight, or parts of it, kept from forward")
def keeps_it_in_numpy(x, shard, out_features):
    return linear_that(lambda weight: weight.numpy().copy(), torch.from_numpy)(x, shard, out_features)


@mistake("sharded_linear", "backward computes with a weight, or parts of it, kept from forward")
def keeps_a_list(x, shard, out_features):
    as_tensor = lambda numbers: torch.tensor(numbers, dtype=x.dtype)  # noqa: E731
    return linear_that(lambda weight: weight.flatten().tolist(), as_tensor)(x, shard, out_features)


@mistake("sharded_linear", "the gradient that backward is given was changed")
def divides_what_it_is_given(x, shard, out_features):
    return linear_that(lambda weight: None, None, unchanged=False)(x, shard, out_features)


@mistake("sharded_linear", "backward computes with a weight, or parts of it, kept from forward")
def keeps_the_others_shards(x, shard, out_features):
    def keep(weight):
        ours = weight.flatten().chunk(dist.get_world_size())
        return [None if r == dist.get_rank() else piece.clone() for r, piece in enumerate(ours)]

    def again(pieces):
        return torch.cat([shard.detach() if piece is None else piece for piece in pieces])

    return linear_that(keep, again)(x, shard, out_features)


@mistake("sharded_linear", "`x` was changed: others may use it too, work on a copy")
def divides_x(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            x.data /= dist.get_world_size()
            return gradient @ whole(shard, out_features), scattered(gradient.T @ x, shard)

    return Linear.apply(x, shard)


@right("sharded_linear")
def with_a_checkpoint(x, shard, out_features):
    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, shard):
            return whole(shard, out_features)

        @staticmethod
        def backward(ctx, gradient):
            n = dist.get_world_size()
            return scattered(gradient / n, gradient.flatten().chunk(n)[0])

    def layer(x, shard):
        return x @ Gather.apply(shard).T

    return torch.utils.checkpoint.checkpoint(layer, x, shard, use_reentrant=False)


@right("sharded_linear")
def frees_the_memory(x, shard, out_features):
    line = shard.new_empty(dist.get_world_size() * shard.numel())

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            dist.all_gather_into_tensor(line, shard)
            y = x @ line.view(out_features, -1).T
            ctx.save_for_backward(x, shard, line)
            line.untyped_storage().resize_(0)
            return y

        @staticmethod
        def backward(ctx, gradient):
            x, shard, line = ctx.saved_tensors
            line.untyped_storage().resize_(line.nbytes)
            dist.all_gather_into_tensor(line, shard)
            of_x = gradient @ line.view(out_features, -1)
            line.untyped_storage().resize_(0)
            return of_x, scattered(gradient.T @ x, shard) / dist.get_world_size()

    return Linear.apply(x, shard)


@right("sharded_linear")
def saves_copies(x, shard, out_features):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.x, ctx.shard = x.detach().clone(), shard.detach().clone()
            return x @ whole(shard, out_features).T

        @staticmethod
        def backward(ctx, gradient):
            mean = scattered(gradient.T @ ctx.x, ctx.shard) / dist.get_world_size()
            return gradient @ whole(ctx.shard, out_features), mean

    return Linear.apply(x, shard)


@right("sharded_linear")
def with_single_calls(x, shard, out_features):
    n = dist.get_world_size()

    def gather(shard):
        weight = shard.new_empty(n * shard.numel())
        dist.all_gather_into_tensor(weight, shard.detach())
        return weight.view(out_features, x.shape[1])

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, shard):
            ctx.save_for_backward(x, shard)
            return torch.nn.functional.linear(x, gather(shard))

        @staticmethod
        def backward(ctx, gradient):
            x, shard = ctx.saved_tensors
            mine = torch.empty_like(shard)
            dist.reduce_scatter_tensor(mine, (gradient.T @ x / n).flatten())
            return gradient.mm(gather(shard)), mine

    return Linear.apply(x, shard)


def linear_with(backward, forward=lambda x, shard, out: x @ whole(shard, out).T):
    """A sharded linear layer with this backward(gradient, x, shard, out_features)."""

    def layer(x, shard, out_features):
        class Linear(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, shard):
                ctx.save_for_backward(x, shard)
                return forward(x, shard, out_features)

            @staticmethod
            def backward(ctx, gradient):
                return backward(gradient, *ctx.saved_tensors, out_features)

        return Linear.apply(x, shard)

    return layer


def mean_of(gradient, x, shard):
    return scattered(gradient.T @ x, shard) / dist.get_world_size()


@mistake("sharded_linear", "x has no gradient: return it from backward, in the place of x")
def only_the_shard(x, shard, out_features):
    return linear_with(lambda g, x, s, out: (None, mean_of(g, x, s)))(x, shard, out_features)


@mistake("sharded_linear", "x's gradient is divided by 4")
def x_divided_too(x, shard, out_features):
    return linear_with(lambda g, x, s, out: (g @ whole(s, out) / dist.get_world_size(), mean_of(g, x, s)))(
        x, shard, out_features
    )


@mistake("sharded_linear", "divided by the 3 rows")
def divides_by_rows(x, shard, out_features):
    return linear_with(lambda g, x, s, out: (g @ whole(s, out), mean_of(g, x, s) / len(x)))(x, shard, out_features)


@mistake("sharded_linear", "shard.grad is counted twice")
def sets_it_and_returns_it(x, shard, out_features):
    def backward(g, x, s, out):
        mean = mean_of(g, x, s)
        shard.grad = mean.clone()
        return g @ whole(s, out), mean

    return linear_with(backward)(x, shard, out_features)


@mistake("sharded_linear", "one layer works, two do not (is something kept outside of ctx?)")
def in_a_global_variable(x, shard, out_features):
    def forward(x, shard, out):
        last["x"] = x
        return x @ whole(shard, out).T

    def backward(g, x, s, out):
        return g @ whole(s, out), mean_of(g, last.pop("x"), s)

    return linear_with(backward, forward)(x, shard, out_features)


last = {}


@mistake("sharded_linear", "bytes leave a rank where 288 are enough")
def gathers_all_gradients(x, shard, out_features):
    def backward(g, x, s, out):
        own, n = (g.T @ x).flatten(), dist.get_world_size()
        everyone = [torch.empty_like(own) for _ in range(n)]
        dist.all_gather(everyone, own)
        return g @ whole(s, out), sum(everyone).chunk(n)[dist.get_rank()] / n

    return linear_with(backward)(x, shard, out_features)


@right("sharded_linear")
def the_functional_way(x, shard, out_features):
    def weight_of(s):
        return functional.all_gather_tensor(s.detach(), 0, dist.group.WORLD).view(out_features, -1)

    def backward(g, x, s, out):
        mean = functional.reduce_scatter_tensor((g.T @ x).flatten(), "avg", 0, dist.group.WORLD)
        return g @ weight_of(s), mean

    return linear_with(backward, lambda x, s, out: x @ weight_of(s).T)(x, shard, out_features)


@right("sharded_linear")
def overlaps_its_gathering(x, shard, out_features):
    def backward(g, x, s, out):
        mean = torch.empty_like(s)
        work = dist.reduce_scatter_tensor(mean, (g.T @ x).flatten(), dist.ReduceOp.AVG, async_op=True)
        of_x = g @ whole(s, out)
        work.wait()
        return of_x, mean

    return linear_with(backward)(x, shard, out_features)
