"""What a rank has otherwise than a notebook: the reader's classes in pickles, no keyboard, no screen; and what the
machine it is started on has left in the environment."""

import os
import subprocess
import sys
import textwrap

import pytest

from pardist_lib import RankError, Ranks, torchrun

# As in a cell: functions and classes that no module of the ranks has.
SOURCE = """
import collections, dataclasses, io, multiprocessing, pickle
import torch, torch.distributed as dist
from torch import nn

@dataclasses.dataclass
class Config:
    width: int = 3

class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 1)

Batch = collections.namedtuple("Batch", "x y")

class Unwell(Exception):
    pass

class Rows(torch.utils.data.Dataset):
    def __init__(self, fails=False):
        self.fails = fails
    def __len__(self):
        return 4
    def __getitem__(self, i):
        if self.fails:
            raise Unwell(f"row {i}")
        return Batch(torch.full((2,), float(i)), torch.tensor(i))

def collated(rows):
    return Batch(*(torch.stack(column) for column in zip(*rows)))

def double(x):
    return 2 * x

def grown(config):
    return Config(config.width + 1)

def exchanged(config):
    rank, got = dist.get_rank(), [None] * dist.get_world_size()
    dist.all_gather_object(got, Config(config.width + rank))
    sent = [Batch(rank, double) if rank == 0 else None]
    dist.broadcast_object_list(sent)
    return [c.width for c in got], all(type(c) is Config for c in got), sent[0].y(4), type(sent[0]) is Batch

def saved(config):
    stream = io.BytesIO()
    torch.save(Net(config), stream)
    stream.seek(0)
    net = torch.load(stream, weights_only=False)
    return type(net) is Net and pickle.loads(pickle.dumps(net.config)) == config

def pooled(method, config):
    with multiprocessing.get_context(method).Pool(1) as pool:
        numbers, [more] = pool.map(double, [1, 2]), pool.map(grown, [config])
    return numbers, type(more) is Config and more.width

def loaded(workers, fails=False):
    loader = torch.utils.data.DataLoader(Rows(fails), batch_size=2, num_workers=workers, collate_fn=collated)
    try:
        return [type(batch) is Batch and batch.y.tolist() for batch in loader]
    except Unwell as error:
        return str(error).strip().splitlines()[-1]
"""


@pytest.fixture(scope="module")
def cell():
    """The source as a notebook has it: in __main__, which the ranks' own is not."""
    names = {"__name__": "__main__"}
    exec(compile(SOURCE, "<cell>", "exec"), names)
    main = sys.modules["__main__"]
    before = dict(vars(main))
    vars(main).update({k: v for k, v in names.items() if getattr(v, "__module__", None) == "__main__"})
    yield names
    for name in set(vars(main)) - set(before):
        delattr(main, name)


def test_collectives_of_objects_take_the_readers_own(ranks_of, cell):
    for widths, same, eight, batch in ranks_of(3).run(cell["exchanged"], cell["Config"](), quiet=True):
        assert widths == [3, 4, 5] and same and eight == 8 and batch


def test_a_model_of_the_readers_own_class_is_saved_and_loaded(ranks_of, cell):
    assert ranks_of(2).run(cell["saved"], cell["Config"](), quiet=True) == [True, True]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_take_the_readers_functions_and_give_back_their_objects(ranks_of, cell, method):
    got = ranks_of(2).run(cell["pooled"], method, cell["Config"](), quiet=True, timeout=60)
    assert got == [([2, 4], 4)] * 2


def test_a_data_loaders_workers_send_the_readers_own(ranks_of, cell):
    assert ranks_of(2).run(cell["loaded"], 1, quiet=True) == [[[0, 1], [2, 3]]] * 2
    assert ranks_of(2).run(cell["loaded"], 1, True, quiet=True) == ["Unwell: row 0"] * 2


def test_a_cells_class_of_the_same_name_stays(ranks_of, cell):
    ranks = ranks_of(2)
    ranks.run_cell("class Config:\n    mine = True\n")
    ranks.run(lambda config: None, cell["Config"](), quiet=True)
    ranks.run_cell("assert Config.mine")


# ---- no keyboard, no screen, no notebook ----------------------------------------------------------------------


def asks():
    return input("how many? ")


def stops():
    breakpoint()


def stops_all():
    import torch.distributed as dist

    dist.breakpoint()


@pytest.mark.parametrize("wants", [asks, stops, stops_all])
def test_a_rank_has_no_keyboard(ranks_of, wants):
    with pytest.raises(RankError, match="a rank has no keyboard: print what you want to see, or return it"):
        ranks_of(2).run(wants, quiet=True)


def shows():
    from matplotlib import pyplot

    pyplot.plot([1, 2])
    pyplot.show()
    return len(pyplot.gcf().axes)


def test_a_rank_has_no_screen_and_says_how_figures_are_seen(ranks_of):
    ranks = ranks_of(2)
    assert ranks.run(shows, quiet=True) == [1, 1]
    assert all("return the figure and display(…) it in the notebook" in text for text in ranks.output)


@pytest.mark.parametrize(
    "line, said",
    [("%time x = 1", "`%time x = 1` is the notebook's own"), ("!ls", "`!ls` is the notebook's own"),
     ("await nothing()", "a rank has none: asyncio.run")],
)  # fmt: skip
def test_what_only_a_notebook_understands(ranks_of, line, said):
    with pytest.raises(RankError) as caught:
        ranks_of(2).run_cell(f"x = 0\n{line}\n")
    assert said in caught.value.message


def train(model, steps=3):
    return model, steps


@pytest.mark.parametrize(
    "args, said", [((), "missing a required argument: 'model'"), ((1, 2, 3), "too many positional arguments")]
)
def test_a_call_that_cannot_be_made_is_shown_as_it_has_to_be(ranks_of, args, said):
    with pytest.raises(TypeError) as caught:
        ranks_of(2).run(train, *args)
    assert said in str(caught.value) and "ranks.run(train, model, steps=3)" in str(caught.value)


def test_three_hundred_lines_are_folded(ranks_of, capsys):
    ranks = ranks_of(2)

    def many():
        import torch.distributed as dist

        for i in range(300):
            print("rank", dist.get_rank(), "line", i)

    ranks.run(many)
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 100 and "260 more lines, all of them in ranks.output[1]" in said
    assert len(ranks.output[1].splitlines()) == 300


# ---- the machine it is started on -----------------------------------------------------------------------------

LEFT_BY_A_JOB = {
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_RDZV_ENDPOINT": "other-host:29400", "PET_NODE_RANK": "1",
    "RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "16", "MASTER_ADDR": "other-host", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "1",
}  # fmt: skip


def world():
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size(), os.environ["RANK"], "PET_NNODES" in os.environ


@pytest.mark.parametrize("fork", [True, False])
def test_what_a_cluster_job_has_left_in_the_environment_is_not_ours(monkeypatch, fork):
    for name, value in LEFT_BY_A_JOB.items():
        monkeypatch.setenv(name, value)
    with Ranks(2, fork=fork) as ranks:
        assert ranks.run(world) == [(0, 2, "0", False), (1, 2, "1", False)]


def test_nor_of_a_program(monkeypatch, tmp_path):
    for name, value in LEFT_BY_A_JOB.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "says.py").write_text("import os\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'])\n")
    assert torchrun(tmp_path / "says.py", nproc=2, quiet=True) == ["0 2\n", "1 2\n"]


def test_a_temporary_folder_with_a_very_long_path(monkeypatch, tmp_path):
    long = tmp_path / ("deep" * 25)
    long.mkdir()
    (long / "says.py").write_text("print('here')\n")
    code = f"""
        from pardist_lib import Ranks, torchrun
        if __name__ == "__main__":
            with Ranks(2) as ranks:
                print(ranks.run(lambda: 7))
            print(torchrun({str(long / "says.py")!r}, nproc=1, quiet=True))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ | {"TMPDIR": str(long)},
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.stdout.endswith("[7, 7]\n['here\\n']\n"), done.stderr  # before it perhaps: what a start waits for
    assert not [p.name for p in long.iterdir() if "pardist" in p.name]


SPAWNS = """
import collections, multiprocessing, sys

B = collections.namedtuple("B", "x y")

def made(i):
    return B(i, 2 * i)

if __name__ == "__main__":
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.map(made, [1]))
"""


def test_a_programs_workers_find_its_classes(tmp_path):
    (tmp_path / "spawns.py").write_text(SPAWNS)
    assert torchrun(tmp_path / "spawns.py", nproc=1, quiet=True) == ["[B(x=1, y=2)]\n" * 2]


# ---- whose code it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where, readers", [
    ("home/me/project/model.py", True), ("home/me/.local/lib/python3.11/site-packages/lib/a.py", False),
    ("usr/lib/python3/dist-packages/lib/a.py", False), ("target/lib/a.py", False), ("own/helpers.py", True),
])  # fmt: skip
def test_what_pip_has_installed_is_not_the_readers(tmp_path, monkeypatch, where, readers):
    from pardist_lib.ranks import ledger

    (tmp_path / "target" / "lib-1.0.dist-info").mkdir(parents=True)  # as pip install --target leaves it
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "target"), str(tmp_path / "own"), *sys.path])
    ledger.is_readers.cache_clear()
    assert ledger.is_readers(str(tmp_path / where)) is readers
    ledger.is_readers.cache_clear()
