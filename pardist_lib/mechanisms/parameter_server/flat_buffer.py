"""Many tensors in one run of bytes, so that they travel as one message."""

import torch


class FlatBuffer:
    """Room for tensors shaped like those given, in one piece of the host's memory.

    raw: all bytes, uint8; views: one tensor for each of `tensors`, of its shape and dtype, in its place in raw.
    Tensors of different dtypes lie in order of their elements' size, so that all are aligned without gaps.
    """

    def __init__(self, tensors):
        self.raw = torch.empty(sum(t.numel() * t.element_size() for t in tensors), dtype=torch.uint8)
        self.views, at = [None] * len(tensors), 0
        for i in sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size()):
            t, size = tensors[i], tensors[i].numel() * tensors[i].element_size()
            self.views[i] = self.raw[at : at + size].view(t.dtype).view(t.shape)
            at += size

    @torch.no_grad()
    def read_from(self, tensors):
        """Fill the buffer; None stands for zeros."""
        for view, t in zip(self.views, tensors, strict=True):
            view.zero_() if t is None else view.copy_(t)
        return self

    @torch.no_grad()
    def write_into(self, tensors):
        for view, t in zip(self.views, tensors, strict=True):
            t.copy_(view)
