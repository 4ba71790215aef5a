"""State dicts of what is sharded: whole ones, that fit one process and a world of any size, and each rank's own."""

import copy

import torch

from ..collectives.direct import direct_all_gather
from ..collectives.parts import has_part, load_parts, save_parts
from ..group import rank_and_size


class StateDicts:
    """The part of ShardedDataParallel that saves and loads."""

    def _tell_parts(self):
        """Let clipping and state dicts know that these are parts."""
        clip, save = (f"{name} of this ShardedDataParallel" for name in ("clip_grad_norm_", "full_state_dict()"))
        for local in self.module.parameters():
            has_part(local, self, clip, place_of(local), save)
        for module in self.module.modules():
            module.register_state_dict_post_hook(lambda m, state, prefix, _: save_parts(m, state, prefix))
            module.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: load_parts(m, state, prefix))

    def sharded_state_dict(self):
        """This rank's shards, and the buffers, by the module's own names. Sends nothing."""
        rank, n = rank_and_size(self.group)
        return {"rank": rank, "world_size": n, "state": {k: copied(v) for k, v in self.module.state_dict().items()}}

    def load_sharded_state_dict(self, state_dict):
        """What `sharded_state_dict` gave on this rank, in a world of this size; else ValueError."""
        check_origin(state_dict, self.group)
        self.module.load_state_dict(state_dict["state"])

    @torch.no_grad()
    def full_state_dict(self):
        """The plain module's state dict, whole, on every rank, one unit after the other; buffers are this rank's. Every
        rank has to call it. Sends (n − 1)/n·S, at stage 2 only where the parameters have changed since they were
        gathered, or are gathered in another dtype."""
        self._reset()
        self._let_go()  # of what no_reshard has kept, and an optimizer may have changed
        whole = {}
        for unit in self._units:
            cast = any(flat.is_cast for flat in unit.flat_parameters)
            if not cast and (self.stage == 3 or self._stale):
                unit.gather()
                unit.wait()
            for flat in unit.flat_parameters:
                exact = direct_all_gather(flat.shard, flat.sizes, group=self.group) if cast else flat.unsharded
                for local, part in zip(flat.local_shards, exact.split(flat.lengths), strict=True):
                    whole[id(local)] = part.view(local.full_shape).clone()
            unit.reshard()
        state = self.module.state_dict(keep_vars=True)
        return {k: whole[id(v)] if id(v) in whole else copied(v) for k, v in state.items()}

    @torch.no_grad()
    def load_full_state_dict(self, state_dict):
        """A plain module's state dict, each rank taking its shards. Sends nothing. ValueError where it does not fit."""
        self.module.load_state_dict(cut_state(state_dict, self.module.state_dict(keep_vars=True)))

    def full_optimizer_state_dict(self, optimizer):
        """The state of an optimizer of these shards, whole, as one process would save it. On every rank.
        `optimizer.state_dict` is this rank's only, and fits no other rank."""
        return full_optimizer_state(optimizer, self.group)

    def load_full_optimizer_state_dict(self, optimizer, state_dict):
        """One process's optimizer state, or `full_optimizer_state_dict` of a world of any size. Sends nothing."""
        load_full_optimizer_state(optimizer, state_dict)


class OptimizerStateDicts:
    """The part of ShardedOptimizer that saves and loads, and keeps its settings (lr, …) and its optimizer's alike."""

    def _tell_parts(self, bucket):
        """Let clipping and state dicts know what are parts."""
        clip, save = (f"{name} of this ShardedOptimizer" for name in ("clip_grad_norm_", "full_state_dict()"))
        if rank_and_size(self.group)[1] > 1:
            for p, local in zip(bucket.parameters, bucket.local_shards, strict=True):
                has_part(local, self, clip, place_of(local), save)
                if self.reduces:
                    has_part(p, self, clip)  # each rank has its own gradient

    def state_dict(self):
        """This rank's shard of the state, with the rank and the world it belongs to. Sends nothing."""
        rank, n = rank_and_size(self.group)
        self._give_settings()
        return {"rank": rank, "world_size": n, **self.inner.state_dict()}

    def load_state_dict(self, state_dict):
        """What `state_dict` gave on this rank, in a world of this size; else ValueError."""
        check_origin(state_dict, self.group)
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k not in ("rank", "world_size")})
        self._take_settings()

    def full_state_dict(self):
        """The whole state on every rank, as a plain `optimizer_class` would save it. Every rank has to call it."""
        self._give_settings()
        return full_optimizer_state(self.inner, self.group)

    def load_full_state_dict(self, state_dict):
        """A plain optimizer's state dict, or `full_state_dict` of a world of any size. Sends nothing."""
        load_full_optimizer_state(self.inner, state_dict)
        self._take_settings()

    def _take_settings(self):
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({k: v for k, v in inner.items() if k != "params"})

    def _give_settings(self):
        for ours, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({k: v for k, v in ours.items() if k != "params"})


def gather_local_shard(tensor, local, group=None):
    """The whole of what `tensor` is this rank's part of: a parameter's values, or a momentum of them. local: the
    parameter's local shard."""
    mine = tensor.detach().as_subclass(torch.Tensor)
    return direct_all_gather(mine, local.sizes, group=group).view(local.full_shape)


def place_of(local):
    """Which part of its parameter a local shard is."""
    return tuple(local.full_shape), local.start, local.numel()


def cut_local_shard(whole, local):
    """This rank's part of a whole tensor."""
    return whole.detach().flatten()[local.start : local.start + local.numel()]


_SCALARS = {"step", "mu_product", "eta", "mu"}  # state that is one number a parameter, even where that is one number


def _of_elements(name, value, local):
    """Whether this part of an optimizer's state has one number for each element of the parameter."""
    return name not in _SCALARS and hasattr(local, "full_shape") and isinstance(value, torch.Tensor)


def full_optimizer_state(optimizer, group=None):
    """What `state_dict` of the same optimizer would give in one process that has all parameters whole. On every rank;
    sends its part of each state tensor to every other rank."""
    state = optimizer.state_dict()
    for i, local in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for name, value in state["state"].get(i, {}).items():
            if _of_elements(name, value, local) and value.dim():
                state["state"][i] = {**state["state"][i], name: gather_local_shard(value, local, group)}
    return state


def load_full_optimizer_state(optimizer, state):
    """The other way round: a one-process optimizer's `state_dict`, each rank taking its shards. Sends nothing."""
    if "rank" in state:
        raise ValueError(
            "this state dict is one rank's shard: load_state_dict takes it; save full_state_dict() for here"
        )
    shards = [p for g in optimizer.param_groups for p in g["params"]]
    cut = {i: dict(values) for i, values in state["state"].items()}
    if cut and max(cut) >= len(shards):
        raise ValueError(f"this state has parameter {max(cut)}, and the optimizer has {len(shards)} parameters")
    for i, values in cut.items():
        shape = getattr(shards[i], "full_shape", None)
        for name, value in values.items():
            if _of_elements(name, value, shards[i]) and (value.dim() or not len(shape)):
                if value.shape != shape:
                    raise ValueError(
                        f"{name} of parameter {i} has shape {list(value.shape)}, and the parameter {list(shape)}"
                    )
                values[name] = cut_local_shard(value, shards[i]).clone()
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
    """A plain module's state dict, of which this rank takes its shards. ValueError where it does not fit `ours`."""
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
