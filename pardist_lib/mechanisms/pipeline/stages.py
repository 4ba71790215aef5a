"""A rank's stages: which layers each has, and one micro-batch forward through a stage and back."""

import random
from contextlib import contextmanager, nullcontext
from itertools import accumulate

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from ..group import split_sizes
from .split_backward import backward_to_inputs, backward_to_weights, edges_of


class Stage:
    """Some layers in a row, and what their backward needs of the micro-batches that have not come back yet.

    layers: {number in the whole network: module}.
    checkpoint: keep only a micro-batch's inputs, and compute its forward again when its backward begins.
    """

    def __init__(self, number, layers, checkpoint=False):
        self.number, self.layers, self.checkpoint = number, layers, checkpoint
        self.held = {}  # {micro-batch: _Held}, from F until B or W

    def forward(self, i, inputs, packed, loss=None, seed=None):
        """F of micro-batch i. inputs: a list of tensors, packed: whether they are a tuple; loss: on the last stage,
        output → a number. Returns what the stage gives, as (list, packed)."""
        held = _Held(inputs, packed, loss, seed)
        training = torch.is_grad_enabled()
        if training:
            self.held[i] = held
        if training and self.checkpoint:
            held.random = torch.get_rng_state(), get_device_states(*inputs)
            with saved_tensors_hooks(lambda _: None, lambda _: None):  # a graph that keeps nothing, to see what has one
                outputs, packed = self._compute(i, held)
            held.ends = held.roots = None
            return outputs, packed
        return self._compute(i, held)

    def backward(self, i, gradients):
        """B. The gradients of what this stage gave → those of its inputs that require one; adds to the weights'."""
        held = self._open(i)
        del self.held[i]
        if held.roots:
            torch.autograd.backward(held.roots, gradients)
        return held.for_inputs([t.grad for t in held.wanted])

    def backward_to_inputs(self, i, gradients):
        """I. As `backward`, but leaves the weights' gradients to `backward_to_weights`.

        Where no input requires one, as on the first stage, it goes as far as the first layer's output.
        """
        held = self._open(i)
        found, held.starts = backward_to_inputs(held.roots, gradients, held.ends) if held.roots else ([], [])
        held.roots = held.ends = None
        return held.for_inputs(found if held.wanted else [])

    def backward_to_weights(self, i):
        """W."""
        backward_to_weights(self.held.pop(i).starts)

    def _compute(self, i, held):
        """The outputs as (list, packed). Notes in `held` where autograd's graph begins, and where I leaves it."""
        held.wanted = [t for t in held.inputs if t.requires_grad]
        held.ends = edges_of(held.wanted)
        value = tuple(held.inputs) if held.packed else held.inputs[0]
        for number, layer in self.layers.items():
            with nullcontext() if held.seed is None else draws(held.seed, number, i):
                value = layer(value)
            held.ends = held.ends or edges_of(t for t in self._tensors(value)[0] if t.requires_grad)
        if held.loss:
            value = held.loss(value)
        outputs, packed = self._tensors(value)
        held.roots = edges_of(t for t in outputs if t.requires_grad)
        return outputs, packed

    def _open(self, i):
        """The micro-batch with its graph, which checkpointing makes only now."""
        held = self.held[i]
        if self.checkpoint:
            with torch.random.fork_rng(_gpu()), torch.enable_grad():
                torch.set_rng_state(held.random[0])
                set_device_states(*held.random[1])
                self._compute(i, held)
        return held

    def _tensors(self, value):
        """A tensor, or a tuple of them, as (list, whether it is a tuple)."""
        tensors = list(value) if isinstance(value, (tuple, list)) else [value]
        for t in tensors:
            if not isinstance(t, torch.Tensor):
                raise TypeError(
                    f"a layer of stage {self.number} gives a {type(t).__name__}: a tensor, or a tuple of tensors, can "
                    "go on to the next stage"
                )
        return tensors, isinstance(value, (tuple, list))


class _Held:
    """A micro-batch on a stage between its F and its last backward."""

    def __init__(self, inputs, packed, loss, seed):
        self.inputs, self.packed, self.loss, self.seed = inputs, packed, loss, seed

    def for_inputs(self, found):
        return [torch.zeros_like(t) if g is None else g for t, g in zip(self.wanted, found, strict=True)]


@contextmanager
def draws(seed, layer, micro_batch):
    """Inside, torch draws the same random numbers (dropout) for this layer and micro-batch in one process and in any
    pipeline; outside, as if nothing had been drawn."""
    with torch.random.fork_rng(_gpu()):
        torch.manual_seed(random.Random(f"{seed} {layer} {micro_batch}").getrandbits(32))
        yield


def _gpu():
    """This rank's GPU, whose random numbers go on as well; none where none is used."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def stage_sizes(layers, stages, cut=None, costs=None):
    """How many layers each stage has.

    cut: the answer itself, checked; costs: one number for each layer, so that the dearest stage costs least; neither:
    equal numbers, the first ones one more. Raises ValueError where the layers do not fill the stages.
    """
    if layers < stages:
        raise ValueError(f"{stages} stages, and only {layers} layers: each stage needs one")
    if cut is not None and costs is not None:
        raise ValueError("give cut or costs, not both")
    if cut is not None:
        if len(cut) != stages or sum(cut) != layers or min(cut) < 1:
            raise ValueError(
                f"cut={list(cut)} has to name the number of layers of each of the {stages} stages, {layers} in all"
            )
        return list(cut)
    if costs is None:
        return split_sizes(layers, stages)
    if len(costs) != layers:
        raise ValueError(f"{len(costs)} costs for {layers} layers")
    return _cheapest(list(costs), stages)


def _cheapest(costs, stages):
    """Dynamic programming: best[j] is the least cost of the dearest stage, where the first j layers fill s stages."""
    sums = [0, *accumulate(costs)]
    best, cuts = [0.0] + [float("inf")] * len(costs), []
    for s in range(stages):
        options = [
            [(max(best[i], sums[j] - sums[i]), i) for i in range(s, j)] or [(float("inf"), 0)]
            for j in range(len(costs) + 1)
        ]
        best, last = zip(*map(min, options), strict=True)
        cuts.append(last)
    sizes, j = [], len(costs)
    for last in reversed(cuts):
        sizes.append(j - last[j])
        j = last[j]
    return sizes[::-1]
