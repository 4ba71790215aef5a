"""The two halves of backward: the operations of each, counted, and what they leave to the other."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pardist_lib.mechanisms.pipeline.split_backward import backward_to_inputs, backward_to_weights, edges_of
from pardist_lib.mechanisms.pipeline.stages import Stage
from pardist_lib.mechanisms.tensor_parallel import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelConv2d,
    ParallelMLP,
    RowParallelLinear,
)
from pardist_lib.mechanisms.tensor_parallel.attention import Attention
from pardist_lib.mechanisms.tensor_parallel.transformer import ParallelTransformerBlock, TransformerBlock
from tests.mechanisms.pipeline.nets import close

ROWS, LENGTH, WIDTH = 4, 6, 16


def built(name):
    """(layers, their input). The same on every rank."""
    torch.manual_seed(0)
    linear, block = nn.Linear(WIDTH, WIDTH), TransformerBlock(WIDTH, 4)
    layers = {
        "linear": lambda: [linear],
        "MLP": lambda: [nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)],
        "block": lambda: [block],
        "torch's block": lambda: [nn.TransformerEncoderLayer(WIDTH, 4, 32, 0.0, batch_first=True)],
        "convolutions": lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)],
        "column and row": lambda: [
            ColumnParallelLinear.from_module(linear),
            RowParallelLinear.from_module(nn.Linear(WIDTH, WIDTH)),
        ],
        "gathered column": lambda: [ColumnParallelLinear.from_module(linear, gather_output=True)],
        "parallel MLP": lambda: [ParallelMLP(WIDTH, 4 * WIDTH)],
        "parallel attention": lambda: [ParallelAttention.from_module(Attention(WIDTH, 4))],
        "parallel block": lambda: [ParallelTransformerBlock.from_module(block)],
        "parallel convolution": lambda: [ParallelConv2d.from_module(nn.Conv2d(1, 4, 3, padding=1))],
    }[name]()
    x = torch.randn(ROWS, *([1] * ("conv" in name)), LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    return nn.Sequential(*layers).double(), x.double()


def operations(fn, *args):
    with FlopCounterMode(display=False) as counter:
        result = fn(*args)
    return counter.get_total_flops(), result


def halves(name, first):
    """On a rank, or in one process: the operations of F, B, I and W of a stage; I and W leave what B does.

    first: whether it is a pipeline's first stage, whose input requires no gradient.
    """
    found = {}
    for split in (False, True):
        layers, x = built(name)
        stage, x = Stage(0 if first else 1, dict(enumerate(layers))), x.requires_grad_(not first)
        found["F"], ((y,), _) = operations(stage.forward, 0, [x], False)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        if not split:
            found["B"], inputs = operations(stage.backward, 0, [upstream])
            whole = inputs, [p.grad for p in layers.parameters()]
        else:
            found["I"], inputs = operations(stage.backward_to_inputs, 0, [upstream])
            assert all(p.grad is None for p in layers.parameters()), "I has added to a weight's gradient"
            kept = [g.clone() for g in inputs]
            found["W"], _ = operations(stage.backward_to_weights, 0)
            assert x.grad is None and not stage.held
            for got, wanted in zip(inputs + kept, 2 * whole[0], strict=True):
                close(got, wanted, "input's gradient", rtol=1e-12, atol=1e-12)
            for got, wanted in zip(layers.parameters(), whole[1], strict=True):
                close(got.grad, wanted, "weight's gradient", rtol=1e-12, atol=1e-12)
    assert len(whole[0]) == (not first)
    return found


PLAIN = ["linear", "MLP", "block", "torch's block", "convolutions"]
PARALLEL = ["column and row", "gathered column", "parallel MLP", "parallel attention", "parallel block"]
PARALLEL += ["parallel convolution"]


@pytest.mark.parametrize("name", PLAIN)
def test_each_operation_of_backward_is_in_one_half(name):
    for first in (False, True):
        found = halves(name, first)
        assert found["I"] + found["W"] == found["B"], found
        assert 0 < found["W"] < found["B"] or first, found


def test_a_matmul_is_a_third_forward_a_third_for_the_input_and_a_third_for_the_weight():
    found = halves("linear", False)
    assert found == {"F": found["F"], "I": found["F"], "W": found["F"], "B": 2 * found["F"]}
    assert found["F"] == 2 * ROWS * LENGTH * WIDTH * WIDTH
    assert halves("linear", True)["I"] == 0
    assert halves("MLP", False) == {"F": 8 * found["F"], "B": 16 * found["F"], "I": 8 * found["F"], "W": 8 * found["F"]}


class Unasked(torch.autograd.Function):
    """A matmul that computes both gradients whatever is asked of it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.t() @ grad


def test_a_function_that_does_not_ask_what_is_wanted_is_right_all_the_same():
    x, weight = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.cos(Unasked.apply(torch.sin(x), weight))
    wanted = torch.autograd.grad(y, [x, weight], torch.ones_like(y), retain_graph=True)
    (found,), starts = backward_to_inputs(edges_of([y]), [torch.ones_like(y)], edges_of([x]))
    del y  # what W needs of the graph it has itself
    assert weight.grad is None
    backward_to_weights(starts)
    close(found, wanted[0], "input's gradient")
    close(weight.grad, wanted[1], "weight's gradient")
    assert x.grad is None


def same_weight_everywhere(x, w, v):
    """Forks above each other with one weight, one that joins two branches, one operation with two outputs."""
    a, b = (x @ w).chunk(2, -1)
    h = torch.cat([torch.tanh(a @ v), b * v.sum()], -1) @ w
    return h + torch.sin(h) @ w.t() * v.mean(), (h * w[0]).sum(-1)


@pytest.mark.parametrize("leaf", [True, False])
def test_weights_that_are_used_several_times(leaf):
    """From a leaf, as between stages, and from an operation that has weights below it, as on the first stage."""
    draw = torch.Generator().manual_seed(0)
    shapes = (5, 8), (8, 8), (4, 4)
    x, w, v = (torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes)
    given = [x] if leaf else list((x.detach() @ w + v.sum()).chunk(2, -1))
    outputs = same_weight_everywhere(torch.cat(given, -1), w, v)
    upstream = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in outputs]
    wanted = torch.autograd.grad(outputs, [w, v, *given], upstream, retain_graph=True)
    found, starts = backward_to_inputs(edges_of(outputs), upstream, edges_of(given))
    assert w.grad is None and v.grad is None
    backward_to_weights(starts)
    for got, right in zip([w.grad, v.grad, *found], wanted, strict=True):
        close(got, right, "gradient", rtol=1e-12, atol=1e-12)
    assert x.grad is None


def every(names):
    return [halves(name, first) for name in names for first in (False, True)]


@pytest.mark.share(2)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_through_tensor_parallel_layers(ranks_of, n):
    for results in ranks_of(n).run(every, PARALLEL, quiet=True):
        for name, found in zip([n for n in PARALLEL for _ in range(2)], results, strict=True):
            assert found["I"] + found["W"] == found["B"], (name, found)


class GivesItsBias(nn.Module):
    """As a bias of positions that all blocks use: an output that no input leads to."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(1, 2, 3, dtype=torch.float64))

    def forward(self, x):
        return x * self.bias, 2 * self.bias, self.bias


def test_an_output_that_is_made_of_weights_alone():
    grads = []
    for split in (False, True):
        last = GivesItsBias()
        stage = Stage(1, {0: linear_of(3), 1: last})
        x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        outputs, _ = stage.forward(0, [x], False)
        upstream = [torch.ones_like(y) for y in outputs]
        found = (stage.backward_to_inputs if split else stage.backward)(0, upstream)
        if split:
            stage.backward_to_weights(0)
        grads.append([last.bias.grad, stage.layers[0].weight.grad, *found])
    for whole, halves in zip(*grads, strict=True):
        close(halves, whole, "gradient", rtol=1e-12, atol=1e-12)


def linear_of(width):
    torch.manual_seed(0)
    return nn.Linear(width, width).double()
