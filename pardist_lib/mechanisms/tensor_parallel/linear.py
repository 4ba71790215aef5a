"""Linear layers of which each rank has a part, and the pair of them that makes an MLP (Megatron's tensor parallelism).

    column    weight (out/n, in): a part of the output features;  input whole, output in parts
    row       weight (out, in/n): a part of the input features;   input in parts, output whole

Column, then anything that is done element by element, then row: nothing has to be sent between the two. n: ranks of
the group; S: bytes of a layer's whole input or output. Features are cut as torch.tensor_split cuts, so n need not
divide them. What a rank sends is said at each layer; overlapped.py has the arithmetic and the messages.

Source: Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism"
(2019), section 3; sequence parallelism: Korthikanti et al. (2022), section 4.2.2.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import nn

from ..collectives.autograd import gather_from_group, gathered, scatter_to_group
from ..group import rank_and_size, split_sizes
from .checks import briefly, check_group, check_input, check_mlp, check_plain
from .on_part import OnPart
from .overlapped import column_linear, row_linear
from .splitting import SplitModule, first_ranks_copy, first_ranks_part, parameter

# Between a column- and a row-parallel layer a rank sees only its own features: what is done there has to be done
# element by element. No softmax, no LayerNorm, nothing with a parameter that all ranks share.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish, nn.Tanh, nn.Sigmoid,
    nn.Identity,
)  # fmt: skip


class ColumnParallelLinear(SplitModule):
    """A linear layer with a part of the output features on each rank.

    Weights start as rank 0's nn.Linear(in_features, out_features) would: every rank draws that whole layer and gets
    its part of the first rank's, so a run can be compared with one process, whatever the seeds.

    gather_output      put the outputs together again on every rank (one all-gather more)
    input_is_copied    the caller has called `copy_to_group`, once for several layers of the same input (Q, K, V), or
                       `all_gather_from_group` under sequence parallelism: this layer sends nothing
    sequence_parallel  each rank comes with a part of the input along sequence_dim, gathered here; keep_gathered=False
                       keeps only the part for backward, as Megatron does, and gathers again there
    chunks             pieces of the tokens in which backward sends while it computes; not with sequence_parallel

    Sends forward nothing, backward one all-reduce of S (none where the input needs no gradient); with
    sequence_parallel an all-gather forward and a reduce-scatter backward instead, (n − 1)/n·S each (with
    keep_gathered=False one more, backward).

    Raises ValueError where the input does not fit or is not floating point, and on a rank outside the group.
    """

    split_dim = 0  # of the weight; the bias goes the same way

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        group=None,
        gather_output=False,
        input_is_copied=False,
        sequence_parallel=False,
        sequence_dim=-2,
        keep_gathered=True,
        chunks=1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_group(group, type(self).__name__)
        self.rank, self.n = rank_and_size(group)
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.gather_output, self.input_is_copied, self.chunks = gather_output, input_is_copied, chunks
        self.sequence_dim, self.keep_gathered = sequence_dim if sequence_parallel else None, keep_gathered
        self._split(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))

    def forward(self, x, sizes=None):
        """x: (…, in), the same on every rank; under sequence parallelism this rank's part, and in `sizes` the lengths
        of all parts where they differ. Returns (…, own out), or (…, out) with gather_output."""
        check_input(self, x, self.in_features)
        if self.input_is_copied:
            y = F.linear(x, self.weight, self.bias)
        else:
            how = {"chunks": self.chunks, "sequence_dim": self.sequence_dim, "keep_gathered": self.keep_gathered}
            y = column_linear(x, self.weight, self.bias, self.group, sizes=sizes, **how)
        if self.gather_output:
            y = gather_from_group(y, -1, self.group, split_sizes(self.out_features, self.n))
        return y

    @classmethod
    def from_module(cls, module, group=None, **options):
        """Split the weights of the group's first rank's nn.Linear, exactly; dtype, device, requires_grad stay."""
        return _from_linear(cls, module, group, options)

    def to_module(self):
        """The whole nn.Linear, exactly, on every rank: one all-gather for each parameter that is split."""
        return _to_linear(self)

    def _split(self, linear):
        self.weight = parameter(first_ranks_part(linear.weight, 0, self.group), linear.weight)
        bias = linear.bias
        self.bias = None if bias is None else parameter(first_ranks_part(bias, 0, self.group), bias)

    def extra_repr(self):
        return _described(self) + (", gather_output=True" if self.gather_output else "")


class RowParallelLinear(SplitModule):
    """A linear layer with a part of the input features on each rank; the bias, whole on every rank, is added once.

    Weights start as in `ColumnParallelLinear`.

    input_is_parallel  the input is this rank's part already, as a column-parallel layer leaves it; else it is whole
                       and cut here (backward then sends one all-gather)
    sequence_parallel  each rank keeps only its part of the output along sequence_dim
    chunks             pieces of the tokens in which forward sends while it computes; not with sequence_parallel

    Sends forward one all-reduce of S, backward nothing; with sequence_parallel a reduce-scatter forward and an
    all-gather backward instead, (n − 1)/n·S each.

    Raises ValueError where the input does not fit or is not floating point, and on a rank outside the group.
    """

    split_dim = 1  # of the weight; the bias is not split

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        *,
        group=None,
        input_is_parallel=True,
        sequence_parallel=False,
        sequence_dim=-2,
        chunks=1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_group(group, type(self).__name__)
        self.rank, self.n = rank_and_size(group)
        self.in_features, self.out_features, self.group = in_features, out_features, group
        self.input_is_parallel, self.chunks = input_is_parallel, chunks
        self.sequence_dim = sequence_dim if sequence_parallel else None
        self._split(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))

    def forward(self, x):
        """x: (…, own in), or (…, in) where the input is not parallel. Returns (…, out), or this rank's part of it
        along the sequence."""
        own = split_sizes(self.in_features, self.n)[self.rank]
        check_input(self, x, own if self.input_is_parallel else self.in_features)
        if not self.input_is_parallel:
            x = scatter_to_group(x, -1, self.group)
        return row_linear(x, self.weight, self.bias, self.group, chunks=self.chunks, sequence_dim=self.sequence_dim)

    @classmethod
    def from_module(cls, module, group=None, **options):
        """Split the weights of the group's first rank's nn.Linear, exactly; dtype, device, requires_grad stay."""
        return _from_linear(cls, module, group, options)

    def to_module(self):
        """The whole nn.Linear, exactly, on every rank: one all-gather for the weight."""
        return _to_linear(self)

    def _split(self, linear):
        self.weight = parameter(first_ranks_part(linear.weight, 1, self.group), linear.weight)
        bias = linear.bias
        self.bias = None if bias is None else parameter(first_ranks_copy(bias, self.group), bias)

    def extra_repr(self):
        return _described(self) + ("" if self.input_is_parallel else ", input_is_parallel=False")


class ParallelMLP(nn.Sequential):
    """Column-parallel, activation, row-parallel: in → hidden → out with hidden/n features on each rank.

    Named as nn.Sequential(nn.Linear, activation, nn.Linear) names its parts: "0", "1", "2".
    activation: a module that works element by element (default nn.GELU()); where from_module finds an nn.Dropout, each
    rank drops features of its own (`OnPart`). out_features: in_features by default.
    Sends forward one all-reduce of the output, backward one of the input; with sequence_parallel an all-gather and a
    reduce-scatter each way, as many bytes.

    Raises ValueError where the activation is not one of ELEMENTWISE: a rank sees only its own features there.
    """

    def __init__(
        self, in_features, hidden_features, out_features=None, bias=True, *, activation=None, group=None, **options
    ):
        activation = _elementwise(nn.GELU() if activation is None else activation, group)
        first, last = _sides(options)
        super().__init__(
            ColumnParallelLinear(in_features, hidden_features, bias, group=group, **first),
            activation,
            RowParallelLinear(hidden_features, out_features or in_features, bias, group=group, **last),
        )

    def forward(self, x, sizes=None):
        """x: (…, in), the same on every rank; `sizes` as in `ColumnParallelLinear`. Returns (…, out)."""
        x = self[0](x, sizes)
        for part in list(self)[1:]:
            x = part(x)
        return x

    @classmethod
    def from_module(cls, module, group=None, **options):
        """Split an nn.Sequential(nn.Linear, element by element …, nn.Linear) of the group's first rank, exactly."""
        check_group(group, "ParallelMLP")
        check_mlp(module)
        parts = dict(module._modules)
        up, *between, down = parts  # their names
        first, last = _sides(options)
        parts[up] = ColumnParallelLinear.from_module(parts[up], group, **first)
        for name in between:
            parts[name] = _elementwise(parts[name], group)
        parts[down] = RowParallelLinear.from_module(parts[down], group, **last)
        mlp = cls.__new__(cls)
        nn.Sequential.__init__(mlp, OrderedDict(parts))  # under the names that its state dict has
        return mlp.train(module.training)

    def to_module(self):
        """The whole nn.Sequential, exactly, on every rank."""
        parts = {name: p.to_module() if hasattr(p, "to_module") else p for name, p in self._modules.items()}
        return nn.Sequential(OrderedDict(parts)).train(self.training)


def _sides(options):
    """Options of a ParallelMLP for its first and its last layer."""
    return options, {name: value for name, value in options.items() if name != "keep_gathered"}


def _elementwise(module, group):
    """The module, ready to stand between two split layers. Raises ValueError where it cannot."""
    if isinstance(module, nn.Dropout):
        return OnPart(module, group)
    if not isinstance(module, ELEMENTWISE):
        raise ValueError(
            f"between two split layers a rank sees only its own features, so {briefly(module)} cannot stand there: it "
            f"has to work element by element ({', '.join(kind.__name__ for kind in ELEMENTWISE)}, Dropout)"
        )
    return module


# ---- parts of a module ----------------------------------------------------------------------------------------


def _from_linear(cls, module, group, options):
    check_plain(module, [nn.Linear], cls.__name__)
    sizes = module.in_features, module.out_features, module.bias is not None
    layer = cls(*sizes, group=group, device="meta", **options)
    layer._split(module)
    return layer.train(module.training)


def _to_linear(layer):
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    features = (layer.out_features, layer.in_features)[layer.split_dim]
    sizes = split_sizes(features, layer.n)
    for name, mine in layer.named_parameters():
        cut = layer.cut_of(name)
        whole = mine.detach().clone() if cut is None else gathered(mine.detach(), cut, sizes, layer.group)
        setattr(linear, name, parameter(whole, mine))
    return linear.train(layer.training)


def _described(layer):
    part = f"{split_sizes((layer.out_features, layer.in_features)[layer.split_dim], layer.n)[layer.rank]}"
    of = ("out_features", "in_features")[layer.split_dim]
    text = f"{layer.in_features}, {layer.out_features}, bias={layer.bias is not None}, {part} of the {of}"
    return text + (", sequence_parallel=True" if layer.sequence_dim is not None else "")
