"""What several exercises of this lesson share."""

import torch

OTHER_CALLS = {
    "broadcast": "it broadcasts one rank's parameters: the others' training is lost, a mean needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "all_gather": "it calls all_gather, which brings every rank's tensor to every rank, n times as many bytes: "
    "all_reduce adds up on the way",
    "": "it calls {op}: all_reduce is all that is needed",
}


def parameters_of(named):
    return {name: p.detach().clone() for name, p in named.items()}


def gradients_of(named):
    return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}


def replaced(named, model, trained):
    """A sentence where the model has other Parameters than before, or others are frozen, else an empty one."""
    now = dict(model.named_parameters())
    for name, p in named.items():
        if now.get(name) is not p:
            return f"the model has another {name} now: write into the one that is there, the optimizer holds on to it"
        if p.requires_grad != (name in trained):
            state = "takes no gradient any more" if name in trained else "takes a gradient now"
            return f"{name} {state}: leave requires_grad as it was, p.data and torch.no_grad() do without"
    return ""


def alike(a, b):
    return a is None and b is None or a is not None and b is not None and torch.equal(a, b)
