"""What a worker and the server write to each other, besides the tensors: a header before every push."""

import torch

LEAVING, FAILED = -1, -2  # instead of the number of rows
GOODBYE = 1  # the tag of a worker's last message


def header_bytes(parameters):
    """8 for the number of rows, then one bit for each parameter."""
    return 8 + -(-parameters // 8)


def header(rows, used):
    """rows: of the pushed gradient, or LEAVING, FAILED; used: for each parameter whether it has a gradient."""
    bits = [0] * -(-len(used) // 8)
    for i, is_used in enumerate(used):
        bits[i // 8] |= is_used << i % 8
    return torch.cat([torch.tensor([rows], dtype=torch.int64).view(torch.uint8), torch.tensor(bits, dtype=torch.uint8)])


def read_header(raw, parameters):
    """(rows, used), as given to `header`."""
    bits = raw[8:].tolist()
    return int(raw[:8].view(torch.int64)), [bool(bits[i // 8] >> i % 8 & 1) for i in range(parameters)]
