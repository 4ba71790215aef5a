"""What one training step of a small GPT sends, within a node and across two: run by two torchrun agents.

Four ways to use four ranks on two nodes of two; each rank counts the payload of its collectives by whether their group
lies within its node. Prints one line of JSON a rank.

    torchrun --nnodes=2 --nproc-per-node=2 … -m pardist_lib.lessons.lesson04.two_nodes    once on each node
"""

import json
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # lets the group end before Python does: imported later, it would hold it
from torch.nn import functional as F

from pardist_lib.lessons.transformer import GPT, TENSOR_PARALLEL
from pardist_lib.measure.trace import Trace, record
from pardist_lib.mechanisms.tensor_parallel import parallelize, vocab_parallel_cross_entropy

# way: (ranks that split each layer, ranks that split the batch), as lists of groups
WAYS = {
    "tensor 4": ([[0, 1, 2, 3]], [[0], [1], [2], [3]]),
    "data 4": ([[0], [1], [2], [3]], [[0, 1, 2, 3]]),
    "tensor 2 in a node, data 2 across": ([[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    "data 2 in a node, tensor 2 across": ([[0, 2], [1, 3]], [[0, 1], [2, 3]]),
}


def step(model, words, tensor, data):
    """Forward, backward, and the mean of the gradients over the ranks that split the batch; returns the loss."""
    mine = words.chunk(dist.get_world_size(data))[dist.get_rank(data)]
    loss = vocab_parallel_cross_entropy(model(mine[:, :-1]), mine[:, 1:], tensor, vocab_size=96)
    loss.backward()
    if dist.get_world_size(data) > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad, dist.ReduceOp.AVG, group=data)
        dist.all_reduce(loss := loss.detach(), dist.ReduceOp.AVG, group=data)
    return loss.item()


def whole(words, **sizes):
    """The loss that one process finds."""
    torch.manual_seed(0)
    logits = GPT(**sizes)(words[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten()).item()


def measure(ways, words, node_of, **sizes):
    """{way: [loss, bytes of collectives within this rank's node, bytes of those across, how many those are]}"""
    prepared, found = {}, {}
    for way, splits in ways.items():
        groups = [[dist.new_group(ranks) for ranks in split] for split in splits]
        tensor, data = (next(g for g in split if dist.get_rank(g) >= 0) for split in groups)
        torch.manual_seed(0)
        prepared[way] = parallelize(GPT(**sizes), TENSOR_PARALLEL, tensor), words, tensor, data
    for way, call in prepared.items():
        loss, recorded = record(step, *call)
        calls = Trace([(loss, recorded)]).collectives
        across = [e.bytes for e in calls if len({node_of(rank) for rank in e.group}) > 1]
        found[way] = [loss, sum(e.bytes for e in calls) - sum(across), sum(across), len(across)]
    return found


def main():
    dist.init_process_group("gloo")
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    words = torch.randint(96, (8, 65), generator=torch.Generator().manual_seed(0))
    found = measure(WAYS, words, lambda rank: rank // per_node)
    print(json.dumps({"rank": dist.get_rank(), "node": int(os.environ["GROUP_RANK"]), "found": found}), flush=True)
    dist.destroy_process_group()


def run_on_two_nodes(module=__name__, timeout=90):
    """Start two agents of two ranks each on this machine, as two hosts would; returns one dict a rank, in rank order.

    The agents meet through a file, the ranks through this machine's loopback: nothing needs to be root, nothing is
    open to the network.
    """
    import tempfile
    from concurrent.futures import ThreadPoolExecutor

    from pardist_lib.ranks import torchrun

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as agents:
        options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/meet", "--rdzv-id=two-nodes"]
        options += ["--rdzv-conf=store_type=file", "--local-addr=127.0.0.1"]
        start = {"nproc": 2, "options": options, "quiet": True, "timeout": timeout}
        runs = [agents.submit(torchrun, module, **start) for _ in range(2)]
        lines = [text for run in runs for text in run.result()]
    return sorted((json.loads(text.splitlines()[-1]) for text in lines), key=lambda found: found["rank"])


if __name__ == "__main__":
    main()
