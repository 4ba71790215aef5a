"""What stays outside of torch.compile's graphs: waiting for messages, giving memory back, exchanging parameters."""

import functools

import torch


def eager(function):
    """torch.compiler.disable(function), made when it is first called: it imports the compiler, which takes seconds."""
    made = []

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not made:
            made.append(torch.compiler.disable(function))
        return made[0](*args, **kwargs)

    return call
