"""A whole data-parallel program in plain PyTorch; nothing in it is the course's.

torchrun --nproc-per-node 4 train_digits.py           four ranks here
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint=HOST:29500 --rdzv-backend=c10d train_digits.py    on each of two
"""

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main(epochs=12, batch=32, wrap=DistributedDataParallel):
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    a_gpu_each = torch.cuda.device_count() >= here
    device = torch.device(f"cuda:{local}" if a_gpu_each else "cpu")
    if a_gpu_each:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if a_gpu_each else "gloo")

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    train, (test_x, test_y) = TensorDataset(x[:1440], y[:1440]), (x[1440:], y[1440:])
    sampler = DistributedSampler(train, drop_last=True)  # equal shares: they need no weights, and nobody runs out
    loader = DataLoader(train, batch, sampler=sampler)
    model = wrap(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)  # another shuffle, the same on all ranks
        for x, y in loader:
            loss = cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()  # the mean over all ranks' rows, when it returns
            optimizer.step()

    with torch.no_grad():
        guesses = model.module(test_x.to(device)).argmax(1).cpu()
    right = (guesses == test_y).float().mean().item()
    if dist.get_rank() == 0:
        n, enough = dist.get_world_size(), "more" if right > 0.85 else "not more"
        print(f"{n} ranks, {epochs} epochs: {enough} than 85 % of unseen digits right")
    del model  # before its group: torch's wrapper would end the group's thread while that still wants Python's lock
    dist.destroy_process_group()
    return right


if __name__ == "__main__":
    main()
