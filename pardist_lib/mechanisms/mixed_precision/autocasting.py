"""Each operation in the precision that suits it, weights staying float32."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints

from .checks import check_precision


class autocast(TorchFunctionMode):
    """`with autocast(torch.float16): loss = model(x)`: every operation in the precision that suits it.

    The arguments of matrix products and convolutions (LOW below) are cast to `dtype`, those of losses, exponents and
    long sums (FULL) to float32; everything else computes in what it is given. The casts are differentiable, so
    parameters and their gradients stay float32. A parameter is cast once and used again until the block ends.
    float64 is left alone. Leave the block before backward; what torch.utils.checkpoint computes again enters it anew.

    The lists follow torch.autocast's for a GPU; on a CPU torch keeps softmax, norms and sums in 16 bits. torch's
    dispatcher sees every operation, this class only calls by their Python names: what a ready-made function such as
    multi_head_attention_forward calls inside computes in what it was given. nn.LSTM and nn.GRU want float32.

    Sends nothing. Raises ValueError as `check_precision`.
    """

    def __init__(self, dtype=torch.bfloat16, device="cpu"):
        super().__init__()
        check_precision(dtype, device)
        self.dtype, self._casts, self._open = dtype, {}, []

    def __enter__(self):
        self._open.append(entered_again(self))
        self._open[-1].__enter__()
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in LOW:
            args, kwargs = self._cast((args, kwargs), self.dtype)
        elif name in FULL:
            args, kwargs = self._cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)

    def __exit__(self, *error):
        self._casts.clear()
        self._open.pop().__exit__(None, None, None)
        return super().__exit__(*error)

    def _cast(self, value, dtype):
        if isinstance(value, torch.Tensor):
            others = {torch.float32, torch.float16, torch.bfloat16} - {dtype}
            return self._casted(value, dtype) if value.dtype in others else value
        if isinstance(value, dict):
            return {key: self._cast(part, dtype) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._cast(part, dtype) for part in value)
        return value

    def _casted(self, tensor, dtype):
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        key = id(tensor), dtype, torch.is_grad_enabled()  # what was cast under no_grad has no way back
        if key not in self._casts:
            self._casts[key] = tensor, tensor.to(dtype)  # the tensor too, so that its id stays its own
        return self._casts[key][1]


# What gains from 16 bits: sums of products, which the hardware adds up in 32 …
LOW = frozenset(
    "linear bilinear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv addbmm baddbmm chain_matmul einsum conv1d "
    "conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc scaled_dot_product_attention "
    "multi_head_attention_forward addr linalg_multi_dot linalg_vecdot prelu lstm_cell gru_cell rnn_tanh_cell "
    "rnn_relu_cell".split()
)
# … and what loses: exponents, powers, long sums, losses.
FULL = frozenset(
    "exp expm1 log log10 log1p log2 pow __pow__ __rpow__ rsqrt reciprocal sinh cosh tan acos asin erfinv sum prod "
    "cumsum cumprod norm linalg_vector_norm linalg_matrix_norm dist cdist pdist renorm logsumexp softmax "
    "log_softmax softmin softplus layer_norm group_norm rms_norm cosine_similarity multi_margin_loss "
    "multilabel_margin_loss soft_margin_loss cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss "
    "kl_div binary_cross_entropy_with_logits poisson_nll_loss cosine_embedding_loss margin_ranking_loss "
    "hinge_embedding_loss triplet_margin_loss".split()
)


@contextmanager
def entered_again(block):
    """Until this is left, what is checkpointed will enter `block` when backward computes it again.

    torch.utils.checkpoint calls a function in forward and once more in backward, when the block has long been left. It
    carries torch.autocast's state over, but nobody else's: the two functions that it goes through are replaced.
    """
    opened = [True]

    def inside(function):
        def again(*args, **kwargs):
            if opened:
                return function(*args, **kwargs)  # in forward: the block is open
            with block:
                return function(*args, **kwargs)

        return again

    name = "_checkpoint_without_reentrant_generator"
    name += "_impl" * hasattr(checkpoints, f"{name}_impl")  # so from torch 2.14 on
    reentrant, other = checkpoints.CheckpointFunction.apply, getattr(checkpoints, name)
    with patch.multiple(
        checkpoints,
        CheckpointFunction=SimpleNamespace(apply=lambda function, *args: reentrant(inside(function), *args)),
        **{name: lambda function, *args, **kw: other(inside(function), *args, **kw)},
    ):
        try:
            yield
        finally:
            opened.clear()
