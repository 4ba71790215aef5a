"""Wrong answers to broadcast_model, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
from torch.distributed.utils import _sync_module_states

from tests.lessons.planted import mistake, right


@mistake("broadcast_model", "the buffers are left out: the running statistics of a BatchNorm are state, too")
def parameters_only(model, group=None):
    for p in model.parameters():
        dist.broadcast(p.data, group=group, group_src=0)


@mistake("broadcast_model", "frozen.weight is left out")
def trainable_ones_only(model, group=None):
    for t in [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]:
        dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "norm.num_batches_tracked is a buffer and left out")
def fractions_only(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        if t.is_floating_point():
            dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "mask is a buffer that state_dict() leaves out")
def by_state_dict(model, group=None):
    for t in model.state_dict().values():
        dist.broadcast(t, group=group, group_src=0)


@mistake("broadcast_model", "src counts all ranks, and the first one of ranks 1, 3 is not rank 0")
def always_from_rank_0(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), 0, group=group)


@mistake("broadcast_model", "it calls all_reduce: a mean of random starts")
def starts_from_the_mean(model, group=None):
    for p in model.parameters():
        dist.all_reduce(p.data, group=group)
        p.data /= dist.get_world_size(group)


@mistake("broadcast_model", "the values arrived in a copy")
def into_copies(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach().clone(), group=group, group_src=0)


@mistake("broadcast_model", "fc.weight is another tensor than before")
def new_parameters(model, group=None):
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            t = p.detach().clone()
            dist.broadcast(t, group=group, group_src=0)
            setattr(module, name, torch.nn.Parameter(t))


@mistake("broadcast_model", "nothing was sent")
def seeds_alike(model, group=None):
    torch.manual_seed(0)


@mistake("broadcast_model", "every rank has what rank 3 had: the group's first, rank 0, is asked for")
def from_the_last(model, group=None):
    last = dist.get_world_size(group) - 1
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), group=group, group_src=last)


@mistake("broadcast_model", "tensors are sent more than once")
def twice_over(model, group=None):
    for _ in range(2):
        for t in [*model.parameters(), *model.buffers()]:
            dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "pickles")
def the_state_as_an_object(model, group=None):
    state = [model.state_dict()]
    dist.broadcast_object_list(state, dist.get_global_rank(group, 0) if group else 0, group=group)
    model.load_state_dict(state[0])


@right("broadcast_model")
def by_global_rank(model, group=None):
    first = dist.get_global_rank(group, 0) if group is not None else 0
    with torch.no_grad():
        works = [dist.broadcast(t, first, group=group, async_op=True) for t in [*model.buffers(), *model.parameters()]]
        for work in works:
            work.wait()


@right("broadcast_model")
def state_dict_and_the_rest(model, group=None):
    state = model.state_dict()
    for t in state.values():
        dist.broadcast(t, group=group, group_src=0)
    for name, t in model.named_buffers():
        if name not in state:
            dist.broadcast(t, group=group, group_src=0)


@mistake("broadcast_model", "broadcast goes over all ranks: `group` is missing from it")
def over_the_world(model, group=None):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), 0)


def broadcast_all(model, group):
    for t in [*model.parameters(), *model.buffers()]:
        dist.broadcast(t.detach(), group=group, group_src=0)


@mistake("broadcast_model", "tied.weight is another tensor than before")
def unties(model, group=None):
    broadcast_all(model, group)
    model.tied.weight = torch.nn.Parameter(model.tied.weight.detach().clone())


@mistake("broadcast_model", "the values are right, but eval() was called")
def leaves_it_in_eval(model, group=None):
    broadcast_all(model.eval(), group)


@mistake("broadcast_model", "the values are right, but parameters have gradients now")
def makes_gradients(model, group=None):
    broadcast_all(model, group)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


@mistake("broadcast_model", "the ranks do not make the same calls")
def in_an_order_of_its_own(model, group=None):
    for t in sorted([*model.parameters(), *model.buffers()], key=lambda t: t.flatten()[0].item()):
        dist.broadcast(t.detach(), group=group, group_src=0)


@right("broadcast_model")
def one_message_for_each_dtype(model, group=None):
    kinds = {}
    for t in [*model.parameters(), *model.buffers()]:
        kinds.setdefault(t.dtype, []).append(t.detach())
    for tensors in kinds.values():
        flat = torch.cat([t.flatten() for t in tensors])
        dist.broadcast(flat, group=group, group_src=0)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


@right("broadcast_model")
def coalesced_as_ddp_does(model, group=None):
    tensors = [t.detach() for t in [*model.parameters(), *model.buffers()]]
    dist._broadcast_coalesced(group or dist.group.WORLD, tensors, 250 * 2**20, 0)


@mistake("broadcast_model", "it calls torch's own sync_module_states")
def ddps_own(model, group=None):
    _sync_module_states(model, group or dist.group.WORLD, 250 * 2**20, 0, set(), True)


@mistake("broadcast_model", "whose values is everybody to have?")
def says_no_source(model, group=None):
    for p in model.parameters():
        dist.broadcast(p.data, group=group)


@mistake("broadcast_model", "give pairs, (name, tensor)")
def sends_pairs(model, group=None):
    for p in model.named_parameters():
        dist.broadcast(p.data, group=group, group_src=0)


@mistake("broadcast_model", "p.grad is None before the first backward")
def sends_gradients(model, group=None):
    for p in model.parameters():
        dist.broadcast(p.grad, group=group, group_src=0)


@mistake("broadcast_model", "a collective works in place and returns None")
def assigns_what_broadcast_returns(model, group=None):
    for p in model.parameters():
        p.data = dist.broadcast(p.data, group=group, group_src=0)
