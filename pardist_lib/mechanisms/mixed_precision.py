"""Mixed precision: compute in 16 bits, remember in 32, and scale the loss so that small gradients survive.

                bits: sign, exponent, mantissa    smallest above 0     largest      1 + what is still another number
    float32     1, 8, 23                          1.4e-45              3.4e38       1.2e-7
    float16     1, 5, 10                          6.0e-8               65,504       9.8e-4
    bfloat16    1, 8, 7                           9.2e-41              3.4e38       7.8e-3

Four parts, each of use by itself. `autocast` picks the precision of each operation, weights staying float32.
`LossScaler` multiplies the loss and divides the gradients again, skips a step whose gradients overflowed, and has all
ranks agree on that. `average_gradients` reduces them in whatever precision. `MasterWeights` is for models that are
16 bits throughout. float16 needs the scaler; bfloat16, with float32's exponents, does not.

Sources: Micikevicius et al., "Mixed Precision Training" (2018), sections 3.1 to 3.3; Kalamkar et al., "A Study of
BFLOAT16 for Deep Learning Training" (2019). The scaler's rules are those of torch.amp.GradScaler.
"""

import math

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from .collectives.agreement import sum_over_ranks
from .collectives.parts import replaced
from .group import rank_and_size


class autocast(TorchFunctionMode):
    """`with autocast(torch.float16): loss = model(x)`: every operation in the precision that suits it.

    The arguments of matrix products and convolutions (LOW below) are cast to `dtype`, those of losses, exponents and
    long sums (FULL) to float32; everything else computes in what it is given. The casts are differentiable, so
    parameters and their gradients stay float32. A parameter is cast once and used again until the block ends.
    float64 is left alone. Leave the block before backward.

    The lists follow torch.autocast's for a GPU; on a CPU torch keeps softmax, norms and sums in 16 bits. torch's
    dispatcher sees every operation, this class only calls by their Python names: what a ready-made function such as
    multi_head_attention_forward calls inside computes in what it was given. nn.LSTM and nn.GRU want float32.

    Sends nothing. Raises ValueError as `check_precision`.
    """

    def __init__(self, dtype=torch.bfloat16, device="cpu"):
        super().__init__()
        check_precision(dtype, device)
        self.dtype, self._casts = dtype, {}

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


class LossScaler:
    """Scales the loss up before backward and the gradients down before the step, as torch.amp.GradScaler does.

        scaler = LossScaler()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)       # only where gradients are looked at or clipped before the step
        scaler.step(optimizer)           # skipped where a gradient is infinite or NaN, on all ranks or on none
        scaler.update()                  # × backoff_factor after a skip, × growth_factor after enough good steps

    agree=True: whether to skip is the maximum over `group`; all-reduces 4 bytes for each optimizer and step. It is
    needed wherever ranks look at different gradients: shards, or gradients that are not yet reduced. Without it one
    rank steps and another does not, and their models differ from then on. Where gradients were averaged by an
    all-reduce before, False is enough: one rank's infinity is then in everybody's mean.

    A scale that would grow beyond float32's range stays. Raises ValueError for numbers out of range and for gradients
    that are float16 themselves; RuntimeError where unscale_, step and update do not follow each other.
    """

    def __init__(
        self, init_scale=65536.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, *, group=None, agree=True
    ):
        _check_scaler(init_scale, growth_factor, backoff_factor, growth_interval)
        if agree:
            rank_and_size(group)
        self._scale, self._good_steps = _float32(init_scale), 0
        self.growth_factor, self.backoff_factor, self.growth_interval = growth_factor, backoff_factor, growth_interval
        self.group, self.agree = group, agree
        self._state = {}  # optimizer: ["unscaled" or "stepped", whether a gradient overflowed]

    def get_scale(self):
        return self._scale

    def scale(self, loss):
        """The loss times the scale; of a 16-bit loss as float32, where it has room."""
        if not loss.dtype.is_floating_point:
            raise ValueError(f"the loss is {loss.dtype}: it has to be a floating-point tensor")
        return (loss.float() if loss.element_size() == 2 else loss) * self._scale

    @torch.no_grad()
    def unscale_(self, optimizer):
        """Divide the optimizer's gradients by the scale, in place, and find out whether any rank's overflowed.

        Returns that. Once for each optimizer and step, after all micro-batches have been added up.
        """
        if optimizer in self._state:
            done = self._state[optimizer][0]
            raise RuntimeError(f"this optimizer's gradients are {done} already: once for each step, then update()")
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held if p.grad is not None]
        gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]  # FSDP2's: this rank's shards
        _check_unscaling(self._scale, gradients)
        device = held[0].device if held else "cpu"  # a rank may hold no parameters, and has to agree all the same
        overflow = torch.zeros((), device=device)
        for g in gradients:
            overflow.clamp_(min=(~(g._values() if g.is_sparse else g).isfinite().all()).to(device).float())
            g.mul_(1 / self._scale)
        if self.agree:
            dist.all_reduce(overflow, dist.ReduceOp.MAX, group=self.group)
        self._state[optimizer] = ["unscaled", bool(overflow.item())]
        return self._state[optimizer][1]

    def step(self, optimizer):
        """optimizer.step() with unscaled gradients, unless they overflowed somewhere. Returns whether it was made."""
        if optimizer not in self._state:
            self.unscale_(optimizer)
        state = self._state[optimizer]
        if state[0] == "stepped":
            raise RuntimeError("this optimizer has stepped already: call update() before the next one")
        state[0] = "stepped"
        if not state[1]:
            optimizer.step()
        return not state[1]

    def update(self):
        """Adjust the scale, once after the step of all optimizers."""
        if not self._state:
            raise RuntimeError("no gradients were looked at since the last update(): call step(optimizer) first")
        if any(overflowed for _, overflowed in self._state.values()):
            self._scale, self._good_steps = _float32(self._scale * self.backoff_factor), 0
        else:
            self._good_steps += 1
            if self._good_steps == self.growth_interval:
                grown = _float32(self._scale * self.growth_factor)
                self._scale, self._good_steps = grown if math.isfinite(grown) else self._scale, 0
        self._state.clear()

    def state_dict(self):
        """In the form of torch's GradScaler, which can load it."""
        names = ("growth_factor", "backoff_factor", "growth_interval")
        return {"scale": self._scale, "_growth_tracker": self._good_steps} | {n: getattr(self, n) for n in names}

    def load_state_dict(self, state):
        """Also takes torch's GradScaler's. Give all ranks the same, or their models will differ."""
        state = dict(state)
        good_steps = state.pop("_growth_tracker")
        new = LossScaler(state.pop("scale"), **state, group=self.group, agree=self.agree)
        self.__dict__.update(new.__dict__ | {"_good_steps": good_steps})


def _float32(number):
    """The nearest float32, as a Python number: the scale is kept as torch keeps it."""
    return torch.tensor(float(number), dtype=torch.float64).float().item()


@torch.no_grad()
def average_gradients(parameters, dtype=None, group=None):
    """Replace every gradient by its mean over the ranks; `dtype` is the precision in which they travel and add up.

    dtype None sends each gradient in its own. With float16 and bfloat16 all-reduces 2 bytes an element instead of 4;
    each gradient is divided by the number of ranks before it is cast, so that the sum cannot overflow where the mean
    does not. With a LossScaler, call this before `unscale_`: scaled gradients are those that float16 can hold.
    One all-reduce for each dtype and device of the gradients. Every rank needs gradients for the same parameters.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    means = sum_over_ranks(gradients, group, scale=1 / rank_and_size(group)[1], dtype=dtype)
    for g, mean in zip(gradients, means, strict=True):
        g.copy_(mean)


class MasterWeights:
    """A model of 16 bits throughout, and a float32 copy of its weights on which the optimizer steps.

        masters = MasterWeights(model, torch.bfloat16)
        optimizer = torch.optim.AdamW(masters.parameters())
        scaler.scale(loss).backward()              # gradients of 16 bits, in the model
        masters.take_gradients()                   # as float32, in the masters
        average_gradients(masters.parameters())
        scaler.step(optimizer), scaler.update()
        masters.give_back()                        # the model's weights: the masters, rounded

    Why: a step of SGD changes a weight by about a thousandth or less, which 16 bits round away: 1 + 0.0004 is 1 in
    float16. Bytes a parameter with AdamW: weight 2, gradient 2 in the model; 4, 4 and state 8 in the masters.

    The module is changed in place; frozen parameters and buffers become `dtype` too, shared parameters stay shared.
    Sends nothing. Raises ValueError as `check_precision`.
    """

    @torch.no_grad()
    def __init__(self, module, dtype=torch.bfloat16):
        check_precision(dtype, next((p.device for p in module.parameters()), "cpu"))
        self._pairs = [(p, torch.nn.Parameter(p.data.float().clone())) for p in module.parameters() if p.requires_grad]
        for p, master in self._pairs:
            replaced(p, master)
        module.to(dtype)

    def parameters(self):
        return [master for _, master in self._pairs]

    @torch.no_grad()
    def take_gradients(self):
        """Move the model's gradients to the masters, adding to what is there, and clear them."""
        for p, master in self._pairs:
            if p.grad is not None:
                master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def give_back(self):
        for p, master in self._pairs:
            p.copy_(master)


def check_precision(dtype, device="cpu"):
    """Raise ValueError where `dtype` is neither float16 nor bfloat16, or where the device cannot train with it."""
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"{dtype!r} is not a precision for this: torch.float16 or torch.bfloat16")
    if (device := torch.device(device)).type == "meta":
        return
    other = "bfloat16, which needs no loss scale" if dtype == torch.float16 else "float16 with a LossScaler"
    try:
        _try(dtype, device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0][:120]
        raise ValueError(f"{device} cannot compute in {dtype} ({why}): use {other}, or float32") from None


def _try(dtype, device):  # a layer, forward and backward
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.ones(8, 8, dtype=dtype, device=device, requires_grad=True)
        (torch.ones(8, 8, dtype=dtype, device=device) @ w).sum().backward()


def _check_scaler(init_scale, growth_factor, backoff_factor, growth_interval):
    if not (math.isfinite(init_scale) and 0 < _float32(init_scale) < math.inf):
        raise ValueError(f"init_scale is what the loss is multiplied by, above 0 and finite, not {init_scale}")
    if not 1 < growth_factor < math.inf:
        raise ValueError(f"growth_factor is above 1, or the scale would not grow, not {growth_factor}")
    if not 0 < backoff_factor < 1:
        raise ValueError(f"backoff_factor is between 0 and 1, or the scale would not fall, not {backoff_factor}")
    if not isinstance(growth_interval, int) or growth_interval < 1:
        raise ValueError(f"growth_interval is a number of good steps, 1 or more, not {growth_interval!r}")


def _check_unscaling(scale, gradients):
    if not scale:
        raise RuntimeError(
            "the scale has fallen to 0: the gradients were infinite or NaN at any scale, so it is not the precision"
        )
    if any(g.dtype == torch.float16 for g in gradients):
        raise ValueError(
            "these gradients are float16: unscaled there, the small ones would be lost after all. Keep float32 "
            "parameters under autocast, or wrap the model in MasterWeights and give the optimizer its parameters()"
        )
