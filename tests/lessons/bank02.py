"""Wrong answers to the exercises of lesson 02, as people really write them; and right ones of another kind."""

import torch
import torch.distributed as dist
from planted import mistake, right
from torch.distributed import irecv, isend

from pardist_lib.mechanisms import split_conv, split_matmul
from pardist_lib.mechanisms.autograd_collectives import gather_from_group


def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


# ---- column_split ---------------------------------------------------------------------------------------------


@mistake("column_split", "the parts stand below each other")
def joined_along_rows(b, c_columns):
    return torch.cat(gathered(b @ c_columns))


@mistake("column_split", "which scrambles them")
def viewed_as_a(b, c_columns):
    mine = b @ c_columns
    whole = mine.new_empty(dist.get_world_size() * mine.shape[0], mine.shape[1])
    dist.all_gather_into_tensor(whole, mine)
    return whole.view(mine.shape[0], -1)


@mistake("column_split", "its own columns only")
def not_gathered(b, c_columns):
    return b @ c_columns


@mistake("column_split", "the columns of C were gathered")
def gathers_the_operand(b, c_columns):
    return b @ torch.cat(gathered(c_columns), 1)


@mistake("column_split", "all_reduce over zeros")
def reduces_over_zeros(b, c_columns):
    mine, rank, n = b @ c_columns, dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(mine.shape[0], n * mine.shape[1], dtype=mine.dtype)
    whole[:, rank * mine.shape[1] : (rank + 1) * mine.shape[1]] = mine
    dist.all_reduce(whole)
    return whole


@mistake("column_split", "the parts are added up")
def sums_the_parts(b, c_columns):
    mine = b @ c_columns
    dist.all_reduce(mine)
    return mine.repeat(1, dist.get_world_size())


@mistake("column_split", "over and over")
def every_part_its_own(b, c_columns):
    mine = b @ c_columns
    gathered(mine)
    return torch.cat([mine] * dist.get_world_size(), 1)


@mistake("column_split", "all parts are one tensor")
def one_tensor_n_times(b, c_columns):
    mine = b @ c_columns
    parts = [torch.empty_like(mine)] * dist.get_world_size()
    dist.all_gather(parts, mine)
    return torch.cat(parts, 1)


@mistake("column_split", "in reverse order")
def last_rank_first(b, c_columns):
    return torch.cat(gathered(b @ c_columns)[::-1], 1)


@mistake("column_split", "own columns come first")
def own_first(b, c_columns):
    parts, rank = gathered(b @ c_columns), dist.get_rank()
    return torch.cat([parts[rank], *parts[:rank], *parts[rank + 1 :]], 1)


@mistake("column_split", "transposed")
def transposed(b, c_columns):
    return torch.cat(gathered((b @ c_columns).T.contiguous()))


@mistake("column_split", "A is float32, where float64 is asked for")
def always_float32(b, c_columns):
    return torch.cat(gathered((b @ c_columns).float()), 1)


@mistake("column_split", "not with 3 (is a 4 written into it?)")
def four_parts(b, c_columns):
    mine, n = b @ c_columns, dist.get_world_size()
    parts = [torch.zeros_like(mine) for _ in range(n)]
    dist.all_gather(parts, mine)
    return torch.cat([parts[i % n] for i in range(4)], 1)


@mistake("column_split", "A is None")
def on_rank_0_only(b, c_columns):
    mine = b @ c_columns
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(mine, parts, 0)
    if parts:
        return torch.cat(parts, 1)


@mistake("column_split", "only rank 0 has the whole A")
def gathered_on_rank_0(b, c_columns):
    mine, zero = b @ c_columns, dist.get_rank() == 0
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())] if zero else None
    dist.gather(mine, parts, 0)
    return torch.cat(parts, 1) if zero else mine


@mistake("column_split", "3 all_gather bring 192 bytes")
def row_by_row(b, c_columns):
    return torch.stack([torch.cat(gathered(row)) for row in b @ c_columns])


@mistake("column_split", "it calls the course's own")
def the_courses_own(b, c_columns):
    return split_matmul.matmul_by_columns(b, c_columns, gather=True)


@mistake("column_split", "it calls the course's own")
def the_courses_own_gather(b, c_columns):
    return gather_from_group(b @ c_columns, 1)


@mistake("column_split", "`b` was changed")
def scales_b_in_place(b, c_columns):
    b *= 2
    return torch.cat(gathered(b @ c_columns // 2 if not b.is_floating_point() else b @ c_columns / 2), 1)


@right("column_split")
def through_rows(b, c_columns):
    mine = (b @ c_columns).T.contiguous()
    whole = mine.new_empty(dist.get_world_size() * mine.shape[0], mine.shape[1])
    dist.all_gather_into_tensor(whole, mine)
    return whole.T.contiguous()


@right("column_split")
def into_views(b, c_columns):
    mine, n = b @ c_columns, dist.get_world_size()
    parts = list(mine.new_empty(n, *mine.shape).unbind())
    dist.all_gather(parts, mine)
    return torch.stack(parts, 1).flatten(1)


# ---- inner_split ----------------------------------------------------------------------------------------------


@mistake("inner_split", "put side by side")
def joined(b_columns, c_rows):
    return torch.cat(gathered(b_columns @ c_rows), 1)


@mistake("inner_split", "put side by side")
def stacked(b_columns, c_rows):
    return torch.stack(gathered(b_columns @ c_rows))


@mistake("inner_split", "each rank returns its own summand")
def not_summed(b_columns, c_rows):
    return b_columns @ c_rows


@mistake("inner_split", "each rank returns its own summand")
def sums_a_copy(b_columns, c_rows):
    a = b_columns @ c_rows
    dist.all_reduce(a.clone())
    return a


@mistake("inner_split", "the mean of the summands")
def averaged(b_columns, c_rows):
    a = b_columns @ c_rows
    dist.all_reduce(a)
    return a / dist.get_world_size()


@mistake("inner_split", "only rank 0 has the sum")
def reduced(b_columns, c_rows):
    a = b_columns @ c_rows
    kept = a.clone()
    dist.reduce(a, 0)
    return a if dist.get_rank() == 0 else kept


@mistake("inner_split", "the largest summand")
def by_max(b_columns, c_rows):
    a = b_columns @ c_rows
    dist.all_reduce(a, op=dist.ReduceOp.MAX)
    return a


@mistake("inner_split", "every summand goes to every rank")
def gathers_and_adds(b_columns, c_rows):
    return sum(gathered(b_columns @ c_rows))


@mistake("inner_split", "added up over the ranks before multiplying")
def sums_the_operands(b_columns, c_rows):
    b, c = b_columns.clone(), c_rows.clone()
    dist.all_reduce(b)
    dist.all_reduce(c)
    return b @ c


@mistake("inner_split", "transposed")
def the_other_way_round(b_columns, c_rows):
    a = c_rows.T @ b_columns.T
    dist.all_reduce(a)
    return a


@mistake("inner_split", "counts twice")
def adds_its_own_again(b_columns, c_rows):
    mine = b_columns @ c_rows
    total = mine.clone()
    dist.all_reduce(total)
    return total + mine


@mistake("inner_split", "the operands were gathered")
def gathers_equal_operands(b_columns, c_rows):
    return torch.cat(gathered(b_columns), 1) @ torch.cat(gathered(c_rows))


@mistake("inner_split", "2 calls")
def sums_twice(b_columns, c_rows):
    a = b_columns @ c_rows
    dist.all_reduce(a.clone())
    dist.all_reduce(a)
    return a


@mistake("inner_split", "handed over in 8 calls")
def row_after_row(b_columns, c_rows):
    a = b_columns @ c_rows
    for row in a:
        dist.all_reduce(row)
    return a


@mistake("inner_split", "only rank 0 has the sum")
def reduced_in_place(b_columns, c_rows):
    a = b_columns @ c_rows
    dist.reduce(a, 0)
    return a


@mistake("inner_split", "one whose share is 0 has to bring its zeros, too")
def zeros_of_the_usual_dtype(b_columns, c_rows):
    a = b_columns @ c_rows if b_columns.shape[1] else torch.zeros(len(b_columns), c_rows.shape[1])
    dist.all_reduce(a)
    return a


@mistake("inner_split", "A is float64, where float32 is asked for")
def always_double(b_columns, c_rows):
    a = b_columns.double() @ c_rows.double()
    dist.all_reduce(a)
    return a


@mistake("inner_split", "it calls the course's own")
def the_courses_inner(b_columns, c_rows):
    return split_matmul.matmul_by_inner(b_columns, c_rows, gather=True)


@right("inner_split")
def asynchronously(b_columns, c_rows):
    a = torch.mm(b_columns, c_rows)
    dist.all_reduce(a, async_op=True).wait()
    return a


@right("inner_split")
def as_outer_products(b_columns, c_rows):
    a = sum(
        (b_columns[:, [i]] * c_rows[i] for i in range(len(c_rows))),
        b_columns.new_zeros(len(b_columns), c_rows.shape[1]),
    )
    dist.all_reduce(a)
    return a


# ---- summa_step -----------------------------------------------------------------------------------------------


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


# ---- split_bytes ----------------------------------------------------------------------------------------------


def right_bytes(split, m, k, w, n, item=4):
    gather = (n - 1) / n * m * w * item
    q = round(n**0.5)
    moved = (q - 1) * (m * k + k * w) / n * item
    return {"inner": 2 * gather, "grid": moved + gather}.get(split, gather)


@mistake("split_bytes", "which sends twice what an all-gather does")
def inner_like_rows(split, m, k, w, n, item=4):
    return (n - 1) / n * m * w * item if split == "inner" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "ends with an all-gather of A, too")
def grid_without_gather(split, m, k, w, n, item=4):
    gather = (n - 1) / n * m * w * item
    return right_bytes(split, m, k, w, n, item) - (split == "grid") * gather


@mistake("split_bytes", "lacks the blocks of B and C that travel")
def grid_without_panels(split, m, k, w, n, item=4):
    return (n - 1) / n * m * w * item * (2 if split == "inner" else 1)


@mistake("split_bytes", "`item` tells")
def four_bytes(split, m, k, w, n, item=4):
    return right_bytes(split, m, k, w, n)


@mistake("split_bytes", "this counts numbers")
def counts_numbers(split, m, k, w, n, item=4):
    return right_bytes(split, m, k, w, n, 1)


@mistake("split_bytes", "what all ranks send together")
def everybody(split, m, k, w, n, item=4):
    return n * right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "not to n - 1")
def to_all_others(split, m, k, w, n, item=4):
    moved = (n - 1) * (m * k + k * w) / n * item
    return moved + (n - 1) / n * m * w * item if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "one n-th of B and of C")
def whole_operands(split, m, k, w, n, item=4):
    moved = (round(n**0.5) - 1) * (m * k + k * w) * item
    return moved + (n - 1) / n * m * w * item if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "B and C stay where they are")
def gathers_operands(split, m, k, w, n, item=4):
    of = {"rows": m * k, "columns": k * w}.get(split)
    return (n - 1) / n * of * item if of else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "what an all-reduce is given")
def given_to_the_all_reduce(split, m, k, w, n, item=4):
    return m * w * item if split == "inner" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "(n - 1)/n of it, not (q - 1)/q")
def gathers_along_a_row(split, m, k, w, n, item=4):
    q = round(n**0.5)
    moved = (q - 1) * (m * k + k * w) / n * item + (q - 1) / q * m * w * item
    return moved if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "the blocks of C travel, too")
def only_b_travels(split, m, k, w, n, item=4):
    less = (round(n**0.5) - 1) * k * w / n * item if split == "grid" else 0
    return right_bytes(split, m, k, w, n, item) - less


@mistake("split_bytes", "one, only where q is 2")
def to_one_other(split, m, k, w, n, item=4):
    once = (m * k + k * w) / n * item + (n - 1) / n * m * w * item
    return once if split == "grid" else right_bytes(split, m, k, w, n, item)


@mistake("split_bytes", "in one of the q steps")
def in_every_step(split, m, k, w, n, item=4):
    q = round(n**0.5)
    more = (q - 1) * (q - 1) * (m * k + k * w) / n * item if split == "grid" else 0
    return right_bytes(split, m, k, w, n, item) + more


@right("split_bytes")
def in_whole_numbers(split, m, k, w, n, item=4):
    q = int(n**0.5)
    gather = m * w * item * (n - 1) / n
    if split in ("rows", "columns"):
        return gather
    return 2 * gather if split == "inner" else item * k * (m + w) * (q - 1) / n + gather


# ---- halo_exchange --------------------------------------------------------------------------------------------


def meet(rows, halo, above, below, up, down):
    """Send `up` to rank - 1 and `down` to rank + 1, and receive theirs into `above` and `below`."""
    rank, n = dist.get_rank(), dist.get_world_size()
    messages = []
    if rank > 0:
        messages += [dist.isend(up.contiguous(), rank - 1), dist.irecv(above, rank - 1)]
    if rank < n - 1:
        messages += [dist.isend(down.contiguous(), rank + 1), dist.irecv(below, rank + 1)]
    for message in messages:
        message.wait()


def empty_halo(rows, halo):
    return rows.new_zeros(*rows.shape[:2], halo, rows.shape[3]), rows.new_zeros(*rows.shape[:2], halo, rows.shape[3])


def edges(rows, halo):
    return rows[:, :, :halo], rows[:, :, rows.shape[2] - halo :]


@mistake("halo_exchange", "the image is closed to a ring")
def closed_to_a_ring(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    first, last = (e.contiguous() for e in edges(rows, halo))
    messages = [dist.isend(first, (rank - 1) % n), dist.isend(last, (rank + 1) % n)]
    messages += [dist.irecv(below, (rank + 1) % n), dist.irecv(above, (rank - 1) % n)]
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the neighbours' far rows arrived")
def sends_the_far_rows(rows, halo):
    above, below = empty_halo(rows, halo)
    first, last = edges(rows, halo)
    meet(rows, halo, above, below, last, first)
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "above and below are swapped")
def swapped(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, *edges(rows, halo))
    return torch.cat([below, rows, above], 2)


@mistake("halo_exchange", "the rows of zeros are missing")
def nothing_at_the_ends(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, *edges(rows, halo))
    rank, n = dist.get_rank(), dist.get_world_size()
    return torch.cat([above] * (rank > 0) + [rows] + [below] * (rank < n - 1), 2)


@mistake("halo_exchange", "repeated where the image ends")
def repeats_the_border(rows, halo):
    above, below = (e.contiguous().clone() for e in edges(rows, halo))
    meet(rows, halo, above, below, *edges(rows, halo))
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the rank's own rows are repeated")
def its_own_rows(rows, halo):
    first, last = edges(rows, halo)
    return torch.cat([first, rows, last], 2)


@mistake("halo_exchange", "it works for halo = 1, but not for halo = 2")
def one_row(rows, halo):
    above, below = empty_halo(rows, 1)
    meet(rows, 1, above, below, *edges(rows, 1))
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "it does not work for halo = 0")
def counts_from_the_end(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, rows[:, :, :halo], rows[:, :, -halo:])
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the message is float64, the tensor float32")
def in_double(rows, halo):
    shape = (*rows.shape[:2], halo, rows.shape[3])
    rank, n, above, below = (
        dist.get_rank(),
        dist.get_world_size(),
        torch.zeros(shape).double(),
        torch.zeros(shape).double(),
    )
    messages = []
    for peer, sent, received in (
        (rank - 1, rows[:, :, :halo], above),
        (rank + 1, rows[:, :, rows.shape[2] - halo :], below),
    ):
        if halo and 0 <= peer < n:
            messages += [isend(sent.double().contiguous(), peer), irecv(received, peer)]
    for message in messages:
        message.wait()
    return torch.cat([above.to(rows.dtype), rows, below.to(rows.dtype)], 2)


@mistake("halo_exchange", "with one neighbour only")
def in_pairs(rows, halo):
    above, below = (rows.new_zeros(*rows.shape[:2], halo, rows.shape[3]) for _ in range(2))
    rank, other = dist.get_rank(), dist.get_rank() ^ 1
    if halo and other < dist.get_world_size():
        mine = rows[:, :, :halo] if rank % 2 else rows[:, :, -halo:]
        message = isend(mine.contiguous(), other)
        dist.recv(above if rank % 2 else below, other)
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "all its rows are sent")
def sends_everything(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    sizes = torch.tensor([rows.shape[2]])
    heights, messages, theirs = {}, [], {}
    for other in (rank - 1, rank + 1):
        if 0 <= other < n:
            heights[other] = torch.empty_like(sizes)
            messages += [dist.isend(sizes, other), dist.irecv(heights[other], other)]
    for message in messages:
        message.wait()
    messages = []
    for other, height in heights.items():
        theirs[other] = rows.new_empty(*rows.shape[:2], int(height), rows.shape[3])
        messages += [dist.isend(rows, other), dist.irecv(theirs[other], other)]
    for message in messages:
        message.wait()
    above, below = empty_halo(rows, halo)
    if rank > 0:
        above = edges(theirs[rank - 1], halo)[1]
    if rank < n - 1:
        below = edges(theirs[rank + 1], halo)[0]
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "every rank is in send")
def all_send_first(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    first, last = (e.contiguous() for e in edges(rows, halo))
    dist.send(last, (rank + 1) % n)
    dist.send(first, (rank - 1) % n)
    dist.recv(above, (rank - 1) % n)
    dist.recv(below, (rank + 1) % n)
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "contiguous")
def views_are_sent(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    first, last = edges(rows, halo)
    messages = []
    if rank > 0:
        messages += [dist.isend(first, rank - 1), dist.irecv(above, rank - 1)]
    if rank < n - 1:
        messages += [dist.isend(last, rank + 1), dist.irecv(below, rank + 1)]
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "the halo is zero: it was never received")
def padded_only(rows, halo):
    return torch.nn.functional.pad(rows, (0, 0, halo, halo))


@mistake("halo_exchange", "the halo is at the left and the right")
def wrong_dimension(rows, halo):
    return torch.nn.functional.pad(rows, (halo, halo))


@mistake("halo_exchange", "only the halo above arrived")
def only_downwards(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    above, below = empty_halo(rows, halo)
    messages = [dist.isend(edges(rows, halo)[1].contiguous(), rank + 1)] if rank < n - 1 else []
    messages += [dist.irecv(above, rank - 1)] if rank > 0 else []
    for message in messages:
        message.wait()
    return torch.cat([above, rows, below], 2)


@mistake("halo_exchange", "it works for float64, but not for float32")
def double_zeros(rows, halo):
    above, below = (torch.zeros(*rows.shape[:2], halo, rows.shape[3], dtype=torch.float64) for _ in range(2))
    first, last = (e.double() for e in edges(rows, halo))
    meet(rows, halo, above, below, first, last)
    return torch.cat([above, rows.double(), below], 2)


@mistake("halo_exchange", "`rows` was changed")
def accumulates(rows, halo):
    above, below = empty_halo(rows, halo)
    meet(rows, halo, above, below, *edges(rows, halo))
    out = torch.cat([above, rows, below], 2)
    rows.zero_()
    return out


@mistake("halo_exchange", "it calls the course's own")
def the_courses_halo(rows, halo):
    heights = [rows.shape[2]] * dist.get_world_size()
    split_conv.halo_plan(heights, 2 * halo + 1, padding=halo)
    return rows


@right("halo_exchange")
def down_then_up(rows, halo):
    rank, n = dist.get_rank(), dist.get_world_size()
    out = torch.nn.functional.pad(rows, (0, 0, halo, halo))
    end = rows.shape[2]
    for step, mine, at in (
        (1, rows[:, :, end - halo :], slice(0, halo)),
        (-1, rows[:, :, :halo], slice(end + halo, None)),
    ):
        to, source = rank + step, rank - step
        message = dist.isend(mine.contiguous(), to) if 0 <= to < n else None
        if 0 <= source < n:
            arrived = torch.empty_like(mine, memory_format=torch.contiguous_format)
            dist.recv(arrived, source)
            out[:, :, at] = arrived
        if message:
            message.wait()
    return out
