"""A convolution layer whose work is split over ranks: `ParallelConv2d`, made from torch's Conv2d and turned back.

split="out" is for convolutions what ColumnParallelLinear is for linear layers, and split="in" what RowParallelLinear
is: out then in, with something elementwise between, needs one all-reduce forward and one backward. split="height"
cuts the images: where these are large and the filters few, only the halo travels.
"""

from torch import nn

from ..collectives.autograd import gathered, scatter_to_group
from ..group import rank_and_size, split_sizes
from .checks import check_convolution, check_group, check_plain
from .split_conv import conv2d_by_height, conv2d_by_input_channels, conv2d_by_output_channels
from .splitting import SplitModule, first_ranks_copy, first_ranks_part, parameter

CUT = {"out": 0, "in": 1, "height": None}  # the dimension of weight that is cut


class ParallelConv2d(SplitModule):
    """torch's Conv2d on the ranks of a group; n ranks, S bytes of the whole input, R of the whole result.

    split      x                             returns                       sends forward     backward
    "out"      (b, in, h, w) on every rank   this rank's output channels   –                 all-reduce of S
    "in"       this rank's input channels    (b, out, …) on every rank     all-reduce of R   –
    "height"   this rank's rows              this rank's rows              the halo          the halo, and an
                                                                                             all-reduce of weight, bias

    gather_output: with "out" and "height", return the whole result on every rank, (n − 1)/n·R more forward.
    input_is_parallel=False: with "in", x is whole on every rank and cut here; backward sends (n − 1)/n·S.
    Channels are cut as torch.tensor_split cuts. `forward(x, heights)`: every rank's rows of x, where they differ.

    Weights start as those of the group's first rank's nn.Conv2d would.
    Raises ValueError for an unknown split, more ranks than channels, groups or a padding_mode of other than zeros.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        bias=True,
        *,
        split="out",
        group=None,
        gather_output=False,
        input_is_parallel=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        sizes = in_channels, out_channels, kernel_size, stride, padding, dilation
        conv = nn.Conv2d(*sizes, bias=bias, device=device, dtype=dtype)
        self._split(conv, split, group, gather_output, input_is_parallel)

    @classmethod
    def from_module(cls, conv, group=None, split="out", *, gather_output=False, input_is_parallel=True):
        """This rank's part of the group's first rank's nn.Conv2d, exactly. Raises ValueError for any other module,
        and for what cannot be split so."""
        check_plain(conv, [nn.Conv2d], cls.__name__)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._split(conv, split, group, gather_output, input_is_parallel)
        return layer

    def _split(self, conv, split, group, gather_output, input_is_parallel):
        check_group(group, type(self).__name__)
        _, n = rank_and_size(group)
        check_convolution(conv, split, CUT, n)
        self.split, self.split_dim, self.group = split, CUT[split], group
        self.gather_output, self.input_is_parallel = gather_output, input_is_parallel
        self.in_channels, self.out_channels, self.kernel_size = conv.in_channels, conv.out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        dim = self.split_dim
        self.sizes = None if dim is None else split_sizes(conv.weight.shape[dim], n)  # every rank's channels
        for name in ("weight", "bias"):
            cut, whole = self.cut_of(name), getattr(conv, name)
            part = whole
            if whole is not None:
                mine = first_ranks_copy(whole, group) if cut is None else first_ranks_part(whole, cut, group)
                part = parameter(mine, whole)
            self.register_parameter(name, part)
        self.train(conv.training)

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
        sizes = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation
        conv = nn.Conv2d(*sizes, bias=self.bias is not None, device="meta")
        for name, part in self.named_parameters():
            cut, mine = self.cut_of(name), part.detach()
            whole = mine.clone() if cut is None else gathered(mine, cut, self.sizes, self.group)
            setattr(conv, name, parameter(whole, part))
        return conv.train(self.training)

    def extra_repr(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"split={self.split!r}, weight here {tuple(self.weight.shape)}"
        )
