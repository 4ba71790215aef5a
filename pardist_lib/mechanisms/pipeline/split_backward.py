"""Backward in two halves: I, the gradients of a stage's inputs, which another rank waits for; W, those of its weights.

Autograd's graph of a stage is a spine, from the output to the input, and branches that end at weights: where an
operation has both (a matmul, a norm), the graph forks. I runs down the spine alone and notes the gradient that comes by
at each fork. W starts once from every fork and takes its branches only. Each matmul of backward is done exactly once,
so I + W takes the operations of an undivided backward.

    F   x ──── matmul ──── gelu ──── matmul ──── y
                 │                     │
                 w₁                    w₂
    I   the row from right to left;  W   the two columns, later

torch asks an operation for no gradient that a pass does not need; a torch.autograd.Function has to look for itself
(`collectives.autograd.wanted`), or computes both halves twice, and is right all the same.

Source: Qi et al., "Zero Bubble Pipeline Parallelism" (2023), sections 1 and 2 (there the halves are called B and W).
"""

from functools import partial

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge


def edges_of(tensors):
    """Where autograd's graph holds these: [GradientEdge]. They keep the graph, not the tensors' values."""
    return [get_gradient_edge(t) for t in tensors]


def backward_to_inputs(roots, gradients, inputs):
    """I. Returns (the inputs' gradients, None where one is not reached; what `backward_to_weights` goes on from).

    roots: GradientEdges of what the stage gave; gradients: their gradients; inputs: GradientEdges, at least one.
    No weight's gradient is computed, but for an output to which no input leads. Sends what the stage's own layers send
    for their inputs' gradients.
    """
    (forks, spine), passed = _forks(roots, inputs), {}
    beside = [(r, g) for r, g in zip(roots, gradients, strict=True) if r.node not in spine]
    if beside:  # an output that is made of weights alone: nobody waits for it, and W would not find it
        torch.autograd.backward(*zip(*beside, strict=True), retain_graph=True)
    hooks = [node.register_prehook(partial(_note, passed, node)) for node in forks]
    try:
        found = torch.autograd.grad(roots, inputs, gradients, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    # Before torch 2.13 the node of a torch.autograd.Function does not keep itself: what leads to it does
    starts = [(node, passed[node], forks[node], _kept(node, roots)) for node in forks if node in passed]
    ends = {}  # {node: [gradient of each of its outputs]}: one operation may give several
    for edge, gradient in zip(inputs, found, strict=True):
        ends.setdefault(edge.node, [None] * len(edge.node._input_metadata))[edge.output_nr] = gradient
    for node, gradients in ends.items():
        if any(g is not None for g in gradients) and (weights := _weights_below(node)):  # none where it is a leaf
            starts.append((node, tuple(gradients), weights, _kept(node, inputs)))
    return found, starts


def backward_to_weights(starts):
    """W. Adds to the .grad of the weights what backward_to_inputs has left out."""
    for group in sorted(_that_share_weights(starts), key=len, reverse=True):
        edges, gradients = [], []
        for node, passed, *_ in group:
            for output, gradient in enumerate(passed):
                if gradient is not None:
                    edges.append(GradientEdge(node, output))
                    gradients.append(gradient)
        # Two forks with the same weight: on its way to the weight at the lower one, the upper one's gradient would
        # come down the spine, too. It is already part of what the lower one has noted, and that takes its place. The
        # spine is needed for it, so these come first, and keep it
        several = len(group) > 1
        clamps = [node.register_prehook(partial(_instead, passed)) for node, passed, *_ in group if several]
        weights = list({w for _, _, own, _ in group for w in own})
        try:
            torch.autograd.backward(edges, gradients, inputs=weights, retain_graph=several)
        finally:
            for clamp in clamps:
                clamp.remove()


# ---- the graph ----------------------------------------------------------------------------------------------------


def _forks(roots, inputs):
    """({node on the way from the roots to the inputs: weights below it that are off this way}, all of that way)."""
    ends = {edge.node for edge in inputs}
    order, seen = [], set()
    stack = [(root.node, False) for root in roots]
    while stack:  # every node after all that it leads to
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions if below is not None and node not in ends]
    spine, weights = set(ends), {}
    for node in order:
        below = [n for n, _ in node.next_functions if n is not None] if node not in ends else []
        if any(n in spine for n in below):
            spine.add(node)
        weights[node] = {w for n in below if n not in spine for w in weights[n]} | _own_weight(node)
    return {node: weights[node] for node in order if node in spine and node not in ends and weights[node]}, spine


def _weights_below(node):
    """The weights that an input's own graph ends at; none where it is a leaf."""
    found, seen, stack = set(), set(), [below for below, _ in node.next_functions]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= _own_weight(node)
            stack += [below for below, _ in node.next_functions]
    return found


def _own_weight(node):
    weight = getattr(node, "variable", None)  # of an AccumulateGrad
    return {weight} if weight is not None else set()


def _kept(node, edges):
    return edges if isinstance(node, BackwardCFunction) else None


def _that_share_weights(starts):
    """The starts in lists, two that share a weight in the same one."""
    groups = []
    for start in starts:
        shared = [g for g in groups if any(start[2] & weights for _, _, weights, _ in g)]
        groups = [g for g in groups if g not in shared] + [[s for g in shared for s in g] + [start]]
    return groups


def _note(passed, node, gradients):
    passed[node] = gradients


def _instead(passed, _):
    return passed
