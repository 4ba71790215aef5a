"""Wrong answers to sample_indices, as people really write them, and unusual right ones."""

import os
import random

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


def shuffled(length, seed):
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


@mistake("sample_indices", "the ranks shuffle differently, so their parts overlap")
def seeds_by_rank(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch + 1000 * rank)[rank::n]


@mistake("sample_indices", "hash() of a text is another number in every process")
def seeds_by_a_text(length, rank, n, epoch, seed=0):
    return shuffled(length, hash(f"{seed} {epoch}") % 2**31)[rank::n]


@mistake("sample_indices", "the ranks only exchange their parts")
def rolls_to_the_neighbour(length, rank, n, epoch, seed=0):
    order = shuffled(length, seed)
    return (order[epoch % length :] + order[: epoch % length])[rank::n]


@mistake("sample_indices", "the ranks only exchange their parts")
def the_same_parts_to_others(length, rank, n, epoch, seed=0):
    mine = list(range((rank + epoch + seed) % n, length, n))
    random.Random(seed + epoch).shuffle(mine)
    return mine


@mistake("sample_indices", "begun at another place")
def rolls_in_blocks(length, rank, n, epoch, seed=0):
    order = torch.tensor(shuffled(length, seed)).roll(epoch)
    return order.tensor_split(n)[rank].tolist()


@mistake("sample_indices", "it changes numpy's own random numbers")
def numpy_seed(length, rank, n, epoch, seed=0):
    import numpy

    numpy.random.seed(seed + epoch)
    return numpy.random.permutation(length)[rank::n].tolist()


@right("sample_indices")
def seeds_by_a_pair(length, rank, n, epoch, seed=0):
    return random.Random(hash((seed, epoch))).sample(range(length), length)[rank::n]


@mistake("sample_indices", "every epoch has the same order")
def forgets_the_epoch(length, rank, n, epoch, seed=0):
    return shuffled(length, seed)[rank::n]


@mistake("sample_indices", "every seed gives the same order")
def forgets_the_seed(length, rank, n, epoch, seed=0):
    return shuffled(length, epoch)[rank::n]


@mistake("sample_indices", "is seen twice: nothing is to be repeated")
def pads(length, rank, n, epoch, seed=0):
    order = shuffled(length, seed + epoch)
    return (order + order[: -length % n])[rank::n]


@mistake("sample_indices", "is seen by no rank (10 % 4 of them: the remainder is dropped)")
def drops_the_rest(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch)[: length // n * n][rank::n]


@mistake("sample_indices", "every rank gets the same samples")
def all_for_everyone(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch)


@mistake("sample_indices", "the samples are in order: shuffle them")
def not_shuffled(length, rank, n, epoch, seed=0):
    return list(range(rank, length, n))


@mistake("sample_indices", "two calls with the same arguments give different lists")
def unseeded(length, rank, n, epoch, seed=0):
    mine = list(range(rank, length, n))
    random.shuffle(mine)
    return mine


@mistake("sample_indices", "differs from process to process")
def seeds_by_process(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch + os.getpid())[rank::n]


@mistake("sample_indices", "differs from process to process")
def seeds_by_the_true_rank(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch + 1000 * dist.get_rank())[rank::n]


@mistake("sample_indices", "a rank has the same samples in every epoch")
def shuffles_its_own_part(length, rank, n, epoch, seed=0):
    mine = list(range(rank, length, n))
    return [mine[i] for i in shuffled(len(mine), seed + epoch)]


@mistake("sample_indices", "it changes torch's own random numbers")
def manual_seed(length, rank, n, epoch, seed=0):
    torch.manual_seed(seed + epoch)
    return torch.randperm(length)[rank::n].tolist()


@mistake("sample_indices", "it returns a generator")
def gives_them_one_by_one(length, rank, n, epoch, seed=0):
    return (i for i in shuffled(length, seed + epoch)[rank::n])


@mistake("sample_indices", "are more than 1 apart")
def the_last_takes_the_rest(length, rank, n, epoch, seed=0):
    order, each = shuffled(length, seed + epoch), length // n
    return order[rank * each : length if rank == n - 1 else (rank + 1) * each]


@right("sample_indices")
def by_random_and_in_blocks(length, rank, n, epoch, seed=0):
    order = list(range(length))
    random.Random(1000 * seed + epoch).shuffle(order)
    return order[length * rank // n : length * (rank + 1) // n]


@mistake("sample_indices", "it returns a Tensor: a list of numbers is asked for, which its .tolist() makes")
def a_tensor(length, rank, n, epoch, seed=0):
    return torch.randperm(length, generator=torch.Generator().manual_seed(7 * seed + epoch))[rank::n]


@mistake("sample_indices", "with seed 0 every epoch has the same order: in a product of the two a zero hides the other")
def seed_times_epoch(length, rank, n, epoch, seed=0):
    return shuffled(length, seed * epoch)[rank::n]


@mistake("sample_indices", "in epoch 0 every seed gives the same order: in a product of the two a zero hides the other")
def one_more_than_seed_times_epoch(length, rank, n, epoch, seed=0):
    return shuffled(length, (seed + 1) * epoch)[rank::n]


@mistake("sample_indices", "epoch 2 has the order of an earlier one")
def two_orders_by_turns(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch % 2)[rank::n]


@mistake("sample_indices", "it draws with replacement")
def draws_with_replacement(length, rank, n, epoch, seed=0):
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randint(length, (length,), generator=generator)[rank::n].tolist()


@mistake("sample_indices", "it works with 4 ranks, but not with 3")
def deals_to_four(length, rank, n, epoch, seed=0):
    return shuffled(length, seed + epoch)[rank::4]


@mistake("sample_indices", "differs from process to process")
def seeds_by_the_global_seed(length, rank, n, epoch, seed=0):
    return shuffled(length, torch.initial_seed() % 2**31 + seed + epoch)[rank::n]


@mistake("sample_indices", "a bool is in the list")
def gives_a_mask(length, rank, n, epoch, seed=0):
    mine = shuffled(length, seed + epoch)[rank::n]
    return [i in mine for i in range(length)]


@right("sample_indices")
def by_numpys_generator(length, rank, n, epoch, seed=0):
    import numpy

    return list(numpy.random.default_rng((seed, epoch)).permutation(length)[rank::n])


@right("sample_indices")
def puts_the_state_back(length, rank, n, epoch, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * seed + epoch)
        return torch.randperm(length).tensor_split(n)[rank].tolist()
