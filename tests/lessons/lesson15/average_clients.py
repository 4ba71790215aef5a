"""Answers to average_clients: wrong ones as people write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


def summed(value, group=None):
    value = torch.tensor([float(value)], dtype=torch.float64)
    dist.all_reduce(value, group=group)
    return value.item()


@mistake("average_clients", "a mean of means: it averages the ranks' means")
def mean_of_means(updates, rows, group=None):
    mean = sum(rows[c] * u for c, u in updates.items()) / sum(rows.values())
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)


@mistake("average_clients", "a mean of means, twice")
def plain_mean_of_plain_means(updates, rows, group=None):
    mean = torch.stack(list(updates.values())).mean(0)
    dist.all_reduce(mean, group=group)
    return mean / dist.get_world_size(group)


@mistake("average_clients", "every client counts the same")
def all_clients_alike(updates, rows, group=None):
    total, many = sum(updates.values()), summed(len(updates), group)
    dist.all_reduce(total, group=group)
    return total / many


@mistake("average_clients", "multiplied by the rows and never divided")
def never_divides(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    dist.all_reduce(total, group=group)
    return total


@mistake("average_clients", "divided by this rank's rows only")
def divides_by_its_own_rows(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    dist.all_reduce(total, group=group)
    return total / sum(rows.values())


@mistake("average_clients", "divided by the 4 ranks, not by all")
def divides_by_ranks(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


@mistake("average_clients", "within a rank every client counts the same")
def weights_ranks_only(updates, rows, group=None):
    mine = sum(rows.values())
    total = mine * torch.stack(list(updates.values())).mean(0)
    dist.all_reduce(total, group=group)
    return total / summed(mine, group)


@mistake("average_clients", "nothing was exchanged")
def stays_alone(updates, rows, group=None):
    return sum(rows[c] * u for c, u in updates.items()) / sum(rows.values())


@mistake("average_clients", "the group argument is ignored: this is the mean over all ranks' clients")
def forgets_the_group(updates, rows, group=None):
    total, many = sum(rows[c] * u for c, u in updates.items()), summed(sum(rows.values()))
    dist.all_reduce(total)
    return total / many


@mistake("average_clients", "the group argument is ignored where the rows are added up")
def forgets_the_group_once(updates, rows, group=None):
    total, many = sum(rows[c] * u for c, u in updates.items()), summed(sum(rows.values()))
    dist.all_reduce(total, group=group)
    return total / many


@mistake("average_clients", "the ranks do not make the same calls")
def one_call_for_each_client(updates, rows, group=None):
    total = 0
    for c, u in updates.items():
        part = rows[c] * u
        dist.all_reduce(part, group=group)
        total = total + part
    return total / summed(sum(rows.values()), group)


@mistake("average_clients", "updates or rows have changed")
def writes_into_the_updates(updates, rows, group=None):
    for c, u in updates.items():
        u *= rows[c]
    total, many = sum(updates.values()), summed(sum(rows.values()), group)
    dist.all_reduce(total, group=group)
    return total / many


@mistake("average_clients", "it calls all_gather")
def gathers(updates, rows, group=None):
    mean = sum(rows[c] * u for c, u in updates.items())
    everyone = [torch.empty_like(mean) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mean, group=group)
    return sum(everyone) / summed(sum(rows.values()), group)


@mistake("average_clients", "paired by their order")
def pairs_by_order(updates, rows, group=None):
    total = sum(r * u for r, u in zip(rows.values(), updates.values(), strict=True))
    dist.all_reduce(total, group=group)
    return total / summed(sum(rows.values()), group)


@right("average_clients")
def one_message(updates, rows, group=None):
    total = sum(rows[c] * u for c, u in updates.items())
    line = torch.cat([total, total.new_tensor([float(sum(rows.values()))])])
    dist.all_reduce(line, group=group)
    return line[:-1] / line[-1]


@right("average_clients")
def shares_of_all_rows(updates, rows, group=None):
    many = summed(sum(rows.values()), group)
    mean = torch.stack([u * (rows[c] / many) for c, u in updates.items()]).sum(0)
    dist.all_reduce(mean, group=group)
    return mean
