"""A convolution layer whose work is split over ranks: `ParallelConv2d`, made from torch's Conv2d and turned back.

split="out" is for convolutions what ColumnParallelLinear is for linear layers, and split="in" what RowParallelLinear
is: out then in, with something elementwise between, needs one all-reduce forward and one backward. split="height"
cuts the images: where these are large and the filters few, only the halo travels.
"""

import torch
import torch.distributed as dist
from torch import nn

from .autograd_collectives import gathered, scatter_to_group
from .point_to_point import place, split_sizes
from .split_conv import conv2d_by_height, conv2d_by_input_channels, conv2d_by_output_channels

CUT = {"out": 0, "in": 1, "height": None}  # the dimension of weight that is cut


class ParallelConv2d(nn.Module):
    """torch's Conv2d on the ranks of a group; n ranks, S bytes of the whole input, R of the whole result.

    split      x                             returns                       sends forward     backward
    "out"      (b, in, h, w) on every rank   this rank's output channels   –                 all-reduce of S
    "in"       this rank's input channels    (b, out, …) on every rank     all-reduce of R   –
    "height"   this rank's rows              this rank's rows              the halo          the halo, and an
                                                                                             all-reduce of weight, bias

    gather_output: with "out" and "height", return the whole result on every rank, (n − 1)/n·R more forward.
    input_is_parallel=False: with "in", x is whole on every rank and cut here; backward sends (n − 1)/n·S.
    Channels are cut as torch.tensor_split cuts. `forward(x, heights)`: every rank's rows of x, where they differ.

    Made directly, all ranks should have the same seed: each keeps its part of the weights that torch's Conv2d gets
    from it. What every rank has whole (the bias with "in", all with "height") is taken from the group's first rank.
    Raises ValueError for an unknown split, more ranks than channels, groups or a padding_mode of other than zeros.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, bias=True, *, split="out",
        group=None, gather_output=False, input_is_parallel=True, device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias, device=device, dtype=dtype
        )
        self._take(conv, split, group, gather_output, input_is_parallel)
        whole = [self.weight] if split == "height" else []
        whole += [self.bias] if bias and split != "out" else []
        for parameter in whole if place(group)[1] > 1 else []:
            dist.broadcast(parameter.data, group=group, group_src=0)

    @classmethod
    def from_module(cls, conv, group=None, split="out", *, gather_output=False, input_is_parallel=True):
        """This rank's part of a torch.nn.Conv2d that has the same weights on every rank. Sends nothing.

        Raises TypeError for another module, ValueError for what cannot be split so.
        """
        if not isinstance(conv, nn.Conv2d):
            again = ": it is split already, to_module() makes an ordinary one of it" if isinstance(conv, cls) else ""
            raise TypeError(f"ParallelConv2d.from_module takes a torch.nn.Conv2d, not a {type(conv).__name__}{again}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(conv, split, group, gather_output, input_is_parallel)
        return layer

    def _take(self, conv, split, group, gather_output, input_is_parallel):
        rank, n = place(group)
        if split not in CUT:
            raise ValueError(f"ParallelConv2d: split is one of {', '.join(map(repr, CUT))}, not {split!r}")
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise ValueError(
                f"ParallelConv2d splits convolutions with groups=1 and padding_mode='zeros', not {conv}: its groups "
                "can be given to ranks whole, as convolutions of their own"
            )
        self.cut, channels = CUT[split], {"out": conv.out_channels, "in": conv.in_channels}.get(split, n)
        if channels < n:
            raise ValueError(
                f"ParallelConv2d: {channels} {split}put channels of {conv} cannot be split over {n} ranks: at most "
                f"{channels} ranks, or split='height'"
            )
        self.split, self.group, self.gather_output, self.input_is_parallel = (
            split, group, gather_output, input_is_parallel,
        )  # fmt: skip
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.sizes = None if self.cut is None else split_sizes(channels, n)  # every rank's channels
        self.weight = _part(conv.weight, self.cut, rank, n)
        self.register_parameter("bias", conv.bias if conv.bias is None else _part(conv.bias, self._bias_cut, rank, n))
        self.train(conv.training)

    @property
    def _bias_cut(self):
        return 0 if self.split == "out" else None

    def forward(self, x, heights=None):
        how = self.weight, self.bias, self.stride, self.padding, self.dilation, self.group
        if self.split == "height":
            return conv2d_by_height(x, *how, heights=heights, gather=self.gather_output)
        whole = self.split == "out" or not self.input_is_parallel
        needed = self.in_channels if whole else self.weight.shape[1]
        if x.dim() != 4 or x.shape[1] != needed:
            raise ValueError(f"{self}: x needs {needed} channels here, (batch, {needed}, …), not {tuple(x.shape)}")
        if self.split == "out":
            return conv2d_by_output_channels(x, *how, gather=self.gather_output, sizes=self.sizes)
        x = x if self.input_is_parallel else scatter_to_group(x, 1, self.group)
        return conv2d_by_input_channels(x, *how)

    def to_module(self):
        """An ordinary torch.nn.Conv2d with the whole weights, on every rank; every rank of the group calls it.

        Sends (n − 1)/n of weight's bytes, with "out" also of bias's; nothing with "height".
        """
        how = self.stride, self.padding, self.dilation
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, *how, bias=self.bias is not None,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        for name, cut in (("weight", self.cut), ("bias", self._bias_cut)):
            part, whole = getattr(self, name), getattr(conv, name)
            if part is not None:
                value = part.detach() if cut is None else gathered(part.detach(), cut, self.sizes, self.group)
                whole.data.copy_(value)
                whole.requires_grad_(part.requires_grad)
        return conv.train(self.training)

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"split={self.split!r}, weight here {tuple(self.weight.shape)}"
        )


def _part(parameter, dim, rank, n):
    """This rank's part of a parameter along `dim`, all of it where that is None; a parameter of its own."""
    value = parameter.detach()
    value = value if dim is None else value.tensor_split(n, dim)[rank]
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format), parameter.requires_grad)
