"""A room of mechanisms, copied out of the library into a reader's own torchrun script, trains as one process does.

What is taken along is `group.py`, `collectives/` and the room, as a package of another name beside the script; the
course itself cannot be imported there, nor what only notebooks need. What that weighs is printed by
`python -m tests.test_lifting`.
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
    "mixed_precision": ("mixed_precision",),
    "uneven": ("uneven.py",),
    "compression": ("compression.py", "data_parallel"),
    "pipeline": ("pipeline",),
    "expert_parallel": ("expert_parallel",),
    "context_parallel": ("context_parallel",),
}

BEGIN = """
import json
import sys
import traceback

for name in ("pardist_lib", "matplotlib", "IPython", "ipywidgets", "tests"):
    sys.modules[name] = None  # importing it fails

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss


def net(seed=None):
    torch.manual_seed(dist.get_rank() if seed is None else seed)  # the first rank's counts
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()


def train(model, optimizer, x, y, after_backward=lambda: None):
    losses = []
    for _ in range(3):
        loss = mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        after_backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)


def mean(losses, share=0.5):
    losses = torch.tensor(losses, dtype=torch.float64) * share
    dist.all_reduce(losses)
    return losses.tolist()


dist.init_process_group("gloo")
rank, n = dist.get_rank(), dist.get_world_size()
torch.manual_seed(1)
x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
my_x, my_y = x.chunk(n)[rank], y.chunk(n)[rank]
"""

ROOMS = {  # room: how to train with what is copied, on two ranks; several runs' losses in three steps
    "data_parallel": """
    from mine_data_parallel.data_parallel import DataParallel

    model = DataParallel(net())
    return [mean(train(model, sgd(model), my_x, my_y))]
""",
    "sharded": """
    from mine_sharded.sharded import ShardedDataParallel, ShardedOptimizer

    model = net()
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    losses = [mean(train(model, optimizer, my_x, my_y))]
    for stage in (2, 3):
        model = ShardedDataParallel(net(), stage=stage)
        losses.append(mean(train(model, sgd(model), my_x, my_y)))
    return losses
""",
    "tensor_parallel": """
    from mine_tensor_parallel.tensor_parallel import ParallelMLP, parallelize

    models = [parallelize(net(), {"0": "column", "2": "row"}), ParallelMLP.from_module(net())]
    return [train(model, sgd(model), x, y) for model in models]
""",
    "parameter_server": """
    from mine_parameter_server.parameter_server import ParameterServer

    model, losses = net(), []
    with ParameterServer(model, sgd(model)) as ps:
        if ps.serving:
            ps.serve()
        for _ in range(0 if ps.serving else 3):
            model.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            losses.append(loss.item())
            ps.step(rows=len(x))
    dist.all_gather_object(everyone := [None] * n, losses)
    return everyone[1:]
""",
    "private": """
    from mine_private.private import federated_round, train_locally

    def one_step(model, x, y, client):
        train_locally(model, mse_loss, x, y, lr=0.1)

    model, losses = net(0), []
    for _ in range(3):
        losses.append(mse_loss(model(x), y).item())
        federated_round(model, {rank: (my_x, my_y)}, [0, 1], one_step)
    return [losses]
""",
    "averaging": """
    from mine_averaging.averaging import LocalSGD

    model = net()
    return [mean(train(model, LocalSGD(model, sgd(model, 0.0), every=1), my_x, my_y))]
""",
    "mixed_precision": """
    from mine_mixed_precision.mixed_precision import average_gradients

    model = net(0)
    return [mean(train(model, sgd(model), my_x, my_y, lambda: average_gradients(model.parameters())))]
""",
    "uneven": """
    from mine_uneven.uneven import average_by_rows

    mine_x, mine_y, model = x.split([5, 3])[rank], y.split([5, 3])[rank], net(0)
    average = lambda: average_by_rows(model.parameters(), len(mine_x))
    return [mean(train(model, sgd(model), mine_x, mine_y, average), len(mine_x) / len(x))]
""",
    "compression": """
    from mine_compression.compression import TopK
    from mine_compression.data_parallel import DataParallel

    model = DataParallel(net(), comm_hook=TopK(1.0))  # all elements, each with its place
    return [mean(train(model, sgd(model), my_x, my_y))]
""",
    "pipeline": """
    from mine_pipeline.pipeline import Pipeline, one_f_one_b, zero_bubble

    losses = []
    for schedule in (one_f_one_b(n, 4), zero_bubble(n, 4)):
        model, steps = Pipeline(net(0), schedule, mse_loss), []
        optimizer = sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            steps.append(model.step(x, y).item())
            optimizer.step()
        losses.append(steps)
    return losses
""",
    "expert_parallel": """
    from mine_expert_parallel.expert_parallel import ExpertParallel, MoE, Router, average_gradients

    class First3(nn.Module):
        def forward(self, x):
            return x[:, :3]

    first, tanh, last = net(0)
    experts = [nn.Linear(10, 10).double() for _ in range(2)]
    experts[1].weight.data[:3], experts[1].bias.data[:3] = last.weight.data, last.bias.data
    moe = MoE.of(Router(10, 2, 1, bias_update_rate=0.001), experts).double()
    moe.router.expert_bias[1] = 1  # every token chooses the second rank's
    model = nn.Sequential(first, tanh, ExpertParallel.from_module(moe), First3())
    return [mean(train(model, sgd(model), my_x, my_y, lambda: average_gradients(model)))]
""",
    "context_parallel": """
    from mine_context_parallel.context_parallel import all_to_all_attention, deal, ring_attention

    own_x, own_y, losses = deal(x, dim=0), deal(y, dim=0), []
    for attention in (ring_attention, all_to_all_attention):
        model = net(0)

        def attending(x):  # each token to itself only: as the net without attention
            heads = model(x).expand(1, 2, -1, -1)  # (batch, heads, own tokens, width)
            return attention(heads, heads, heads, mask=lambda q, k: q == k)[0, 0]

        def average():
            for p in model.parameters():
                dist.all_reduce(p.grad.div_(n))

        losses.append(mean(train(attending, sgd(model), own_x, own_y, average)))
    return losses
""",
}
WITHOUT_MOMENTUM = ("private", "averaging")  # where the optimizer is a rank's own

END = """
results = {}
for room in ROOMS:
    try:
        results[room] = globals()[room]()
    except Exception:
        results[room] = traceback.format_exc()
for momentum in (0.0, 0.9):
    model = net(0)
    results[f"one process, momentum {momentum}"] = train(model, sgd(model, momentum), x, y)
if rank == 0:
    print(json.dumps(results))
dist.destroy_process_group()
"""


def copy_into(folder, room):
    """What the room needs, as the package mine_ROOM."""
    mine = folder / f"mine_{room}"
    mine.mkdir()
    for name in (*GROUND, *TAKEN[room]):
        if (MECHANISMS / name).is_dir():
            shutil.copytree(MECHANISMS / name, mine / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(MECHANISMS / name, mine)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{room: losses of each of its runs, or what it raised}, by one script with all rooms beside it."""
    folder = tmp_path_factory.mktemp("lifted")
    for room in ROOMS:
        copy_into(folder, room)
    functions = [f"\n\ndef {room}():{body}" for room, body in ROOMS.items()]
    (folder / "train.py").write_text("".join([BEGIN, *functions, f"\n\nROOMS = {list(ROOMS)}\n", END]))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    options = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=lifted"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "train.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_trains_in_a_script_of_the_readers_own(trained, room):
    losses = trained[room]
    assert isinstance(losses, list), losses
    alone = trained[f"one process, momentum {0.0 if room in WITHOUT_MOMENTUM else 0.9}"]
    assert losses and alone[0] > alone[1] > alone[2]
    for run in losses:
        assert run == pytest.approx(alone, rel=1e-9)


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
    whole, needed = weight("uneven")
    assert 3 <= needed[0] < whole[0] and needed[1] < whole[1]


if __name__ == "__main__":
    print(f"{'':18}{'copied':>16}{'needed of it':>18}")
    for room in TAKEN:
        (files, lines), (fewest, fewer) = weight(room)
        print(f"{room:18}{files:3} files {lines:5,}{fewest:7} files {fewer:5,} lines")
