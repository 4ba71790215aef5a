"""A room of mechanisms, copied out of the library into a reader's own torchrun script, trains as one process does.

What is taken along is `group.py`, `collectives/` and the room, as a package of another name beside the script; nothing
else of the course can be imported there. `python -m tests.test_lifting` prints what that weighs.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.test_project import MECHANISMS, file_of, imports

GROUND = ("group.py", "collectives")
TAKEN = {  # room: what it needs besides the ground
    "data_parallel": ("data_parallel",),
    "sharded": ("sharded",),
    "tensor_parallel": ("tensor_parallel",),
    "parameter_server": ("parameter_server",),
    "private": ("private", "averaging.py"),
    "averaging": ("averaging.py",),
    "mixed_precision": ("mixed_precision.py",),
    "uneven": ("uneven.py",),
    "compression": ("compression.py", "data_parallel"),
}

BEGIN = """
import json
import sys

for name in ("pardist_lib", "matplotlib", "IPython", "ipywidgets", "tests"):
    sys.modules[name] = None  # importing it fails

import torch
import torch.distributed as dist
from torch import nn


def net():
    torch.manual_seed(dist.get_rank())  # the first rank's counts
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def alone(steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum), []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(model, optimizer, x, y, after_backward=lambda: None, of_all=True):
    losses = []
    for _ in range(3):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        after_backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    losses = torch.stack(losses)
    if of_all:
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return losses.tolist()


dist.init_process_group("gloo")
rank, n = dist.get_rank(), dist.get_world_size()
torch.manual_seed(1)
x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
my_x, my_y = x.chunk(n)[rank], y.chunk(n)[rank]
momentum = 0.9
"""

END = """
if rank == 0:
    print(json.dumps([alone(), together]))
dist.destroy_process_group()
"""

SCRIPTS = {
    "data_parallel": """
from mine.data_parallel import DataParallel

model = DataParallel(net())
together = [train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), my_x, my_y)]
""",
    "sharded": """
from mine.sharded import ShardedDataParallel, ShardedOptimizer

model = net()
optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
together = [train(model, optimizer, my_x, my_y)]
for stage in (2, 3):
    model = ShardedDataParallel(net(), stage=stage)
    together += [train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), my_x, my_y)]
""",
    "tensor_parallel": """
from mine.tensor_parallel import ParallelMLP, parallelize

models = [parallelize(net(), {"0": "column", "2": "row"}), ParallelMLP.from_module(net())]
together = [train(m, torch.optim.SGD(m.parameters(), 0.1, momentum=0.9), x, y, of_all=False) for m in models]
""",
    "parameter_server": """
from mine.parameter_server import ParameterServer

model, losses = net(), []
with ParameterServer(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)) as ps:
    if ps.serving:
        ps.serve()
    for _ in range(0 if ps.serving else 3):
        model.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        ps.step(rows=len(x))
together = [None] * n
dist.all_gather_object(together, losses)
together = together[1:]
""",
    "private": """
from mine.private import federated_round, train_locally

torch.manual_seed(0)
model, losses = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double(), []
loss, momentum = nn.functional.mse_loss, 0.0  # of clients that make one step on all their rows the mean is one step
for _ in range(3):
    losses.append(loss(model(x), y).item())
    clients = {rank: (my_x, my_y)}
    federated_round(model, clients, [0, 1], lambda m, x, y, client: train_locally(m, loss, x, y, lr=0.1))
together = [losses]
""",
    "averaging": """
from mine.averaging import LocalSGD

model, momentum = net(), 0.0
optimizer = LocalSGD(model, torch.optim.SGD(model.parameters(), 0.1), every=1)
together = [train(model, optimizer, my_x, my_y)]
""",
    "mixed_precision": """
from mine.mixed_precision import average_gradients

model = net()
for p in model.parameters():
    dist.broadcast(p.detach(), 0)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
together = [train(model, optimizer, my_x, my_y, lambda: average_gradients(model.parameters()))]
""",
    "uneven": """
from mine.uneven import average_by_rows

my_x, my_y = x.split([5, 3])[rank], y.split([5, 3])[rank]
model = net()
for p in model.parameters():
    dist.broadcast(p.detach(), 0)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
losses = train(model, optimizer, my_x, my_y, lambda: average_by_rows(model.parameters(), len(my_x)), of_all=False)
losses = torch.tensor(losses, dtype=torch.float64) * len(my_x) / len(x)
dist.all_reduce(losses)
together = [losses.tolist()]
""",
    "compression": """
from mine.compression import TopK
from mine.data_parallel import DataParallel

model = DataParallel(net(), comm_hook=TopK(1.0))  # all elements, each with its place
together = [train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), my_x, my_y)]
""",
}


def copy_into(room, folder):
    """Copy the room and what it stands on into folder/mine."""
    mine = folder / "mine"
    mine.mkdir()
    for name in (*GROUND, *TAKEN[room]):
        if (MECHANISMS / name).is_dir():
            shutil.copytree(MECHANISMS / name, mine / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(MECHANISMS / name, mine)


@pytest.mark.parametrize("room", TAKEN)
def test_a_room_trains_in_a_script_of_the_readers_own(room, tmp_path):
    copy_into(room, tmp_path)
    (tmp_path / "train.py").write_text(BEGIN + SCRIPTS[room] + END)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    options = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=mine"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, together = json.loads(done.stdout.splitlines()[-1])
    assert together and alone[0] > alone[-1]
    for losses in together:
        assert losses == pytest.approx(alone, rel=1e-9)


# ---- what is taken along --------------------------------------------------------------------------------------


def weight(room):
    """((files, lines) of all that is copied, (files, lines) of what the room's own files need of it)."""
    paths = [MECHANISMS / name for name in (*GROUND, *TAKEN[room])]
    whole = {file for path in paths for file in ([path] if path.suffix else path.rglob("*.py"))}
    needed = {f for f in whole if f.relative_to(MECHANISMS).parts[0] in TAKEN[room]}
    while more := {g for f in needed for import_ in imports(f) if (g := file_of(*import_))} - needed:
        needed |= more
    return tuple((len(files), sum(len(f.read_text().splitlines()) for f in files)) for files in (whole, needed))


def test_what_a_room_needs_is_among_what_is_copied():
    for room in TAKEN:
        whole, needed = weight(room)
        assert 0 < needed[0] <= whole[0] and 0 < needed[1] <= whole[1], room


if __name__ == "__main__":
    print(f"{'':18}{'copied':>16}{'needed of it':>18}")
    for room in TAKEN:
        (files, lines), (fewest, fewer) = weight(room)
        print(f"{room:18}{files:3} files {lines:5,}{fewest:7} files {fewer:5,} lines")
