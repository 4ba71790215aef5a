"""What the split layers of this folder refuse, in words that say what would fit: here, so that they read straight."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..group import rank_and_size, split_sizes


def check_group(group, who):
    """Raises ValueError, naming `who`, for what is no process group, or none of this rank's."""
    if not (group is None or isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
        advice = ": its get_group() gives one" if hasattr(group, "get_group") else ", or None for all ranks"
        raise ValueError(f"{who}: group is a {type(group).__name__}, but has to be a process group{advice}")
    try:
        rank_and_size(group)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def check_plain(module, kinds, who):
    """Raises ValueError, naming `who`, unless module is of one of torch's `kinds` and does just what these do: what
    takes its place would know nothing of a forward of its own, of hooks or of parametrizations."""
    if hasattr(module, "to_module"):
        raise ValueError(f"{briefly(module)} is split already: its to_module() gives the whole one back")
    kind = next((kind for kind in kinds if isinstance(module, kind)), None)
    if kind is None:
        names = " and ".join(f"{'nn.' * (k.__module__.startswith('torch.nn'))}{k.__name__}" for k in kinds)
        raise ValueError(f"{who} splits {names}, not {briefly(module)}")
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    for lost, what in [
        (type(module).forward is not kind.forward or "forward" in vars(module), "a forward of its own"),
        (is_parametrized(module), "a parametrization"),
        (any(hooks), "hooks (a lazy module has them until it was called once)"),
    ]:
        if lost:
            raise ValueError(f"{briefly(module)} has {what}, which would be lost: {who} splits a plain {kind.__name__}")


def check_mlp(module):
    """Raises ValueError unless module is an nn.Sequential that begins and ends with an nn.Linear."""
    kinds = [type(part) for part in module._modules.values()] if type(module) is nn.Sequential else []
    if len(kinds) < 2 or not (kinds[0] is kinds[-1] is nn.Linear):
        raise ValueError(f"ParallelMLP splits nn.Sequential(nn.Linear, activation, nn.Linear), not {briefly(module)}")


def check_input(layer, x, width):
    """Raises ValueError where x is not floating point, has another dtype than the weights, or not `width` features."""
    if not x.is_floating_point():
        raise ValueError(f"{briefly(layer)} needs floating point, not {x.dtype} of shape {list(x.shape)}: x.float()?")
    if x.dtype != layer.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        ours = layer.weight.dtype
        raise ValueError(f"{briefly(layer)}: the input is {x.dtype}, the weights are {ours}: x.to({ours}) fits")
    if x.dim() == 0 or x.size(-1) != width:
        why = ""
        if width != layer.in_features and x.dim() and x.size(-1) == layer.in_features:
            why = "; that is the whole input, which input_is_parallel=False would cut"
        elif x.dim() and x.size(-1) == split_sizes(layer.in_features, layer.n)[layer.rank]:
            why = "; that is a part of it, as a column-parallel layer leaves it without gather_output=True"
        raise ValueError(
            f"{briefly(layer)}, rank {layer.rank} of {layer.n}: the input's last dimension has to be {width}, "
            f"its shape is {list(x.shape)}{why}"
        )


def check_heads(heads, kv_heads, n, width):
    """Raises ValueError where n ranks cannot have equally many whole heads, with what would fit. width: embed_dim."""
    if heads % n == kv_heads % n == 0:
        return
    many, what = (heads, "heads") if heads % n else (kv_heads, "key-value heads")
    ranks = [str(k) for k in range(1, kv_heads + 1) if heads % k == kv_heads % k == 0]
    whole = heads if what != "heads" else width if heads == kv_heads else 0  # has to be a multiple of their number
    fit = [m for m in range(n, whole + 1, n) if whole % m == 0]
    near = [*[m for m in fit if m < many][-1:], *[m for m in fit if m > many][:1]]
    raise ValueError(
        f"ParallelAttention: {many} {what} cannot be split over {n} ranks, for a head stays whole: "
        f"{' or '.join(ranks)} ranks would fit" + f", or {' or '.join(map(str, near))} {what}" * bool(near)
    )


def check_self_attention(layer, query, key, value, attn_mask, is_causal):
    """Raises ValueError where an nn.MultiheadAttention's arguments ask for more than self-attention."""
    if any(other is not None and other is not query for other in (key, value)):
        raise ValueError(f"{briefly(layer)} does self-attention: query, key and value must be the same tensor")
    if is_causal and attn_mask is None:
        raise ValueError(f"{briefly(layer)}: is_causal=True only says what attn_mask is: give the mask, too")


def check_convolution(conv, split, splits, n):
    """Raises ValueError for an unknown split, for what does not split, and for more ranks than channels."""
    if split not in splits:
        raise ValueError(f"ParallelConv2d: split is one of {', '.join(map(repr, splits))}, not {split!r}")
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise ValueError(
            f"ParallelConv2d splits convolutions with groups=1 and padding_mode='zeros', not {conv}: its groups "
            "can be given to ranks whole, as convolutions of their own"
        )
    channels = {"out": conv.out_channels, "in": conv.in_channels}.get(split, n)
    if channels < n:
        raise ValueError(
            f"ParallelConv2d: {channels} {split}put channels of {conv} cannot be split over {n} ranks: at most "
            f"{channels} ranks, or split='height'"
        )


def check_words(words, vocabulary, what):
    """Raises IndexError for a word that nobody owns: every rank would add nothing, and nobody would notice."""
    if words.numel():
        least, greatest = (int(word) for word in words.aminmax())
        if least < 0 or greatest >= vocabulary:
            wrong = least if least < 0 else greatest
            raise IndexError(f"{what} {wrong} is outside the vocabulary of {vocabulary} words, 0 to {vocabulary - 1}")


def check_targets(logits, target, reduction, label_smoothing):
    """Raises TypeError or ValueError for arguments that vocab_parallel_cross_entropy cannot mean."""
    if not logits.is_floating_point():
        raise TypeError(f"logits are floating point, not {logits.dtype}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"targets are whole numbers (words), not {target.dtype}: probabilities are not supported")
    if logits.dim() == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits of shape {list(logits.shape)} need targets of shape {list(logits.shape[:-1])}, not "
            f"{list(target.shape)}: the vocabulary is the last dimension"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is between 0 and 1, not {label_smoothing}")


def briefly(module):
    """A module in one line, for messages."""
    text = repr(module).split("\n")[0]
    return text if text.endswith(")") else f"{type(module).__name__}(…)"
