"""What the exercises that average a model's parameters share: what has to stay as it was, and what may be sent."""

import torch

from ..exercises.judge import Wrong

OTHER_CALLS = {
    "broadcast": "it broadcasts one rank's parameters: the others' training is lost, a mean needs all_reduce",
    "reduce": "it calls reduce, which brings the sum to one rank only: all_reduce brings it to all",
    "all_gather": "it calls all_gather, which brings every rank's tensor to every rank, n times as many bytes: "
    "all_reduce adds up on the way",
    "": "it calls {op}: all_reduce is all that is needed",
}


def values_of(named):
    return {name: p.detach().clone() for name, p in named.items()}


def gradients_of(named):
    return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}


def spoilt(model, named, trained, values, gradients):
    """What else than the values of `trained` parameters has changed in a model, in a sentence; "" for nothing.

    named, values, gradients: its parameters, their values and their gradients before.
    """
    now = dict(model.named_parameters())
    for name, p in named.items():
        if now.get(name) is not p:
            return f"the model has another {name} now: write into the one that is there, the optimizer holds on to it"
        if p.requires_grad != (name in trained):
            state = "takes no gradient any more" if name in trained else "takes a gradient now"
            return f"{name} {state}: leave requires_grad as it was, p.data and torch.no_grad() do without"
    for name, p in named.items():
        before = gradients[name]
        if (p.grad is None) != (before is None) or before is not None and not torch.equal(p.grad, before):
            return f"the gradient of {name} has changed: average the parameters, not the gradients"
        if name not in trained and not torch.equal(p, values[name]):
            return f"{name} is frozen and has changed: leave out what does not require a gradient"
    return ""


def no_more_than(trained, one, where, number=0):
    """Raise Wrong where a rank's calls are more, or more bytes, than one for each parameter, and for one number.

    trained: {name: bytes} of the parameters. number: bytes of the number, 0 where none has to travel.
    """
    size, most = sum(trained.values()), len(trained) + bool(number)
    made, calls = sum(call.bytes for call in one.calls), len(one.calls)
    if made > size + number or calls > most:
        twice = made - size - number <= trained["fc2.weight"] < made - size
        more = "a weight that two layers share comes up twice in modules()" if twice else "each once is enough"
        what = f"{size:,} bytes of parameters" + " and one number" * bool(number)
        why = f"the result is right, but {made:,} bytes in {calls} calls are all-reduced for {what}: {more}"
        raise Wrong(why, where, f"at most {size + number:,} bytes in {most} calls", f"{made:,} bytes in {calls} calls")
