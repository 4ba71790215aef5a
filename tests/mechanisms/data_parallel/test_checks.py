"""What DataParallel refuses, because ranks would train different models, or a wrong one, without a word."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pardist_lib import RankError
from pardist_lib.lessons.worlds import group_of
from pardist_lib.mechanisms.data_parallel import DataParallel
from pardist_lib.mechanisms.sharded.optimizer import ShardedOptimizer
from tests.mechanisms.data_parallel.nets import Net, batch
from tests.mechanisms.refusals import refused


def wrap_twice():
    DataParallel(nn.Sequential(DataParallel(Net()), nn.ReLU()))


def wrap_the_same_module_twice():
    net = Net()
    first = DataParallel(net)
    DataParallel(net)
    return first


def wrap_ddp():
    DataParallel(DistributedDataParallel(Net()))


def different_shape():
    DataParallel(nn.Linear(4, 5 if dist.get_rank() == 2 else 4))


def different_dtype():
    DataParallel(nn.Linear(4, 4, dtype=torch.float64 if dist.get_rank() else torch.float32))


def different_count():
    DataParallel(nn.Sequential(*[nn.Linear(4, 4) for _ in range(1 + dist.get_rank() // 3)]))


def frozen_on_one():
    DataParallel(nn.Linear(4, 4).requires_grad_(dist.get_rank() != 1))


def nothing_to_train():
    DataParallel(nn.Linear(4, 4).requires_grad_(False))


def no_bucket(mb=0):
    DataParallel(Net(), bucket_mb=mb)


def batch_smaller_than_the_world():
    model = DataParallel(Net())
    x, _ = batch(0, 3)
    return model(x.tensor_split(4)[dist.get_rank()])


def sparse():
    model = DataParallel(nn.Embedding(5, 4, sparse=True))
    model(torch.tensor([1, 2])).sum().backward()


def rows_by_name_missing():
    DataParallel(nn.Linear(6, 6))(input=batch(0, 3)[0].float().tensor_split(4)[dist.get_rank()])


def unfrozen_later():
    model = DataParallel(Net())
    model.module.frozen.requires_grad_(True)
    model(batch(0)[0])


def added_later():
    model = DataParallel(nn.Sequential(nn.Linear(6, 6)))
    model.module.append(nn.Linear(6, 2))
    model(batch(0)[0].float())


def reentrant(**options):
    layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    model = DataParallel(layers, **options)
    x = checkpoint(layers[1], layers[0](batch(0)[0].float()), use_reentrant=True)
    layers[2](x).sum().backward()
    return model


def reentrant_and_unused():
    reentrant(find_unused_parameters=True)


def frozen_later():
    model = DataParallel(Net())
    model.module.extra.requires_grad_(False)
    model(batch(0)[0]).sum().backward()


def averaged_twice():
    model = DataParallel(Net())
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    model(batch(0)[0]).sum().backward()
    return optimizer


def stepped_in_backward():
    model = DataParallel(Net())
    model.module.out.bias.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    model(batch(0)[0]).sum().backward()


def differentiable_mean():
    model = DataParallel(Net())
    model(batch(0)[0]).square().sum().backward(create_graph=True)


def kept_by_nobody():
    DataParallel(Net())(batch(0)[0]).sum().backward()


def rows_of_bounded_length():
    DataParallel(nn.Embedding(5, 4, max_norm=1.0))


def another_order_in_memory():
    layout = torch.channels_last if dist.get_rank() == 2 else torch.contiguous_format
    DataParallel(nn.Conv2d(3, 4, 3).to(memory_format=layout))


def outside_the_group():
    DataParallel(Net(), group=group_of([0, 1]))


BAD = [
    (wrap_twice, "0 is a DataParallel already"),
    (wrap_the_same_module_twice, "another DataParallel averages these parameters already: .* unwrap"),
    (wrap_ddp, "the module is a DistributedDataParallel already"),
    (different_shape, r"where rank 0 has parameter weight, .*\[4, 4\], rank 2 has parameter weight, .*\[5, 4\]\."),
    (different_dtype, r"where rank 0 has parameter weight, float32 .*, rank 1 has parameter weight, float64"),
    (different_count, r"where rank 0 has nothing more, rank 3 has parameter 1\.weight, .*\. Build the same"),
    (frozen_on_one, r"where rank 0 has parameter weight, float32 \[4, 4\], rank 1 has parameter weight, .*, frozen\."),
    (nothing_to_train, "Linear has no trainable parameters"),
    (no_bucket, "bucket_mb is a size above 0, not 0"),
    (batch_smaller_than_the_world, r"rank 3 has no rows: this batch is smaller than the 4 ranks.*model\.join"),
    (sparse, "the gradient of weight is sparse"),
    (outside_the_group, "rank [23] is not in this group"),
    (rows_by_name_missing, "rank 3 has no rows"),
    (unfrozen_later, "frozen.weight is to be trained, but was not when the module was wrapped"),
    (added_later, "1.weight is to be trained, but was not when .* DataParallel"),
    (reentrant, "checkpoint.*use_reentrant=False"),
    (reentrant_and_unused, "checkpoint.*use_reentrant=False"),
    (differentiable_mean, r"create_graph=True.*torch\.autograd\.grad"),
    (frozen_later, "extra.weight and 1 more got no gradient .* before wrapping, or pass find_unused_parameters=True"),
    (averaged_twice, "a hook has taken or replaced the gradient of .*ShardedOptimizer.*reduce_gradients=False"),
    (stepped_in_backward, "a hook has taken or replaced the gradient of out.bias before it was averaged"),
    (kept_by_nobody, "the DataParallel .* is gone: keep it, or unwrap"),
    (rows_of_bounded_length, "the module has max_norm=1.0: .* max_norm=None"),
    (another_order_in_memory, r"rank 2 has parameter weight, float32 \[4, 3, 3, 3\] with strides \[27, 1, 9, 3\]"),
]


@pytest.mark.parametrize("wrong, said", BAD, ids=[wrong.__name__ for wrong, _ in BAD])
def test_bad_input_is_named(ranks_of, wrong, said):
    with refused(said):
        ranks_of(4).run(wrong, quiet=True)


def test_unused_parameters_are_named(ranks_of):
    with pytest.raises(RankError, match="extra.* and 1 more got no gradient on rank .*find_unused_parameters=True"):
        ranks_of(4).run(forgets_that_some_are_unused, quiet=True)


def forgets_that_some_are_unused():
    model = DataParallel(Net())
    model(batch(0)[0], extra=False).sum().backward()


def test_a_hook_that_returns_nothing_is_named(ranks_of):
    def step():
        model = DataParallel(Net(), comm_hook=lambda bucket, group: None)
        with pytest.raises(TypeError, match="comm_hook returned None: a function that waits"):
            cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()

    ranks_of(1).run(step, quiet=True)
