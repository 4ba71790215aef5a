"""Wrong answers to top_k_step, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from tests.lessons.planted import mistake, right


def gathered(values, places, group):
    n = dist.get_world_size(group)
    all_values, all_places = ([torch.empty_like(t) for _ in range(n)] for t in (values, places))
    dist.all_gather(all_values, values, group=group)
    dist.all_gather(all_places, places, group=group)
    return zip(all_values, all_places, strict=True)


def step(gradient, residual, k, group, places=None, values=None, divide=True, add=True):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k).indices if places is None else places
    values = wanted[places] if values is None else values
    mean = torch.zeros_like(gradient)
    for some, where in gathered(values, places, group):
        mean[where] = mean[where] * add + some / (n if divide else 1)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "rest is always zero: what was not sent is forgotten")
def no_feedback(gradient, residual, k, group=None):
    mean, _ = step(gradient, residual, k, group)
    return mean, torch.zeros_like(residual)


@mistake("top_k_step", "chosen among gradient alone")
def chooses_by_the_gradient(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, places=gradient.abs().topk(k).indices)


@mistake("top_k_step", "the residual is not added before choosing")
def adds_the_residual_too_late(gradient, residual, k, group=None):
    mean, rest = step(gradient, torch.zeros_like(residual), k, group)
    return mean, rest + residual


@mistake("top_k_step", "gradient is sent where gradient + residual was chosen")
def sends_the_gradient(gradient, residual, k, group=None):
    places = (gradient + residual).abs().topk(k).indices
    return step(gradient, residual, k, group, places, gradient[places])


@mistake("top_k_step", "not the largest in absolute value: negative ones never travel")
def largest_with_sign(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, places=(gradient + residual).topk(k).indices)


@mistake("top_k_step", "the sign is lost")
def sends_absolute_values(gradient, residual, k, group=None):
    values, places = (gradient + residual).abs().topk(k)
    return step(gradient, residual, k, group, places, values)


@mistake("top_k_step", "the sum was not divided by 4")
def sums_up(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, divide=False)


@mistake("top_k_step", "only the last one counts: add, do not assign")
def assigns(gradient, residual, k, group=None):
    return step(gradient, residual, k, group, add=False)


@mistake("top_k_step", "rest still holds what was sent")
def keeps_it_all(gradient, residual, k, group=None):
    return step(gradient, residual, k, group)[0], gradient + residual


@mistake("top_k_step", "rest leaves the old residual out")
def forgets_the_old_rest(gradient, residual, k, group=None):
    mean, rest = step(gradient, residual, k, group)
    return mean, torch.where(rest != 0, gradient, 0)


@mistake("top_k_step", "rest subtracts the ranks' mean")
def subtracts_the_mean(gradient, residual, k, group=None):
    mean, _ = step(gradient, residual, k, group)
    return mean, gradient + residual - mean


@mistake("top_k_step", "it calls all_reduce, which sends all elements")
def sends_zeros_along(gradient, residual, k, group=None):
    wanted = gradient + residual
    places = wanted.abs().topk(k).indices
    mean = torch.zeros_like(wanted).index_copy(0, places, wanted[places])
    rest = wanted - mean
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group), rest


@mistake("top_k_step", "`residual` was changed")
def adds_in_place(gradient, residual, k, group=None):
    residual += gradient
    return step(residual, torch.zeros_like(residual), k, group)


@mistake("top_k_step", "every rank's values are put in this rank's own places")
def own_places(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places, mean = wanted.abs().topk(k).indices, torch.zeros_like(gradient)
    everyone = [torch.empty_like(wanted[places]) for _ in range(n)]
    dist.all_gather(everyone, wanted[places], group=group)
    for some in everyone:
        mean[places] += some / n
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "more travels than k elements and k places")
def gathers_everything_whole(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k).indices
    sent = torch.zeros_like(wanted).index_copy(0, places, wanted[places])
    everyone = [torch.empty_like(sent) for _ in range(n)]
    dist.all_gather(everyone, sent, group=group)
    return torch.stack(everyone).sum(0) / n, wanted - sent


def short(gradient, residual, k, group, kind):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places, mean = wanted.abs().topk(k).indices, torch.zeros_like(gradient)
    for some, where in gathered(wanted[places], places.to(kind), group):
        mean.index_put_((where.long(),), some / n, accumulate=True)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "the places go through 8 bits, too few for 4000")
def places_in_a_byte(gradient, residual, k, group=None):
    return short(gradient, residual, k, group, torch.uint8)


@mistake("top_k_step", "the places go through 16 bits, too few for 4000")
def places_in_half_precision(gradient, residual, k, group=None):
    return short(gradient, residual, k, group, torch.float16)


@mistake("top_k_step", "exactly 2 elements are sent, and rest keeps all others")
def rest_by_size(gradient, residual, k, group=None):
    wanted, (mean, _) = gradient + residual, step(gradient, residual, k, group)
    return mean, torch.where(wanted.abs() < wanted.abs().topk(k).values[-1], wanted, 0)


@mistake("top_k_step", "all_gather goes over all ranks: `group` is missing")
def gathers_from_all(gradient, residual, k, group=None):
    return step(gradient, residual, k, None)


@mistake("top_k_step", "it returns (rest, mean): mean comes first")
def the_other_way_round(gradient, residual, k, group=None):
    mean, rest = step(gradient, residual, k, group)
    return rest, mean


@right("top_k_step")
def short_places(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().argsort(descending=True)[:k].int()
    mean = torch.zeros_like(gradient)
    for some, where in gathered(wanted[places], places, group):
        mean.index_add_(0, where, some)
    rest = wanted.clone()
    rest[places] = 0
    return [mean / n, rest]


@right("top_k_step")
def one_message(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k).indices
    message = torch.stack([wanted[places], places.to(wanted.dtype)])
    everyone = [torch.empty_like(message) for _ in range(n)]
    dist.all_gather(everyone, message, group=group)
    mean = torch.zeros_like(gradient)
    for some, where in everyone:
        mean.index_put_((where.long(),), some.to(mean.dtype) / n, accumulate=True)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "k is not used: 2 elements of each rank are sent")
def always_two(gradient, residual, k, group=None):
    return step(gradient, residual, min(2, len(gradient)), group)


@mistake("top_k_step", "it takes 4 calls: one for the elements and one for their places are enough")
def one_message_for_each_element(gradient, residual, k, group=None):
    wanted, mean = gradient + residual, torch.zeros_like(gradient)
    places = wanted.abs().topk(k).indices
    for place in places.split(1):
        for some, where in gathered(wanted[place], place, group):
            mean[where] += some / dist.get_world_size(group)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "mean is of type sparse tensor")
def gives_a_sparse_one(gradient, residual, k, group=None):
    mean, rest = step(gradient, residual, k, group)
    return mean.to_sparse(), rest


@right("top_k_step")
def scatters(gradient, residual, k, group=None):
    wanted, n = gradient + residual, dist.get_world_size(group)
    places = wanted.abs().topk(k, sorted=False).indices
    values, everywhere = wanted.new_empty(n * k), places.new_empty(n * k)
    dist.all_gather_into_tensor(values, wanted[places], group=group)
    dist.all_gather_into_tensor(everywhere, places, group=group)
    return torch.zeros_like(wanted).scatter_add_(0, everywhere, values) / n, wanted.scatter(0, places, 0.0)


@right("top_k_step")
def functional_collectives(gradient, residual, k, group=None):
    wanted = gradient + residual
    places = wanted.abs().topk(k).indices
    chosen = [wanted[places], places]
    values, everywhere = functional.all_gather_into_tensor_coalesced(chosen, group or dist.group.WORLD)
    mean = torch.zeros_like(wanted).index_add_(0, everywhere, values) / dist.get_world_size(group)
    return mean, wanted.index_fill(0, places, 0)


@mistake("top_k_step", "the lists hold one tensor n times ([t] * n)")
def one_tensor_for_all(gradient, residual, k, group=None):
    n, wanted = dist.get_world_size(group), gradient + residual
    places = wanted.abs().topk(k).indices
    values, mean, rest = wanted[places], torch.zeros_like(wanted), wanted.clone()
    all_values, all_places = [torch.empty_like(values)] * n, [torch.empty_like(places)] * n
    dist.all_gather(all_values, values, group=group)
    dist.all_gather(all_places, places, group=group)
    for some, where in zip(all_values, all_places, strict=True):
        mean[where] += some / n
    rest[places] = 0
    return mean, rest


@mistake("top_k_step", "torch.empty_like(t) makes room in t's own type")
def room_for_floats(gradient, residual, k, group=None):
    places = (gradient + residual).abs().topk(k).indices
    dist.all_gather([torch.empty(k) for _ in range(dist.get_world_size(group))], places, group=group)


@mistake("top_k_step", "divided by k, 2, not by 4, the number of ranks")
def divides_by_k(gradient, residual, k, group=None):
    n, wanted = dist.get_world_size(group), gradient + residual
    places = wanted.abs().topk(k).indices
    values, mean, rest = wanted[places], torch.zeros_like(wanted), wanted.clone()
    all_values, all_places = ([torch.empty_like(t) for _ in range(n)] for t in (values, places))
    dist.all_gather(all_values, values, group=group)
    dist.all_gather(all_places, places, group=group)
    for some, where in zip(all_values, all_places, strict=True):
        mean[where] += some / k
    rest[places] = 0
    return mean, rest
