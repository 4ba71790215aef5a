"""Wrong answers to column_split, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from pardist_lib.mechanisms.collectives.autograd import gather_from_group
from pardist_lib.mechanisms.tensor_parallel import split_matmul
from tests.lessons.lesson02.shared import gathered
from tests.lessons.planted import mistake, right


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
