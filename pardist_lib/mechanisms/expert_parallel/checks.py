"""What this room refuses, in words that say where and what would fit."""

import math

import torch
import torch.distributed as dist

from ..collectives.agreement import compare, described, named_tensors
from ..group import rank_and_size

SCORE_FUNCTIONS = ("softmax", "sigmoid")


def here():
    """Where there are ranks: which one says this."""
    return f"rank {dist.get_rank()}: " if dist.is_initialized() else ""


# ---- a layer in one process -----------------------------------------------------------------------------------


def check_sizes(least=1, **sizes):
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is a whole number from {least} on, not {value!r}")


def _check_number(name, value, least):
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not value > least:
        raise ValueError(f"{name} is a number above {least}, not {value!r}")


def check_router(hidden, experts, top_k, score_function, scaling_factor, bias_update_rate):
    check_sizes(hidden=hidden, experts=experts, top_k=top_k)
    if top_k > experts:
        raise ValueError(f"top_k {top_k}: a token cannot visit more than the {experts} experts that there are")
    if score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function is one of {', '.join(map(repr, SCORE_FUNCTIONS))}, not {score_function!r}")
    _check_number("scaling_factor", scaling_factor, 0)
    if bias_update_rate is not None:
        _check_number("bias_update_rate", bias_update_rate, 0)


def check_capacity(factor):
    if factor is not None:
        try:
            _check_number("capacity_factor", factor, 0)
        except ValueError as error:
            raise ValueError(f"{error}: with 1 an expert takes its even share, with None whatever comes") from None


def check_input(layer, x):
    """Raises ValueError unless x has the layer's width, and the weights' dtype or autocast to cast it."""
    weight = layer.router.weight
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise ValueError(f"{here()}tokens are a tensor of floating point, not {getattr(x, 'dtype', type(x).__name__)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{here()}the tokens are {x.dtype}, the weights {weight.dtype}: x.to({weight.dtype}) fits")
    if x.dim() == 0 or x.size(-1) != layer.hidden:
        raise ValueError(f"{here()}tokens have {layer.hidden} features in their last dimension, not {list(x.shape)}")


def check_senders(senders, tokens):
    """The list of them, or None. Raises ValueError unless it shares out all tokens."""
    if senders is None:
        return None
    senders = list(senders)
    if not senders or any(not isinstance(s, int) or s < 0 for s in senders) or sum(senders) != tokens:
        raise ValueError(f"{here()}senders {senders} do not share out {tokens} tokens: how many does each rank send?")
    return senders


def check_loss(probabilities, chosen):
    shapes = f"probabilities {list(probabilities.shape)}, chosen {list(chosen.shape)}"
    if probabilities.dim() != 2 or chosen.dim() != 2 or len(probabilities) != len(chosen) or not chosen.size(1):
        raise ValueError(f"{here()}{shapes}: (tokens, experts) and (tokens, k) are asked for, as in a layer's routing")
    if not probabilities.is_floating_point() or chosen.dtype != torch.int64:
        found = f"{probabilities.dtype} and {chosen.dtype}"
        raise ValueError(f"{here()}probabilities are floating point, chosen int64 (numbers of experts), not {found}")
    if chosen.numel() and not 0 <= chosen.min() <= chosen.max() < probabilities.size(1):
        raise ValueError(f"{here()}chosen has expert {int(chosen.max())}, or one below 0, of {probabilities.size(1)}")


# ---- over ranks -----------------------------------------------------------------------------------------------


def check_group(group, what="group"):
    """Raises ValueError for what is no process group, or none of this rank's."""
    if not (group is None or isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
        raise ValueError(f"{here()}{what} is a {type(group).__name__}, but has to be a process group, or None for all")
    rank_and_size(group)


def check_moe(moe, group):
    """Raises ValueError unless it has all parts of an MoE, and an expert for each rank."""
    parts = "router", "experts", "shared", "capacity_factor"
    if hasattr(moe, "to_module") or not all(hasattr(moe, part) for part in parts):
        raise ValueError(f"{here()}ExpertParallel deals out the experts of an MoE, not of a {type(moe).__name__}")
    n = rank_and_size(group)[1]
    if n > len(moe.experts):
        raise ValueError(
            f"{here()}{len(moe.experts)} experts are too few for {n} ranks, some of which would compute nothing: make "
            f"groups of at most {len(moe.experts)} ranks, and average over them (average_gradients)"
        )


def same_everywhere(moe, group):
    """Raises ValueError, on every rank, where the ranks' modules differ in more than their values."""
    router = {name: value for name, value in vars(moe.router).items() if isinstance(value, (int, float, str))}
    settings = f"{ {**router, 'training': moe.training, 'capacity_factor': moe.capacity_factor} }"
    everyone = [None] * rank_and_size(group)[1]
    dist.all_gather_object(everyone, [settings, *described(named_tensors(moe))], group=group)
    compare(everyone, group)


def check_replicas(layers, group, replicas):
    """The number of data-parallel ranks. Raises ValueError unless each expert is on as many of them as `replicas`."""
    check_group(group)
    check_group(replicas, "replicas")
    n = rank_and_size(group)[1]
    copies = 1 if replicas is None else rank_and_size(replicas)[1]
    for layer in layers:
        if layer.n * copies != n:
            raise ValueError(
                f"{here()}experts over {layer.n} ranks, and {copies} with the same ones, make {layer.n * copies} "
                f"data-parallel ranks, but the group has {n}: replicas is the group of ranks that have the same experts"
            )
    return n


def check_clip(model, norm_type):
    if not float(norm_type) > 0:
        raise ValueError(f"norm_type is a number above 0, or inf, not {norm_type}")
    for name, module in model.named_modules():
        if hasattr(module, "to_module") and not hasattr(module, "owned"):
            raise ValueError(
                f"{name or 'the model'} is split by tensor parallelism: its gradients need a sum of their own"
            )
