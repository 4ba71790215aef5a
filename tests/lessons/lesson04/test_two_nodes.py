"""One step of the GPT on two nodes: the loss of one process, and what crosses between them."""

import torch

from pardist_lib.lessons.lesson04 import two_nodes
from pardist_lib.lessons.transformer import GPT


def test_two_torchrun_agents_take_the_step_of_one_process_and_count_what_crosses(ranks_of):
    words = torch.randint(96, (8, 65), generator=torch.Generator().manual_seed(0))
    want, found = two_nodes.whole(words), two_nodes.run_on_two_nodes(timeout=200)
    assert [(one["rank"], one["node"]) for one in found] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    parameters, activations = sum(p.numel() for p in GPT().parameters()) * 4, 8 * 64 * 64 * 4
    for one in found:
        ways = one["found"]
        assert all(abs(loss - want) < 1e-5 for loss, *_ in ways.values())
        assert ways["tensor 4"][1:] == [0, 10 * activations + 3 * 4 * 512, 13]
        assert ways["data 4"][1:] == [0, parameters + 4, 29]
        inside, across = ways["tensor 2 in a node, data 2 across"][1:3]
        assert inside == 5 * activations + 3 * 4 * 256 and across < parameters
        assert ways["data 2 in a node, tensor 2 across"][1:3] == [across, inside]
