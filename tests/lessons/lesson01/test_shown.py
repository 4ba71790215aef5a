"""What lesson 01's picture of the collectives brings and receives."""

import torch.distributed as dist

from pardist_lib.lessons.lesson01 import shown

CALLS = {
    "broadcast": lambda x, y: dist.broadcast(x, src=0),
    "reduce": lambda x, y: dist.reduce(x, dst=0),
    "all_reduce": lambda x, y: dist.all_reduce(x),
    "reduce_scatter": lambda x, y: dist.reduce_scatter_tensor(y, x),
    "all_to_all": lambda x, y: dist.all_to_all_single(y, x),
    "scatter": lambda x, y: dist.scatter(y, x, src=0),
    "gather": lambda x, y: dist.gather(x, y, dst=0),
    "all_gather": lambda x, y: dist.all_gather_into_tensor(y, x),
}
AFTER = {  # on ranks 0 and 3
    "broadcast": ("0, 1, 2, 3", "0, 1, 2, 3"),
    "reduce": ("60, 64, 68, 72", "nothing"),
    "all_reduce": ("60, 64, 68, 72", "60, 64, 68, 72"),
    "reduce_scatter": ("60", "72"),
    "all_to_all": ("0, 10, 20, 30", "3, 13, 23, 33"),
    "scatter": ("0", "3"),
    "gather": ("0, 10, 20, 30", "nothing"),
    "all_gather": ("0, 10, 20, 30", "0, 10, 20, 30"),
}


def test_every_collective_of_the_lesson(ranks_of):
    for name, picture in zip(CALLS, shown.frames(ranks_of(4), CALLS), strict=True):
        rows = picture.table().rows
        assert (rows[0]["after"], rows[3]["after"]) == AFTER[name], name
        assert rows[0]["before"] == ("0" if "gather" in name else "0, 1, 2, 3")
        assert rows[3]["before"] == {"scatter": "nothing"}.get(name, "30" if "gather" in name else "30, 31, 32, 33")
