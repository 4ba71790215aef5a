"""Wrong answers to inner_split, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from pardist_lib.mechanisms.tensor_parallel import split_matmul
from tests.lessons.lesson02.shared import gathered
from tests.lessons.planted import mistake, right


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
