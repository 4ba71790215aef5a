"""local_sgd_step: wrong answers as people write them, and unusual right ones."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging import utils
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pardist_lib.mechanisms.averaging import LocalSGD
from tests.lessons.lesson05.shared import put_means
from tests.lessons.planted import mistake, right


def take_mean(model):
    for p in model.parameters():
        if p.requires_grad:
            dist.all_reduce(p.data)
            p.data /= dist.get_world_size()


@mistake("local_sgd_step", "the parameters are averaged at steps 0, k, 2k")
def counts_from_one(model, optimizer, step, k):
    optimizer.step()
    if step % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "averaged first, then stepped")
def averages_first(model, optimizer, step, k):
    if (step + 1) % k == 0:
        take_mean(model)
    optimizer.step()


@mistake("local_sgd_step", "average the parameters, not the gradients")
def averages_gradients(model, optimizer, step, k):
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
    optimizer.step()


@mistake("local_sgd_step", "average the parameters, not the gradients")
def gradients_after_the_step(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


@mistake("local_sgd_step", "the parameters are averaged after every step, whatever k is")
def averages_always(model, optimizer, step, k):
    optimizer.step()
    take_mean(model)


@mistake("local_sgd_step", "the parameters are never averaged")
def never_averages(model, optimizer, step, k):
    optimizer.step()


@mistake("local_sgd_step", "the sum was not divided by the number of ranks")
def forgets_to_divide(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.requires_grad:
                dist.all_reduce(p.data)


@mistake("local_sgd_step", "no step was made: call optimizer.step()")
def makes_no_step(model, optimizer, step, k):
    if (step + 1) % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "optimizer.step() is called only in the steps that average")
def steps_only_when_due(model, optimizer, step, k):
    if (step + 1) % k == 0:
        optimizer.step()
        take_mean(model)


@mistake("local_sgd_step", "the optimizer's state is averaged too")
def averages_the_momentum(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        take_mean(model)
        for p in model.parameters():
            if p.requires_grad:
                for name, value in sorted(optimizer.state[p].items()):
                    if name != "step":
                        dist.all_reduce(value)
                        value /= dist.get_world_size()


@mistake("local_sgd_step", "averaged only once, at step k - 1")
def averages_once(model, optimizer, step, k):
    optimizer.step()
    if step == k - 1:
        take_mean(model)


@mistake("local_sgd_step", "it broadcasts one rank's parameters")
def broadcasts(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            dist.broadcast(p.data, 0)


@mistake("local_sgd_step", "step 0 sends")
def sends_for_nothing(model, optimizer, step, k):
    optimizer.step()
    means = [p.data.clone() for p in model.parameters() if p.requires_grad]
    for mean in means:
        dist.all_reduce(mean)
    if (step + 1) % k == 0:
        for p, mean in zip((p for p in model.parameters() if p.requires_grad), means, strict=True):
            p.data.copy_(mean / dist.get_world_size())


@mistake("local_sgd_step", "it calls the course's own")
def takes_the_courses_local_sgd(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        LocalSGD.__init__.__globals__["average_parameters"](model)


@mistake("local_sgd_step", "the calls are counted, where `step` says which one it is")
def counts_its_calls(model, optimizer, step, k):
    optimizer.step()
    optimizer.calls = getattr(optimizer, "calls", 0) + 1
    if optimizer.calls % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "averaged at the beginning of the step after the k-th")
def averages_before_the_next_step(model, optimizer, step, k):
    if step and step % k == 0:
        take_mean(model)
    optimizer.step()


@mistake("local_sgd_step", "no step was made here, only on other ranks: every rank calls optimizer.step()")
def rank_0_steps(model, optimizer, step, k):
    if dist.get_rank() == 0:
        optimizer.step()
    if (step + 1) % k == 0:
        take_mean(model)


@mistake("local_sgd_step", "fc1.bias is frozen and has changed")
def knows_the_frozen_one_by_its_name(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for name, p in model.named_parameters():
            if "frozen" not in name:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


@mistake("local_sgd_step", "fc1.weight takes no gradient any more: leave requires_grad as it was")
def freezes_what_it_averages(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.requires_grad:
                p.requires_grad_(False)
                dist.all_reduce(p)
                p /= dist.get_world_size()


@right("local_sgd_step")
def asynchronously_and_then_waits(model, optimizer, step, k):
    optimizer.step()
    if step in range(k - 1, step + 1, k):
        trained = [p.data.div_(dist.get_world_size()) for p in model.parameters() if p.requires_grad]
        for one in [dist.all_reduce(p, async_op=True) for p in trained]:
            one.wait()


@right("local_sgd_step")
def in_one_line(model, optimizer, step, k):
    optimizer.step()
    if step % k == k - 1:
        trained = [p for p in model.parameters() if p.requires_grad]
        line = parameters_to_vector(trained).detach() / dist.get_world_size()
        dist.all_reduce(line)
        vector_to_parameters(line, trained)


@right("local_sgd_step")
def by_avg_of_parts(model, optimizer, step, k):
    optimizer.step()
    if not (step + 1) % k:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        p.div_(dist.get_world_size())
                        dist.all_reduce(p)


@mistake("local_sgd_step", "only the parameters that have a gradient are averaged")
def averages_what_was_used(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


@mistake("local_sgd_step", "only the optimizer's first parameter group is averaged")
def averages_the_first_group(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        for p in optimizer.param_groups[0]["params"]:
            if p.requires_grad:
                dist.all_reduce(p.data)
                p.data /= dist.get_world_size()


@mistake("local_sgd_step", "it calls torch's own average_parameters")
def takes_torchs(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        utils.average_parameters(iter([p for p in model.parameters() if p.requires_grad]), dist.group.WORLD)


@mistake("local_sgd_step", "the optimizer's state is thrown away where the ranks average")
def forgets_the_momentum(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        take_mean(model)
        optimizer.state.clear()


@mistake("local_sgd_step", "optimizer.step() is not called in the steps that average")
def averages_or_steps(model, optimizer, step, k):
    if (step + 1) % k == 0:
        take_mean(model)
    else:
        optimizer.step()


@mistake("local_sgd_step", "the model has another fc1.weight now")
def puts_new_parameters_in(model, optimizer, step, k):
    optimizer.step()
    if (step + 1) % k == 0:
        put_means(model, 1 / dist.get_world_size())
