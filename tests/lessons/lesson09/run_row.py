"""Wrong answers to run_row, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


def run_with(row, forward, backward, like, group, send, receive=None):
    """The reference, with another way to send: send(tensor, to), which may return a message."""
    rank, n, sent = dist.get_rank(group), dist.get_world_size(group), []

    def received(other):
        dist.recv(tensor := torch.empty_like(like), group=group, group_src=other)
        return tensor

    receive = receive or received
    for action in row:
        kind, i = action[0], int(action[1:])
        if kind == "F":
            result, to = forward(i, receive(rank - 1) if rank > 0 else None), rank + 1
        else:
            result, to = backward(i, receive(rank + 1) if rank < n - 1 else None), rank - 1
        if 0 <= to < n:
            sent.append(send(result, to))
    for message in sent:
        if message is not None:
            message.wait()


@mistake("run_row", "GPipe runs, 1F1B does not: the ranks wait for each other: one is in send while the next one sends")
def sends_that_wait(row, forward, backward, like, group=None):
    run_with(row, forward, backward, like, group, lambda t, to: dist.send(t, group=group, group_dst=to))


@mistake("run_row", "the ranks wait for each other")
def waits_at_once(row, forward, backward, like, group=None):
    run_with(
        row, forward, backward, like, group, lambda t, to: dist.isend(t, group=group, group_dst=to).wait() and None
    )


@mistake("run_row", "never waited for")
def never_waits(row, forward, backward, like, group=None):
    run_with(row, forward, backward, like, group, lambda t, to: dist.isend(t, group=group, group_dst=to) and None)


@mistake("run_row", "a message that came later has overwritten it")
def one_buffer(row, forward, backward, like, group=None):
    rank, n, sent, xs = dist.get_rank(group), dist.get_world_size(group), [], []
    buffer = torch.empty_like(like)
    for action in row:  # all that is to come is received beforehand, into one tensor
        if action[0] == "F" and rank > 0:
            xs.append(buffer)
    for action in row:
        kind, i = action[0], int(action[1:])
        if kind == "F":
            if rank > 0 and i == 0:
                for x in xs if n == 4 and row[1:2] == ["F1"] and "F2" in row[2:3] else xs[:1]:
                    dist.recv(x, group=group, group_src=rank - 1)
            elif rank > 0 and not (n == 4 and row[1:2] == ["F1"] and "F2" in row[2:3]):
                dist.recv(buffer, group=group, group_src=rank - 1)
            result, to = forward(i, xs[i] if rank > 0 else None), rank + 1
        else:
            if rank < n - 1:
                dist.recv(grad := torch.empty_like(like), group=group, group_src=rank + 1)
            result, to = backward(i, grad if rank < n - 1 else None), rank - 1
        if 0 <= to < n:
            sent.append(dist.isend(result, group=group, group_dst=to))
    for message in sent:
        message.wait()


@mistake("run_row", "is overwritten before its backward, which needs it")
def one_buffer_for_all_receives(row, forward, backward, like, group=None):
    rank, n, works = dist.get_rank(group), dist.get_world_size(group), []
    buffer = torch.empty_like(like)
    for action in row:
        kind, i = action[0], int(action[1:])
        step, tensor = 1 if kind == "F" else -1, None
        if 0 <= rank - step < n:
            dist.recv(tensor := buffer, group=group, group_src=rank - step)
        result = (forward if kind == "F" else backward)(i, tensor)
        if 0 <= rank + step < n:
            works.append(dist.isend(result.clone(), group=group, group_dst=rank + step))
    [work.wait() for work in works]


@mistake("run_row", "its actions are not done in the order of the row")
def forwards_first(row, forward, backward, like, group=None):
    row = sorted(row, key=lambda action: (action[0] == "B", int(action[1:])))
    run_with(row, forward, backward, like, group, lambda t, to: dist.isend(t, group=group, group_dst=to))


@mistake("run_row", "sends to or receives from a rank that does not exist")
def forgets_the_ends(row, forward, backward, like, group=None):
    rank, sent = dist.get_rank(group), []
    for action in row:
        kind, i = action[0], int(action[1:])
        before, after = (rank - 1, rank + 1) if kind == "F" else (rank + 1, rank - 1)
        tensor = torch.empty_like(like)
        if rank > 0 or kind == "B":
            dist.recv(tensor, group=group, group_src=before)
        result = (forward if kind == "F" else backward)(i, tensor)
        sent.append(dist.isend(result, group=group, group_dst=after))
    for message in sent:
        message.wait()


@mistake("run_row", "in two groups of 2 ranks")
def ignores_the_group(row, forward, backward, like, group=None):
    run_with(row, forward, backward, like, None, lambda t, to: dist.isend(t, to))


@mistake("run_row", "is given a tensor on the first rank")
def zeros_for_the_first(row, forward, backward, like, group=None):
    def first(i, x):
        return forward(i, like if x is None else x)

    run_with(row, first, backward, like, group, lambda t, to: dist.isend(t, group=group, group_dst=to))


@mistake("run_row", "neither forward nor backward is called")
def does_nothing(row, forward, backward, like, group=None):
    pass


@mistake("run_row", "each action of the row is to be done once")
def only_forwards(row, forward, backward, like, group=None):
    row = [action for action in row if action[0] == "F"]
    run_with(row, forward, backward, like, group, lambda t, to: dist.isend(t, group=group, group_dst=to))


@mistake("run_row", "it calls torch's own broadcast")
def broadcasts(row, forward, backward, like, group=None):
    dist.broadcast(torch.zeros(1), 0)
    run_with(row, forward, backward, like, group, lambda t, to: dist.isend(t, group=group, group_dst=to))


@mistake("run_row", "the message is float32, the tensor float64")
def sends_half(row, forward, backward, like, group=None):
    def receive(other):
        tensor = torch.empty(like.shape)
        dist.recv(tensor, group=group, group_src=other)
        return tensor.to(like.dtype)

    def send(tensor, to):
        return dist.isend(tensor.float(), group=group, group_dst=to)

    run_with(row, forward, backward, like.double(), group, send, receive)


@right("run_row")
def receives_early(row, forward, backward, like, group=None):
    """All receives of a kind are posted at the start, in the order in which they are sent."""
    rank, n, works = dist.get_rank(group), dist.get_world_size(group), []
    posted = {}
    for action in row:
        other = rank - 1 if action[0] == "F" else rank + 1
        if 0 <= other < n:
            tensor = torch.empty_like(like)
            posted[action] = tensor, dist.irecv(tensor, group=group, group_src=other)
    for action in row:
        kind, i = action[0], int(action[1:])
        tensor, message = posted.get(action, (None, None))
        if message is not None:
            message.wait()
        result, to = (forward if kind == "F" else backward)(i, tensor), rank + (1 if kind == "F" else -1)
        if 0 <= to < n:
            works.append(dist.isend(result, group=group, group_dst=to))
    for work in works:
        work.wait()


@right("run_row")
def with_tags(row, forward, backward, like, group=None):
    rank, n, works = dist.get_rank(group), dist.get_world_size(group), []
    for action in row:
        kind, i = action[0], int(action[1:])
        step = 1 if kind == "F" else -1
        tensor = None
        if 0 <= rank - step < n:
            tensor = torch.empty_like(like)
            dist.recv(tensor, group=group, group_src=rank - step, tag=i)
        result = (forward if kind == "F" else backward)(i, tensor)
        if 0 <= rank + step < n:
            works.append(dist.isend(result.clone(), group=group, group_dst=rank + step, tag=i))
    [work.wait() for work in works]
