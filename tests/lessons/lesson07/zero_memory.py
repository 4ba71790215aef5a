"""Wrong answers to zero_memory, as people really write them, and unusual right ones."""

import math

import torch

from tests.lessons.planted import mistake, right


def bytes_of(psi, n, stage, p=4, g=4, s=8):
    return psi * (p / (n if stage > 2 else 1) + g / (n if stage > 1 else 1) + s / (n if stage > 0 else 1))


@mistake("zero_memory", "the bytes of each kind are ignored")
def always_sixteen(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage)


@mistake("zero_memory", "stage 0 shards nothing")
def one_stage_ahead(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage + 1, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "stage 1 shards the optimizer's state")
def one_stage_behind(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage - 1, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "each stage shards only its own kind here")
def only_its_own(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    if stage:
        kinds[stage - 1] /= n
    return parameters * sum(kinds)


@mistake("zero_memory", "this is for all ranks together: one rank is asked for")
def the_whole_cluster(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return n * bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "at every stage everything is divided by n")
def all_divided(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return parameters * (parameter_bytes + gradient_bytes + state_bytes) / n


@mistake("zero_memory", "this is in GB: bytes are asked for")
def in_gigabytes(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes) / 1e9


@mistake("zero_memory", "first the optimizer's state is sharded, the parameters last")
def parameters_first(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, state_bytes, gradient_bytes, parameter_bytes)


@mistake("zero_memory", "the order is wrong: stage 2 shards the gradients, and only stage 3 the parameters")
def gradients_last(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, gradient_bytes, parameter_bytes, state_bytes)


@mistake("zero_memory", "state_bytes is not used")
def two_numbers_of_state(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, 2 * parameter_bytes)


@mistake("zero_memory", "n-ths are rounded down here: divide with /, not with //")
def rounded_down(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    return sum(parameters * b // (n if stage > i else 1) for i, b in enumerate(kinds))


@right("zero_memory")
def with_a_list(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    return sum(parameters * b / n for b in kinds[:stage]) + sum(parameters * b for b in kinds[stage:])


@mistake("zero_memory", "state_bytes is not used: 8 is only its default")
def always_adam(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, 8)


@mistake("zero_memory", "stage 2 does no more than stage 1 here")
def stage_1_for_2(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, 1 if stage == 2 else stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "stage 2 does what stage 3 does here: it leaves the parameters whole")
def stage_3_for_2(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, 3 if stage == 2 else stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "n is not used: this is for 4 ranks")
def memory_on_four(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, 4, stage, parameter_bytes, gradient_bytes, state_bytes)


@mistake("zero_memory", "n-ths are rounded up here: divide with /, and round nothing")
def whole_elements(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = [state_bytes, gradient_bytes, parameter_bytes]
    return sum(b * (math.ceil(parameters / n) if stage > i else parameters) for i, b in enumerate(kinds))


@mistake("zero_memory", "at stage 3 the gathered parameters are counted")
def counts_what_is_gathered(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    held = bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes)
    return held + parameters * parameter_bytes * (stage == 3)


@mistake("zero_memory", "this is in MiB: bytes are asked for")
def in_mebibytes(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    return bytes_of(parameters, n, stage, parameter_bytes, gradient_bytes, state_bytes) / 2**20


@right("zero_memory")
def whole_and_dealt_out(parameters, n, stage, parameter_bytes=4, gradient_bytes=4, state_bytes=8):
    kinds = torch.tensor([parameter_bytes, gradient_bytes, state_bytes], dtype=torch.float64)
    return parameters * (kinds[: 3 - stage].sum() + kinds[3 - stage :].sum() / n)
