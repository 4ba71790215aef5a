"""Wrong answers to summa_step, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist
from torch.distributed import irecv, isend

from tests.lessons.planted import mistake, right


def swap(b, c, step, q, i, j, beside, below):
    """The two blocks that a rank in row i, column j needs."""
    b_block = b if j == step else torch.empty_like(b)
    c_block = c if i == step else torch.empty_like(c)
    messages = [dist.isend(b, r) for r in beside] if j == step else [dist.irecv(b_block, beside[step - (step > j)])]
    messages += [dist.isend(c, r) for r in below] if i == step else [dist.irecv(c_block, below[step - (step > i)])]
    for message in messages:
        message.wait()
    return b_block, c_block


def around(q):
    i, j = divmod(dist.get_rank(), q)
    return i, j, [i * q + x for x in range(q) if x != j], [x * q + j for x in range(q) if x != i]


@mistake("summa_step", "`a` is overwritten")
def overwrites(a, b, c, step, q):
    b_block, c_block = swap(b, c, step, q, *around(q))
    torch.matmul(b_block, c_block, out=a)


@mistake("summa_step", "a += …, not a = a + …")
def makes_a_new_one(a, b, c, step, q):
    b_block, c_block = swap(b, c, step, q, *around(q))
    a = a + b_block @ c_block
    return a


@mistake("summa_step", "multiplies its own blocks")
def nothing_travels(a, b, c, step, q):
    swap(b, c, step, q, *around(q))
    a += b @ c


@mistake("summa_step", "`step` is ignored")
def always_step_0(a, b, c, step, q):
    b_block, c_block = swap(b, c, 0, q, *around(q))
    a += b_block @ c_block


@mistake("summa_step", "rows and columns of the grid are exchanged")
def by_columns_of_the_grid(a, b, c, step, q):
    j, i = divmod(dist.get_rank(), q)  # rank = j · q + i
    if q == 1:
        a += b @ c
        return
    rank_of = lambda row, column: row * q + column  # noqa: E731
    b_from, c_from = rank_of(i, step), rank_of(step, j)
    blocks = []
    for mine, source, needers in (
        (b, b_from, [r for r in range(q * q) if rank_of(r % q, step) == dist.get_rank()]),
        (c, c_from, [r for r in range(q * q) if rank_of(step, r // q) == dist.get_rank()]),
    ):
        block = mine if source == dist.get_rank() else torch.empty_like(mine)
        messages = [dist.isend(mine, r) for r in needers if r != dist.get_rank()]
        messages += [dist.irecv(block, source)] if source != dist.get_rank() else []
        for message in messages:
            message.wait()
        blocks.append(block)
    a += blocks[0] @ blocks[1]


@mistake("summa_step", "B's blocks travel along the columns and C's along the rows")
def along_the_wrong_lines(a, b, c, step, q):
    i, j, beside, below = around(q)
    c_block, b_block = swap(c, b, step, q, i, j, beside, below)
    a += b_block @ c_block


@mistake("summa_step", "only B's block travelled")
def c_stays(a, b, c, step, q):
    b_block, _ = swap(b, c, step, q, *around(q))
    a += b_block @ c


@mistake("summa_step", "the product is C @ B")
def wrong_order(a, b, c, step, q):
    b_block, c_block = swap(b, c, step, q, *around(q))
    a += c_block @ b_block


@mistake("summa_step", "more is sent than is needed")
def everybody_sends(a, b, c, step, q):
    i, j, beside, below = around(q)
    row, column = {j: b}, {i: c}
    messages = [dist.isend(b, r) for r in beside] + [dist.isend(c, r) for r in below]
    for r in beside:
        row[r % q] = torch.empty_like(b)
        messages.append(dist.irecv(row[r % q], r))
    for r in below:
        column[r // q] = torch.empty_like(c)
        messages.append(dist.irecv(column[r // q], r))
    for message in messages:
        message.wait()
    a += row[step] @ column[step]


@mistake("summa_step", "it calls torch's own broadcast")
def by_broadcast(a, b, c, step, q):
    i, j = divmod(dist.get_rank(), q)
    total = a.clone()
    for row in range(q):
        b_block, c_block = b.clone(), c.clone()
        dist.broadcast(b_block, row * q + step)
        if row == i:
            total_b = b_block
    for column in range(q):
        c_block = c.clone()
        dist.broadcast(c_block, step * q + column)
        if column == j:
            total_c = c_block
    a.copy_(total + total_b @ total_c)


@mistake("summa_step", "all steps at once")
def the_whole_summa(a, b, c, step, q):
    for s in range(q):
        b_block, c_block = swap(b, c, s, q, *around(q))
        a += b_block @ c_block


@mistake("summa_step", "sends to itself")
def sends_to_itself_too(a, b, c, step, q):
    i, j, _, _ = around(q)
    b_block, c_block = b.clone(), c.clone()
    if j == step:
        for x in range(q):
            dist.send(b, i * q + x)
    else:
        dist.recv(b_block, i * q + step)
    a += b_block @ c_block


@mistake("summa_step", "each block goes to all q - 1 others")
def to_the_other_one(a, b, c, step, q):
    i, j = divmod(dist.get_rank(), q)
    b_block, c_block, messages = b.clone(), c.clone(), []
    if q > 1:
        messages += [isend(b, i * q + 1 - j) if j == step else irecv(b_block, i * q + step)]
        messages += [isend(c, (1 - i) * q + j) if i == step else irecv(c_block, step * q + j)]
    for message in messages:
        message.wait()
    a += b_block @ c_block


@mistake("summa_step", "b comes from column `step` of the row")
def by_bits_of_the_rank(a, b, c, step, q):
    b_block, c_block = b.clone(), c.clone()
    if q > 1:
        rank = dist.get_rank()
        messages = [isend(b, rank ^ 1) if rank % 2 == step else irecv(b_block, rank ^ 1)]
        messages += [isend(c, rank ^ 2) if rank // 2 == step else irecv(c_block, rank ^ 2)]
        for message in messages:
            message.wait()
    a += b_block @ c_block


@mistake("summa_step", "b comes from column `step` of the row")
def passed_on(a, b, c, step, q):
    i, j = divmod(dist.get_rank(), q)
    b_block, c_block = b.clone(), c.clone()
    right_of, below = (j + 1) % q, (i + 1) % q
    if j != step:
        dist.recv(b_block, i * q + (j - 1) % q)
    if right_of != step:
        dist.send(b_block, i * q + right_of)
    if i != step:
        dist.recv(c_block, (i - 1) % q * q + j)
    if below != step:
        dist.send(c_block, below * q + j)
    a += b_block @ c_block


@mistake("summa_step", "added twice")
def adds_twice(a, b, c, step, q):
    b_block, c_block = swap(b, c, step, q, *around(q))
    a += 2 * (b_block @ c_block)


@mistake("summa_step", "never waited for")
def no_wait(a, b, c, step, q):
    i, j, beside, below = around(q)
    b_block, c_block = b.clone(), c.clone()
    if j == step:
        [dist.isend(b, r) for r in beside]
    else:
        dist.recv(b_block, i * q + step)
    if i == step:
        [dist.isend(c, r) for r in below]
    else:
        dist.recv(c_block, step * q + j)
    a += b_block @ c_block


@right("summa_step")
def as_one_batch(a, b, c, step, q):
    i, j, beside, below = around(q)
    b_block, c_block = b.clone(), c.clone()
    calls = [dist.P2POp(dist.isend, b, r) for r in beside if j == step]
    calls += [dist.P2POp(dist.isend, c, r) for r in below if i == step]
    calls += [dist.P2POp(dist.irecv, b_block, i * q + step)] if j != step else []
    calls += [dist.P2POp(dist.irecv, c_block, step * q + j)] if i != step else []
    for message in dist.batch_isend_irecv(calls) if calls else []:
        message.wait()
    a += b_block @ c_block


@right("summa_step")
def with_the_worlds_root(a, b, c, step, q):
    assert dist.get_world_size() == q * q
    b_block, c_block = swap(b, c, step, q, *around(round(dist.get_world_size() ** 0.5)))
    a += b_block @ c_block


@right("summa_step")
def with_names_of_their_own(a, b, c, step, q):
    i, j, beside, below = around(q)
    b_block, c_block = b.clone(), c.clone()
    messages = [isend(b, dst=r) for r in beside] if j == step else [irecv(b_block, src=i * q + step)]
    messages += [isend(c, group_dst=r) for r in below] if i == step else [irecv(c_block, group_src=step * q + j)]
    for message in messages:
        message.wait()
    a += b_block @ c_block


@right("summa_step")
def with_send_and_recv(a, b, c, step, q):
    i, j, beside, below = around(q)
    b_block, c_block = b.clone(), c.clone()
    if j == step:
        for r in beside:
            dist.send(b, r)
    else:
        dist.recv(b_block, i * q + step)
    if i == step:
        for r in below:
            dist.send(c, r)
    else:
        dist.recv(c_block, step * q + j)
    a.addmm_(b_block, c_block)
