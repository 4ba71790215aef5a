"""What private training refuses, because a sum would be wrong, or would give somebody's data away."""

import math

import torch
import torch.distributed as dist

from ..group import rank_and_size

# ---- whose data is where --------------------------------------------------------------------------------------


def check_round(clients, chosen, group):
    """Raise ValueError where a chosen client has no data, or not every chosen client is on exactly one rank.

    clients: {client: (x, y)} of this rank. All-reduces 4 bytes for each chosen client.
    """
    rank_and_size(group)
    for client in [c for c in chosen if c in clients]:
        x, y = clients[client]
        if not len(x):
            raise ValueError(f"client {client} has no data: leave it out of the round")
        if len(x) != len(y):
            raise ValueError(f"client {client} has {len(x)} rows and {len(y)} labels")
    if not chosen or len(set(chosen)) != len(chosen):
        raise ValueError(f"a round needs different clients, at least one, not {list(chosen)}")
    hosts = torch.tensor([c in clients for c in chosen], dtype=torch.int32)
    dist.all_reduce(hosts, group=group)
    check_one_host(dict(zip(chosen, hosts.tolist(), strict=True)))


def check_one_host(hosts):
    """Raise ValueError for a client that counted twice or not at all. hosts: {client: how many ranks have it}."""
    for client, many in hosts.items():
        if many != 1:
            raise ValueError(f"client {client} is on {many} ranks: each is hosted by exactly one")


# ---- numbers of differential privacy --------------------------------------------------------------------------


def check_rate(rate):
    if not 0 < rate <= 1:
        raise ValueError(f"rate is the probability with which a row takes part, above 0 and at most 1, not {rate}")


def check_sigma(sigma):
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is the noise's standard deviation in units of clip, above 0, not {sigma}")


def check_rows_apart(model):
    """Raise ValueError for a model that mixes the rows of a batch, or has nothing to train."""
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a {type(part).__name__}: it mixes the rows of a batch, so that no row has a "
                "gradient of its own. Use GroupNorm or LayerNorm"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter requires a gradient: there is nothing to train")


# ---- secure aggregation ---------------------------------------------------------------------------------------


class TooFewClients(RuntimeError):
    """So many clients fell silent that the sum cannot be unmasked. It is lost; nobody's vector is revealed."""


def check_threshold(clients, threshold):
    """Raise ValueError where so many clients, with this threshold, could not hide anything."""
    if clients < 3:
        raise ValueError(
            f"{clients} clients: from the sum of two each could work out the other's vector; have 3 or more"
        )
    if threshold != int(threshold) or not clients / 2 < threshold <= clients:
        raise ValueError(
            f"a threshold of {threshold} for {clients} clients: it has to be more than half of them, "
            f"{clients // 2 + 1} to {clients}, or the server could ask two halves for the two secrets of one client"
        )


def check_enough(here, of, threshold, did):
    """Raise TooFewClients, with names, where fewer than `threshold` of the clients `of` did their part."""
    if len(here) < threshold:
        gone = sorted(set(of) - set(here))
        raise TooFewClients(
            f"{len(here)} clients {did} ({', '.join(map(str, sorted(here))) or 'none'}), {threshold} are needed; gone: "
            f"{', '.join(map(str, gone))}. The sum is lost, and nobody's vector is revealed"
        )


def check_names(vectors, silent, clients, messages):
    """Raise ValueError for a client, or a message, that there is not. The arguments are those of `secure_sum`."""
    if unknown := sorted(c for c in [*vectors, *silent] if not 0 <= c < clients):
        raise ValueError(f"there is no client {unknown[0]}: they are numbered 0 to {clients - 1}")
    if wrong := set(silent.values()) - set(messages):
        raise ValueError(f"silent says from which message on: one of {', '.join(messages)}, not {sorted(wrong)[0]!r}")


def check_same_length(vectors, group):
    """How many numbers a vector has. Raise ValueError where that differs. All-reduces 16 bytes."""
    sizes = {v.numel() for v in vectors.values()}
    extremes = torch.tensor([max(sizes, default=0), max((-s for s in sizes), default=-(2**62))])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    if extremes[0] != -extremes[1]:
        raise ValueError(f"vectors of {-extremes[1]} and of {extremes[0]} numbers cannot be added up")
    return int(extremes[0])
