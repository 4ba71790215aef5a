"""What a step may be run with: dropout, checkpointing, autocast, other sizes, other dtypes, no gradients at all."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.pipeline import Pipeline, interleaved, one_f_one_b, zbv, zero_bubble
from tests.mechanisms.pipeline.nets import (
    agree,
    case,
    close,
    language_model,
    mlp,
    one_process,
    rows_of,
    same_gradients,
    stepped,
    word_loss,
    words_of,
)

WORLDS = [1, 2, 3, 4]


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_dropout_draws_by_layer_and_micro_batch_and_checkpointing_draws_the_same_again(ranks_of, p):
    cases = []
    for s in (one_f_one_b(p, p + 1), interleaved(p, 2 * p, 2), zbv(p, p + 1)):
        for checkpoint in (False, True):
            build = lambda n=s.stages: language_model(n, dropout=0.3)  # noqa: E731
            batches = [(words_of(9, k), words_of(9, k + 10), {"seed": f"run {k}"}) for k in range(2)]
            options = {"checkpoint": checkpoint}
            cases.append(case(f"{options} {s!r}"[:70], build, s, *batches, loss=word_loss, options=options))
    agree(ranks_of, p, cases)


class Mask(nn.Module):
    """Dropout that shows in gradients whether backward has the draws of forward: d/dw Σ w·x² = x², kept or not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.weight * nn.functional.dropout(x, 0.5)


def drawn_again(schedule):
    """On a rank: whether each layer's gradient is Σ weight · output, so of the same draws as the loss."""
    torch.manual_seed(dist.get_rank())
    pipeline = Pipeline([Mask() for _ in range(schedule.stages)], schedule, lambda y, _: y.sum(), checkpoint=True)
    loss = stepped(pipeline, torch.ones(8, 1001, dtype=torch.float64), torch.zeros(8))
    for p in pipeline.parameters():
        close(p.grad, loss, "gradient", rtol=1e-12, atol=0)
    return loss.item()


def test_checkpointing_without_a_seed_draws_the_same_again(ranks_of):
    for schedule in (one_f_one_b(2, 4), zbv(2, 4), interleaved(2, 4, 2)):
        losses = ranks_of(4).run(in_world, 2, drawn_again, schedule, quiet=True)
        assert losses[0] == losses[1] != 2 * 1001  # two rows of a micro-batch, had nothing been dropped


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_float32(ranks_of, p):
    cases = []
    for s in (one_f_one_b(p, p + 1), zbv(p, 2 * p)):
        build = lambda n=s.stages: language_model(n, torch.float32)  # noqa: E731
        cases.append(
            case(f"{s!r}"[:60], build, s, (words_of(9), words_of(9, 1)), loss=word_loss_32, rtol=1e-5, atol=1e-6)
        )
    agree(ranks_of, p, cases)


def word_loss_32(logits, words):
    return nn.functional.cross_entropy(logits.flatten(0, -2), words.flatten())


def in_bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_autocast_on_and_off(ranks_of, p):
    """bfloat16 between the stages; beside the same micro-batches under autocast in one process, so within float32's
    rounding of the sums. The second step is without, the third with it again."""
    cases = []
    for s in (one_f_one_b(p, p + 1), zbv(p, p + 1)):
        m = s.micro_batches
        lists = [(list(words_of(2 * m, k).split(2)), list(words_of(2 * m, k + 9).split(2))) for k in range(2)]
        build = lambda n=s.stages: language_model(n, torch.float32)  # noqa: E731
        for context in (in_bfloat16, None):
            near = {"rtol": 1e-2, "atol": 1e-5} if context else {"rtol": 1e-5, "atol": 1e-6}
            cases.append(case(f"{context} {s!r}"[:60], build, s, *lists, loss=word_loss_32, context=context, **near))
    agree(ranks_of, p, cases)


def switching(schedule):
    """One pipeline under autocast, without, and with it again: what travels is told anew."""
    layers, plain = (language_model(4, torch.float32) for _ in range(2))
    pipeline = Pipeline(layers, schedule, word_loss_32)
    for on in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            got = stepped(pipeline, words_of(8), words_of(8, 1))
            wanted = one_process(plain, words_of(8), words_of(8, 1), word_loss_32)
        close(got, wanted, f"autocast {on}", rtol=2e-2 if on else 1e-5, atol=1e-5)


def test_autocast_switched_between_steps(ranks_of):
    ranks_of(4).run(switching, one_f_one_b(4, 4), quiet=True)
    ranks_of(4).run(switching, zero_bubble(4, 4), quiet=True)


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_other_sizes_and_lengths_with_each_step(ranks_of, p):
    sizes = [(9, 5), (9, 3), (12, 3), (9, 5), (8, 1), (30, 2)]
    batches = [(words_of(r, k, length), words_of(r, k + 9, length)) for k, (r, length) in enumerate(sizes)]
    cases = [
        case(f"{s!r}"[:60], lambda n=s.stages: language_model(n), s, *batches, loss=word_loss)
        for s in (one_f_one_b(p, p + 1), interleaved(p, 2 * p, 2), zbv(p, p))
    ]
    agree(ranks_of, p, cases)


def with_gradient_of_input(schedule):
    layers, plain = mlp(schedule.stages + 1), mlp(schedule.stages + 1)
    pipeline = Pipeline(layers, schedule, nn.functional.mse_loss)
    for step, wanting in enumerate((True, False, True)):
        x, y = (rows_of(9, step).requires_grad_(wanting) for _ in range(2))
        for given, run in ((x, one_process), (y, None)):
            twice = given * 2  # not a leaf
            if run:
                one_process(plain, twice, rows_of(9, 5), nn.functional.mse_loss)
            else:
                stepped(pipeline, twice, rows_of(9, 5))
        same_gradients(pipeline, plain, f"{wanting}", rtol=1e-10, atol=1e-12)
        if wanting and schedule.rank_of[0] == dist.get_rank():
            close(y.grad, x.grad, "input's gradient", rtol=1e-10, atol=1e-12)
        else:
            assert y.grad is None


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_an_input_that_requires_a_gradient_is_given_one(ranks_of, p):
    for schedule in (one_f_one_b(p, p + 1), zbv(p, p + 1)):
        ranks_of(4).run(in_world, p, with_gradient_of_input, schedule, quiet=True)


def evaluation(schedule):
    n = max(4, schedule.stages)
    layers, plain = language_model(n, dropout=0.2), language_model(n, dropout=0.2)
    pipeline = Pipeline(layers, schedule, word_loss)
    for net in (pipeline, *plain):
        net.eval()
    for rows in (9, 9, 12, 9):
        words, rank, home = words_of(rows), dist.get_rank(), schedule.rank_of
        with torch.no_grad():
            got = stepped(pipeline, words, words_of(rows, 1))
            wanted = one_process(plain, words, words_of(rows, 1), word_loss)
            close(got, wanted, "loss of an evaluation")
        wanted = nn.Sequential(*plain)(words).detach()
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with context():
                logits = pipeline(words if rank == home[0] else None)
            assert (logits is None) == (rank != home[-1])
            if logits is not None:
                close(logits, wanted, "forward")
                assert not logits.requires_grad
        assert all(p.grad is None or not p.grad.any() for p in pipeline.parameters())
        stepped(pipeline, words, words_of(rows, 1))
        one_process(plain, words, words_of(rows, 1), word_loss)
        same_gradients(pipeline, plain, "between evaluations", rtol=1e-10, atol=1e-12)
        pipeline.zero_grad(), nn.Sequential(*plain).zero_grad()
    assert all(not stage.held for stage in pipeline._stages.values())


@pytest.mark.share(2)
@pytest.mark.parametrize("p", WORLDS)
def test_evaluation_without_gradients_between_steps(ranks_of, p):
    for schedule in (one_f_one_b(p, p + 1), interleaved(p, 2 * p, 3), zbv(p, p)):
        ranks_of(4).run(in_world, p, evaluation, schedule, quiet=True)
