"""State dicts of what is sharded: whole ones, that fit one process and a world of any size, and each rank's own."""

import copy

import torch

from ..collectives.direct import direct_all_gather
from ..group import rank_and_size


def gather_local_shard(tensor, local_shard, group=None):
    """The whole of what `tensor` is this rank's local_shard of: a parameter's values, or a momentum of them."""
    return direct_all_gather(tensor.detach(), local_shard.sizes, group=group).view(local_shard.full_shape)


def cut_local_shard(whole, local_shard):
    """This rank's part of a whole tensor."""
    return whole.detach().flatten()[local_shard.start : local_shard.start + local_shard.numel()]


_SCALARS = {"step", "mu_product", "eta", "mu"}  # state that is one number a parameter, even where that is one number


def _of_elements(name, value, local_shard):
    """Whether this part of an optimizer's state has one number for each element of the parameter."""
    return name not in _SCALARS and hasattr(local_shard, "full_shape") and isinstance(value, torch.Tensor)


def full_optimizer_state(optimizer, group=None):
    """What `state_dict` of the same optimizer would give in one process that has all parameters whole. On every rank;
    sends its local_shard of each state tensor to every other rank."""
    state = optimizer.state_dict()
    for i, local_shard in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for name, value in state["state"].get(i, {}).items():
            if _of_elements(name, value, local_shard) and value.dim():
                state["state"][i] = {**state["state"][i], name: gather_local_shard(value, local_shard, group)}
    return state


def load_full_optimizer_state(optimizer, state):
    """The other way round: a one-process optimizer's `state_dict`, each rank taking its local_shards. Sends nothing."""
    if "rank" in state:
        raise ValueError(
            "this state dict is one rank's shard: load_state_dict takes it; save full_state_dict() for here"
        )
    local_shards = [p for g in optimizer.param_groups for p in g["params"]]
    cut = {i: dict(values) for i, values in state["state"].items()}
    if cut and max(cut) >= len(local_shards):
        raise ValueError(f"this state has parameter {max(cut)}, and the optimizer has {len(local_shards)} parameters")
    for i, values in cut.items():
        shape = getattr(local_shards[i], "full_shape", None)
        for name, value in values.items():
            if _of_elements(name, value, local_shards[i]) and (value.dim() or not len(shape)):
                if value.shape != shape:
                    raise ValueError(
                        f"{name} of parameter {i} has shape {list(value.shape)}, and the parameter {list(shape)}"
                    )
                values[name] = cut_local_shard(value, local_shards[i]).clone()
    optimizer.load_state_dict({**state, "state": cut})


def check_origin(state, group=None):
    """Raise ValueError where a sharded state dict was another rank's, or made in a world of another size."""
    rank, n = rank_and_size(group)
    if "rank" not in state:
        raise ValueError("this state dict is whole, not one rank's shard: load_full_state_dict takes it")
    if (state["rank"], state["world_size"]) != (rank, n):
        raise ValueError(
            f"this state dict is the shard of rank {state['rank']} of {state['world_size']}, here is rank "
            f"{rank} of {n}: save full_state_dict() to load it into a world of another size"
        )


def cut_state(state, ours):
    """A plain module's state dict, of which this rank takes its local_shards. ValueError where it does not fit `ours`."""
    if ours.keys() != state.keys():
        raise ValueError(f"these names are in one state dict only: {sorted(ours.keys() ^ state.keys())}")
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            shape = getattr(value, "full_shape", value.shape)
            if state[name].shape != shape:
                raise ValueError(f"{name} has shape {list(state[name].shape)}, here it is {list(shape)}")
    return {k: cut_local_shard(state[k], v) if hasattr(v, "full_shape") else state[k] for k, v in ours.items()}


def copied(value):
    """An entry of a state dict; what a module's get_extra_state gives need not be a tensor."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
