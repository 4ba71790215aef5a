import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # ours: lets a group end before Python does
import torch.multiprocessing as mp
from torch import nn

WORLD_SIZE = 4


def set_up(rank):
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(20000 + os.getppid() % 10000)  # alike on all ranks
    dist.init_process_group("nccl", init_method="env://", rank=rank, world_size=WORLD_SIZE)
    dist.barrier()  # ours: rank 0 keeps the address book; it must not end before all have met


def train(rank):
    torch.manual_seed(rank)  # ours: every run prints the same numbers
    data = torch.Generator().manual_seed(rank)  # ours
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for epoch in range(10):
        x = torch.randn(10, 10, generator=data)
        loss = nn.functional.mse_loss(net(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank}, epoch {epoch}, loss {loss.item():.4f}")
    weights = sum(p.sum().item() for p in net.parameters())  # ours: to compare the ranks' networks
    print(f"rank {rank}, in a group: {dist.is_initialized()}, sum of its weights {weights:.4f}")  # ours


if __name__ == "__main__":
    mp.spawn(set_up, nprocs=WORLD_SIZE)
    mp.spawn(train, nprocs=WORLD_SIZE)
