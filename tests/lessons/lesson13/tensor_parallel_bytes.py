"""Answers to tensor_parallel_bytes: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("tensor_parallel_bytes", "this is forward alone")
def forward_alone(batch, sequence, hidden, n, element=2, recompute=False):
    return (2 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "this is two in all")
def one_each_way(batch, sequence, hidden, n, element=2, recompute=False):
    return 2 * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "this is what is given to the all-reduces")
def payload(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "this is half of it")
def half_a_ring_of_it(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "for all ranks together")
def the_whole_group(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) * batch * sequence * hidden * element / n * n


@mistake("tensor_parallel_bytes", "is not divided by n")
def split_activations(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden / n * element


@mistake("tensor_parallel_bytes", "element is not used")
def always_two_bytes(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden * 2


@mistake("tensor_parallel_bytes", "these are numbers, not bytes")
def numbers_of_it(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden


@mistake("tensor_parallel_bytes", "recompute is not used")
def forgets_to_recompute(batch, sequence, hidden, n, element=2, recompute=False):
    return 4 * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "not all four")
def everything_again(batch, sequence, hidden, n, element=2, recompute=False):
    return (8 if recompute else 4) * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "rounded to whole numbers")
def whole_parts(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) * (batch * sequence * hidden // n) * element


@mistake("tensor_parallel_bytes", "rounded to whole numbers")
def padded_parts(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) * -(-batch * sequence * hidden // n) * element


@mistake("tensor_parallel_bytes", "rounded to whole numbers")
def whole_bytes(batch, sequence, hidden, n, element=2, recompute=False):
    return int((4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden * element)


@right("tensor_parallel_bytes")
def call_by_call(batch, sequence, hidden, n, element=2, recompute=False):
    calls = ["attention", "mlp"] * (3 if recompute else 2)
    chunk = batch * sequence * hidden * element / n
    return sum(chunk for _ in calls for _ in range(2 * (n - 1)))
