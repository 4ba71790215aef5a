"""What ShardedDataParallel refuses, and in which words."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.sharded import ShardedDataParallel
from tests.mechanisms.refusals import refused
from tests.mechanisms.sharded.unusual_modules import Slotted, TakesObject


@pytest.fixture(scope="module")
def ranks(ranks_of):
    return ranks_of(4)


class Reaches(nn.Module):
    """Uses a part's weight without calling the part; one element of it would fit, too."""

    def __init__(self):
        super().__init__()
        self.linear, self.normal = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x):
        return self.linear(x) * self.normal.weight


def wrong(how):
    linear = nn.Linear(3, 3)
    if how in (1, 0, "3"):
        return ShardedDataParallel(linear, how)
    if how == "nothing":
        return ShardedDataParallel(nn.ReLU())
    if how == "frozen":
        return ShardedDataParallel(linear.requires_grad_(False))
    if how == "twice":
        return ShardedDataParallel(ShardedDataParallel(linear))
    if how == "inside":
        return ShardedDataParallel(nn.Sequential(ShardedDataParallel(linear)))
    if how == "again":
        ShardedDataParallel(linear)
        return ShardedDataParallel(linear)
    if how == "shapes":
        return ShardedDataParallel(nn.Linear(3, 3 + (dist.get_rank() == 1)))
    if how == "more":
        return ShardedDataParallel(nn.Linear(3, 3, bias=dist.get_rank() < 3))
    if how == "meta":
        return ShardedDataParallel(nn.Linear(3, 3, device="meta"))
    if how == "units":
        return ShardedDataParallel(linear, units=[nn.Linear(1, 1)])
    if how == "never called":
        return ShardedDataParallel(whole := nn.Sequential(nn.ModuleList([linear])), units=[whole[0]])
    if how == "not a member":
        return ShardedDataParallel(linear, 3, group_of([0, 1])).stage
    if how == "hidden":
        model = ShardedDataParallel(TakesObject(Slotted))
        return model(torch.ones(2, 6)).sum().backward()
    model = ShardedDataParallel(nn.Sequential(linear, nn.Linear(3, 3)))
    shard = next(model.parameters())
    if how == "reaches":
        return ShardedDataParallel(Reaches())(torch.ones(1, 4))
    if how == "copied":
        copy.deepcopy(model)
    if how == "hooked":
        shard.register_hook(lambda gradient: 2 * gradient)
    if how == "memory":
        shard.data = shard.data.clone()
    if how == "assigned":
        model.load_state_dict(model.state_dict(), assign=True)
    if how in ("hooked", "memory", "assigned"):
        model(torch.ones(1, 3))
    if how == "norm":
        model.clip_grad_norm_(1.0, norm_type=0)
    if how == "moved":
        model.double()
    if how == "unfrozen":
        next(model.parameters()).requires_grad_(False)
        model(torch.ones(1, 3))
    if how == "names":
        model.load_full_state_dict({"0.weight": torch.ones(3, 3)})
    if how == "a shape":
        model.load_full_state_dict({**model.full_state_dict(), "0.bias": torch.ones(4)})
    if how == "another rank's":
        model.load_sharded_state_dict({**model.sharded_state_dict(), "rank": 9})


@pytest.mark.parametrize(
    "how, said",
    [
        (1, "stage is 2 or 3, not 1: stage 1 is ShardedOptimizer"),
        (0, "stage is 2 or 3, not 0"),
        ("3", "stage is 2 or 3, not '3'"),
        ("nothing", "no parameter requires a gradient"),
        ("frozen", "no parameter requires a gradient"),
        ("twice", "this module is wrapped already"),
        ("inside", "this module is wrapped already"),
        ("again", "weight is a shard already: a model is wrapped once"),
        ("shapes", r"where rank 0 has weight, float32 \[3, 3\], rank 1 has weight, float32 \[4, 3\]"),
        ("more", r"where rank 0 has bias, float32 \[3\], rank 3 has nothing more"),
        ("meta", "weight is on the meta device: give it memory first"),
        ("units", "units are submodules of the module, or their class; Linear is not in it"),
        ("never called", "ModuleList never is: name its parts"),
        ("not a member", r"rank [23] is not in this group"),
        ("hidden", "before it was gathered: Returns returned a tensor where none is looked for"),
        ("reaches", "used in a forward without calling the unit.*units="),
        ("copied", "a wrapped model cannot be copied or pickled"),
        ("hooked", "0.weight has a hook of register_hook, which a shard never calls"),
        ("memory", "the memory of 0.weight was replaced after wrapping"),
        ("assigned", "weight of Linear was replaced after wrapping.*load_full_state_dict"),
        ("norm", "norm_type is a number above 0"),
        ("moved", "shards stay where they are: move or convert the model first"),
        ("unfrozen", "frozen or unfrozen after wrapping"),
        ("names", "these names are in one state dict only"),
        ("a shape", r"0.bias has shape \[4\], here it is \[3\]"),
        ("another rank's", "the shard of rank 9 of 4"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(ranks, how, said):
    with refused(said):
        ranks.run(wrong, how, quiet=True)
