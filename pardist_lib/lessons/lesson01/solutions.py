"""Reference solutions of lesson 01. Their signatures and docstrings are the blanks of the notebook."""

import torch
import torch.distributed as dist


def my_broadcast(tensor: torch.Tensor, src: int) -> None:
    """Give every rank the values that rank `src` has in `tensor`. Called on every rank.

    tensor: any shape and dtype, the same on every rank; rank src's holds the values.
    In place: afterwards every rank's `tensor` holds them.
    Sends: dist.send and dist.recv (or isend, irecv) only; each rank but src receives the tensor
    once.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    if rank == src:
        for other in range(n):
            if other != src:
                dist.send(tensor, other)
    else:
        dist.recv(tensor, src)


def exchange(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Swap tensors with both neighbours.

    The ranks stand in a ring: to the left of rank 0 is the last rank.
    tensor: any shape and dtype, the same on every rank; it is not changed.
    Returns (from_left, from_right): the tensors of ranks rank - 1 and rank + 1.
    Sends: dist.isend and dist.irecv (or send, recv) only; the tensor once to each side.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    left, right = (rank - 1) % n, (rank + 1) % n
    from_left, from_right = torch.empty_like(tensor), torch.empty_like(tensor)
    messages = [dist.isend(tensor, right), dist.isend(tensor, left)]  # both are under way, nobody waits yet
    messages += [dist.irecv(from_left, left), dist.irecv(from_right, right)]
    for message in messages:
        message.wait()
    return from_left, from_right


def my_all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors of all ranks, on every rank.

    tensor: any shape and dtype, the same on every rank; it is not changed.
    Returns a tensor of shape (n, *tensor.shape), n ranks: row r is rank r's tensor.
    Sends: dist.isend and dist.irecv (or send, recv) only; n - 1 times the size of tensor from each
    rank.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    rows = tensor.new_empty(n, *tensor.shape)
    rows[rank] = tensor
    for step in range(n - 1):  # what came in the last step goes on to the right
        message = dist.isend(rows[(rank - step) % n], (rank + 1) % n)
        dist.recv(rows[(rank - step - 1) % n], (rank - 1) % n)
        message.wait()
    return rows


def my_ring_all_reduce(tensor: torch.Tensor) -> None:
    """Replace `tensor` by its sum over all ranks, by passing pieces of it around a ring.

    tensor: contiguous, any shape and dtype, the same on every rank; it may have fewer elements than
    ranks.
    In place: afterwards every rank's `tensor` holds the sum.
    Sends: dist.isend and dist.irecv (or send, recv) only, each rank to rank - 1 only, rank 0 to the
    last one.
    With n ranks and S bytes each rank sends 2(n - 1)/n · S: n - 1 steps in which one n-th of the
    tensor is passed on and added up, then n - 1 in which the finished n-ths go round. Where n does
    not divide the number of elements, some pieces have one element more than others, never two.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    pieces = tensor.view(-1).tensor_split(n)  # views: what is written into a piece is written into tensor
    for step in range(2 * (n - 1)):
        piece = pieces[(rank + step + 1) % n]
        arrived = torch.empty_like(piece)
        message = dist.isend(pieces[(rank + step) % n], (rank - 1) % n)
        dist.recv(arrived, (rank + 1) % n)
        message.wait()
        if step < n - 1:
            piece += arrived  # one more rank's share of this piece
        else:
            piece.copy_(arrived)  # this piece is finished


def ring_bytes(size_in_bytes: int, n: int) -> float:
    """How many bytes each of n ranks sends in a ring all-reduce of a tensor of size_in_bytes.

    n: 1 or more; one rank sends nothing. The value of the formula, also where that is no whole
    number.
    """
    return 2 * (n - 1) / n * size_in_bytes


def fit_alpha_beta(sizes: list, seconds: list) -> tuple[float, float]:
    """Latency and bandwidth of a link, from how long messages of several sizes took on it.

    sizes: the messages' sizes in bytes, in any order. seconds: how long each took. Neither list is
    changed.
    Returns (latency in seconds, bandwidth in bytes per second) of the model seconds = latency +
    size/bandwidth that fits best: the least sum of ((measured - model) / measured)². As a share of
    what was measured, because a microsecond matters to a short message and not to a long one.
    """
    x, y = torch.tensor(sizes, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    columns = torch.stack([1 / y, x / y], 1)  # latency * 1/y + slope * x/y is to be 1
    latency, slope = torch.linalg.lstsq(columns, torch.ones(len(x), 1, dtype=torch.float64)).solution.flatten()
    return latency.item(), 1 / slope.item()  # the slope is in seconds per byte


def bus_bandwidth(size_in_bytes: int, seconds: float, n: int) -> float:
    """What an all-reduce that took `seconds` on n ranks says about the links: bytes per second.

    The bytes each rank had to send in a ring, 2(n - 1)/n · size_in_bytes, per second. (nccl-tests
    calls it busbw; size_in_bytes / seconds, which falls as ranks are added even where the links are
    as fast, is its algbw.)
    """
    return 2 * (n - 1) / n * size_in_bytes / seconds
