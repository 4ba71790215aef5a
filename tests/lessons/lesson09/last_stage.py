"""Wrong answers to last_stage, as people really write them, and unusual right ones."""

import torch
from torch.nn.functional import cross_entropy

from tests.lessons.planted import mistake, right


def stepped(stage, xs, targets, share, told=None):
    """With the factor share(x, rows, m); told: that of the loss that is returned, where it is another one."""
    rows, total, grads = sum(len(x) for x in xs), 0.0, []
    for x, target in zip(xs, targets, strict=True):
        x = x.detach().requires_grad_()
        mean = cross_entropy(stage(x), target)
        loss = mean * share(x, rows, len(xs))
        loss.backward()
        total += (mean * (told or share)(x, rows, len(xs))).item()
        grads.append(x.grad)
    return total, grads


def by_rows(x, rows, m):
    return len(x) / rows


@mistake("last_stage", "every micro-batch counts whole")
def not_scaled(stage, xs, targets):
    return stepped(stage, xs, targets, lambda x, rows, m: 1.0)


@mistake("last_stage", "this is the mean of the micro-batches' means")
def by_their_number(stage, xs, targets):
    return stepped(stage, xs, targets, lambda x, rows, m: 1 / m)


@mistake("last_stage", "the loss is right, its gradient is not: every micro-batch counts whole")
def only_the_loss_is_scaled(stage, xs, targets):
    return stepped(stage, xs, targets, lambda x, rows, m: 1.0, told=by_rows)


@mistake("last_stage", "the gradients are right, and the loss that is returned is not scaled")
def only_the_gradient_is_scaled(stage, xs, targets):
    return stepped(stage, xs, targets, by_rows, told=lambda x, rows, m: 1.0)


@mistake("last_stage", "this is the sum over the rows")
def sums(stage, xs, targets):
    return stepped(stage, xs, targets, lambda x, rows, m: len(x))


@mistake("last_stage", "each mean is divided by the number of all rows")
def by_all_rows(stage, xs, targets):
    return stepped(stage, xs, targets, lambda x, rows, m: 1 / rows)


@mistake("last_stage", "scaled twice, by the share of the rows and by it again")
def scales_what_goes_back_again(stage, xs, targets):
    rows = sum(len(x) for x in xs)
    total, grads = stepped(stage, xs, targets, by_rows)
    return total, [g * len(g) / rows for g in grads]


@mistake("last_stage", "only the last micro-batch is in it")
def returns_the_last_loss(stage, xs, targets):
    rows, grads = sum(len(x) for x in xs), []
    for x, target in zip(xs, targets, strict=True):
        x = x.detach().requires_grad_()
        loss = cross_entropy(stage(x), target) * len(x) / rows
        loss.backward()
        grads.append(x.grad)
    return loss.item(), grads


@mistake("last_stage", "is None: autograd keeps one for x.requires_grad_()")
def forgets_requires_grad(stage, xs, targets):
    rows, total = sum(len(x) for x in xs), 0.0
    for x, target in zip(xs, targets, strict=True):
        loss = cross_entropy(stage(x), target) * len(x) / rows
        loss.backward()
        total += loss.item()
    return total, [x.grad for x in xs]


@mistake("last_stage", "the gradient that was there is gone")
def zeroes_first(stage, xs, targets):
    stage.zero_grad()
    return stepped(stage, xs, targets, by_rows)


@mistake("last_stage", "the weights have changed")
def steps_as_well(stage, xs, targets):
    found = stepped(stage, xs, targets, by_rows)
    torch.optim.SGD(stage.parameters(), lr=0.1).step()
    return found


@mistake("last_stage", "the stage has to see each micro-batch once: together they do not fit in memory")
def all_at_once(stage, xs, targets):
    x = torch.cat(xs).requires_grad_()
    loss = cross_entropy(stage(x), torch.cat(targets))
    loss.backward()
    return loss.item(), list(x.grad.split([len(x) for x in xs]))


@mistake("last_stage", "the pair (loss, gradients of xs) is asked for")
def only_the_loss(stage, xs, targets):
    return stepped(stage, xs, targets, by_rows)[0]


@mistake("last_stage", "for the gradients of xs, a list of 3")
def only_the_last_gradient(stage, xs, targets):
    total, grads = stepped(stage, xs, targets, by_rows)
    return total, grads[-1]


@mistake("last_stage", "has no gradient: backward() adds to .grad")
def asks_for_inputs_only(stage, xs, targets):
    rows, total, grads = sum(len(x) for x in xs), 0.0, []
    for x, target in zip(xs, targets, strict=True):
        x = x.detach().requires_grad_()
        loss = cross_entropy(stage(x), target) * len(x) / rows
        grads += torch.autograd.grad(loss, [x])
        total += loss.item()
    return total, grads


@mistake("last_stage", "only the last micro-batch is in it")
def zeroes_in_the_loop(stage, xs, targets):
    rows, total, grads = sum(len(x) for x in xs), 0.0, []
    for x, target in zip(xs, targets, strict=True):
        stage.zero_grad()
        x = x.detach().requires_grad_()
        loss = cross_entropy(stage(x), target) * len(x) / rows
        loss.backward()
        total += loss.item()
        grads.append(x.grad)
    return total, grads


@mistake("last_stage", "the loss is a list of 3 tensors")
def a_loss_for_each(stage, xs, targets):
    rows, losses, grads = sum(len(x) for x in xs), [], []
    for x, target in zip(xs, targets, strict=True):
        x = x.detach().requires_grad_()
        loss = cross_entropy(stage(x), target) * len(x) / rows
        loss.backward()
        losses.append(loss.detach())
        grads.append(x.grad)
    return losses, grads


@right("last_stage")
def sums_over_rows(stage, xs, targets):
    rows, total = sum(len(x) for x in xs), 0.0
    xs = [x.clone().requires_grad_() for x in xs]
    for x, target in zip(xs, targets, strict=True):
        loss = cross_entropy(stage(x), target, reduction="sum") / rows
        loss.backward()
        total += loss.detach()
    return total, [x.grad for x in xs]


@right("last_stage")
def seeds_backward(stage, xs, targets):
    rows, total = sum(len(x) for x in xs), 0.0
    for x, target in zip(xs, targets, strict=True):
        x.requires_grad_()
        loss = cross_entropy(stage(x), target)
        loss.backward(torch.full_like(loss, len(x) / rows))
        total += loss.item() * len(x) / rows
    return total, tuple(x.grad for x in xs)


@right("last_stage")
def all_forwards_first(stage, xs, targets):
    xs = [x.detach().requires_grad_() for x in xs]
    scores = [stage(x) for x in xs]
    loss = cross_entropy(torch.cat(scores), torch.cat(targets))
    loss.backward()
    return loss.item(), [x.grad for x in xs]
