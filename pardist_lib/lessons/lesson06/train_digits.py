"""A whole data-parallel program: torchrun --nproc-per-node 4 train_digits.py (and --nnodes for several machines)"""

import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # lets the group end before Python does: imported later, it would hold it
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from pardist_lib.lessons.data import digits
from pardist_lib.lessons.models import DigitsMLP
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.data_parallel.samplers import ExactDistributedSampler


def main(epochs=6, batch=32):
    local, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    a_gpu_each = torch.cuda.device_count() >= here
    device = torch.device(f"cuda:{local}" if a_gpu_each else "cpu")
    if a_gpu_each:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if a_gpu_each else "gloo")

    data = digits()
    train = TensorDataset(data.train_x, data.train_y)
    sampler = ExactDistributedSampler(train)  # every sample once, whatever the number of ranks
    loader = DataLoader(train, batch, sampler=sampler)
    model = DataParallel(DigitsMLP().to(device))  # rank 0's weights, on every rank
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for (x, y), weight in model.join(loader):  # as many steps on every rank
            loss = weight * cross_entropy(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()  # the mean over all ranks' rows, when it returns
            optimizer.step()

    with torch.no_grad():
        guesses = model(data.test_x.to(device)).argmax(1).cpu()
    right = (guesses == data.test_y).float().mean().item()
    print(f"{dist.get_world_size()} ranks: more than 90 % of unseen digits right after {epochs} epochs: {right > 0.9}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
