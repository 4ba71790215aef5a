"""Gradients in few bits: a loss scale that finds itself, a mean over the ranks, float32 masters of 16-bit weights."""

import math

import torch
import torch.distributed as dist

from ..collectives.agreement import sum_over_ranks
from ..collectives.parts import replaced
from ..group import rank_and_size
from .checks import check_precision, check_scaler, check_unscaling, float32


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
        check_scaler(init_scale, growth_factor, backoff_factor, growth_interval)
        if agree:
            rank_and_size(group)
        self._scale, self._good_steps = float32(init_scale), 0
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
        check_unscaling(self._scale, gradients)
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
            self._scale, self._good_steps = float32(self._scale * self.backoff_factor), 0
        else:
            self._good_steps += 1
            if self._good_steps == self.growth_interval:
                grown = float32(self._scale * self.growth_factor)
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
    float16. Bytes a parameter with AdamW: weight 2 in the model; weight 4, gradient 4 and state 8 in the masters, 18 in
    all. The model's own gradient, 2 more, is there from backward to `take_gradients`: 20, where several micro-batches
    are added up in the masters.

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
