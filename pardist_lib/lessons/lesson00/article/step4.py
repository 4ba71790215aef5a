import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # ours: lets a group end before Python does
from torch import nn

WORLD_SIZE = int(os.environ["WORLD_SIZE"])


def set_up(rank):
    dist.init_process_group("gloo", init_method="env://")


def train(rank):
    set_up(rank)
    torch.manual_seed(rank)  # ours: every run prints the same numbers
    data = torch.Generator().manual_seed(rank)  # ours
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))
    for p in net.parameters():
        dist.broadcast(p.data, src=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for epoch in range(10):
        x = torch.randn(10, 10, generator=data)
        loss = nn.functional.mse_loss(net(x), x)
        optimizer.zero_grad()
        loss.backward()
        for p in net.parameters():
            dist.all_reduce(p.grad)
            p.grad /= WORLD_SIZE
        optimizer.step()
        print(f"rank {rank}, epoch {epoch}, loss {loss.item():.4f}")
    weights = sum(p.sum().item() for p in net.parameters())  # ours: to compare the ranks' networks
    print(f"rank {rank}, in a group: {dist.is_initialized()}, sum of its weights {weights:.4f}")  # ours
    dist.destroy_process_group()


if __name__ == "__main__":
    train(int(os.environ["RANK"]))
