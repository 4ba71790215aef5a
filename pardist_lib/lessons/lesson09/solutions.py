"""One solution for each exercise of lesson 09; signature and docstring are the blank in the notebook."""

import torch
import torch.distributed as dist


def last_stage(stage, xs: list, targets: list) -> tuple:
    """The last rank's part of a step, in one process: forward and backward of all micro-batches.

    stage: x → scores, with parameters. xs: the micro-batches as they arrived, (b_i, width) each, no
    graph behind them; targets: (b_i,) each. The b_i may differ. The loss is F.cross_entropy, its
    mean over all rows of all micro-batches.
    Adds to the .grad of the stage's parameters what one backward of that loss would.
    Returns (loss, a Python number; the gradients of the loss by each of xs, a list of tensors: they
    go back to the rank before).
    """
    rows, total, grads = sum(len(x) for x in xs), 0.0, []
    for x, target in zip(xs, targets, strict=True):
        x = x.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(stage(x), target) * len(x) / rows
        loss.backward()
        total += loss.item()
        grads.append(x.grad)
    return total, grads


def one_f_one_b_row(rank: int, p: int, m: int) -> list:
    """What a rank does under 1F1B, in its order.

    rank: 0 to p - 1, which has the stage of that number. p: ranks; m: micro-batches, from 1 on,
    perhaps fewer than p.
    First as many forwards as there are ranks behind this one (m at most); then one forward and one
    backward in turn, until all forwards are done; then the backwards that are left.
    Returns a list of texts: "2F0" is stage 2's forward of micro-batch 0, "2B0" its backward.
    """
    warm_up = min(p - rank - 1, m)
    row = [f"{rank}F{i}" for i in range(warm_up)]
    for i in range(m - warm_up):
        row += [f"{rank}F{warm_up + i}", f"{rank}B{i}"]
    return row + [f"{rank}B{i}" for i in range(m - warm_up, m)]


def in_flight(row: list) -> int:
    """The most micro-batches whose activations a rank keeps at once, by its row of a schedule.

    row: texts such as "2F0": stage, kind, micro-batch. A rank may have several stages; a
    micro-batch counts once for each stage that keeps it. From F on it is kept, until B; where
    backward is in halves, I (to the input) and W (to the weights), until W, which comes last.
    """
    held = most = 0
    for action in row:
        held += ("F" in action) - ("B" in action or "W" in action)
        most = max(most, held)
    return most


def input_and_weights(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, grad: torch.Tensor):
    """The backward of y = relu(x @ w1.T) @ w2.T in two halves, by hand, without autograd.

    x: (b, in), w1: (hidden, in), w2: (out, hidden); grad: (b, out), the gradient of y.
    Returns (the gradient of x, a function without arguments). The first half computes what the rank
    before waits for, and no gradient of a weight, with at most four products (y is not needed).
    The function, called once and later, returns (the gradient of w1, that of w2), with two.
    What is given is not changed.
    """
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)
    return dh @ w1, lambda: (dh.T @ x, grad.T @ h)


def run_row(row: list, forward, backward, like: torch.Tensor, group=None) -> None:
    """One rank's part of a pipeline step: its actions in their order, with all messages.

    row: this rank's actions, such as ["F0", "F1", "B0", "B1"]; the forwards come in the order of
    the micro-batches, and so do the backwards, on every rank.
    forward(i, x) → y: this rank's stage on micro-batch i; x is None on the group's first rank.
    backward(i, grad) → the gradient of x; grad is None on the last rank.
    like: every x, y and gradient that travels has its shape and dtype.
    y goes to the next rank's forward(i, …), the gradient of x to the rank before's backward(i, …);
    first and last rank of the group have nobody beyond them. No rank may wait for one that waits
    for it, however the rows are ordered, with messages of any size.
    Sends: to each neighbour one message a micro-batch, with send and receive alone.
    """
    rank, n, sent = dist.get_rank(group), dist.get_world_size(group), []

    def receive(other):
        dist.recv(tensor := torch.empty_like(like), group=group, group_src=other)
        return tensor

    for action in row:
        kind, i = action[0], int(action[1:])
        if kind == "F":
            result, to = forward(i, receive(rank - 1) if rank > 0 else None), rank + 1
        else:
            result, to = backward(i, receive(rank + 1) if rank < n - 1 else None), rank - 1
        if 0 <= to < n:
            sent.append(dist.isend(result.detach().contiguous(), group=group, group_dst=to))
    for message in sent:
        message.wait()


def tied_gradient(weight, group=None) -> None:
    """After backward: the gradient of an embedding that the first and the last stage share.

    weight: on the group's first and last rank the nn.Parameter, with this rank's part of the
    gradient in its .grad (None where it found none: zeros); None on the ranks between.
    Afterwards both have in .grad the sum of both parts. A group of one rank has one copy, whose
    .grad is whole. A group of two has both ends.
    Sends: the weight's size once each way between first and last, with send and receive; nothing
    elsewhere.
    """
    rank, n = dist.get_rank(group), dist.get_world_size(group)
    if n == 1 or rank not in (0, n - 1):
        return
    other = n - 1 - rank
    mine = torch.zeros_like(weight) if weight.grad is None else weight.grad.contiguous()
    theirs = torch.empty_like(mine)
    message = dist.isend(mine, group=group, group_dst=other)
    dist.recv(theirs, group=group, group_src=other)
    message.wait()
    weight.grad = mine + theirs


def my_schedule(p: int, m: int) -> list:
    """A schedule of your own: a smaller bubble than 1F1B's, with no more in flight than 1F1B.

    p: ranks, 2 or more; m: micro-batches, p or more. One stage on each rank, stage r on rank r.
    F, I and W take equally long, messages no time. 1F1B's bubble is (p - 1)/(m + p - 1); yours has
    to be smaller. No rank may have more than p micro-batches in flight (from F to B or W).
    Returns p lists of texts, one for each rank: "2F0" forward, "2B0" backward, or its halves "2I0"
    and "2W0". Real ranks will run it, by torch's own runtime.
    """
    rows = []
    for rank in range(p):
        row, f, i, w = [], 0, 0, 0  # how many of each kind are done
        while w < m:
            if f < m and f - i < p - rank and f - w < p:  # as in 1F1B; p in flight
                row.append(f"{rank}F{f}")
                f += 1
            elif i < m and i - w <= rank:  # W comes `rank` micro-batches late
                row.append(f"{rank}I{i}")
                i += 1
            else:
                row.append(f"{rank}W{w}")
                w += 1
        rows.append(row)
    return rows
