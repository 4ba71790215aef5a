"""Every message of some calls counted, where torch.distributed sends it."""

import torch.distributed as dist

from tests.mechanisms.collectives.cases import called

LIBRARY = [
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "_allgather_base", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "gather", "scatter", "reduce_scatter", "_reduce_scatter_base", "alltoall",
    "reduce_scatter_tensor_coalesced", "alltoall_base", "barrier", "monitored_barrier", "recv_anysource",
]  # fmt: skip


def sent_by(cases):
    """Runs the cases with every message counted: per case [bytes of each message], and library calls made."""
    messages, library = [], []
    saved = {name: getattr(dist.ProcessGroup, name) for name in ["send", *LIBRARY] if hasattr(dist.ProcessGroup, name)}

    def counting(group, tensors, *args, **kwargs):
        messages[-1].append(sum(t.numel() * t.element_size() for t in tensors))
        return saved["send"](group, tensors, *args, **kwargs)

    def telling(name):
        return lambda *args, **kwargs: (library.append(name), saved[name](*args, **kwargs))[1]

    try:
        for name in saved:
            setattr(dist.ProcessGroup, name, counting if name == "send" else telling(name))
        for case in cases:
            messages.append([])
            called(case)
    finally:
        for name, method in saved.items():
            setattr(dist.ProcessGroup, name, method)
    return messages, library
