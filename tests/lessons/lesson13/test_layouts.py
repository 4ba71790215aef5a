"""Every layout that can be run trains as one process does, and holds what the formulas say."""

import pytest
import torch
from torch.nn import functional as F

from pardist_lib import RankError
from pardist_lib.lessons.lesson13.layouts import described, make_step, memory_of, runnable
from pardist_lib.lessons.transformer import GPT
from pardist_lib.measure.costs import Plan, training_memory

MODEL, BATCH = described(64, 4, 4, 96, 32), 8
LAYOUTS = [
    Plan(dp=4, micro=2), Plan(dp=4, micro=1), Plan(tp=4, micro=8), Plan(tp=4, sp=True, micro=8),
    Plan(dp=2, tp=2, micro=2), Plan(dp=2, tp=2, zero=1, micro=4), Plan(dp=4, zero=1, micro=1),
    Plan(dp=4, zero=2, micro=2), Plan(dp=4, zero=3, micro=1), Plan(pp=4, micro=1), Plan(pp=4, micro=2),
    Plan(dp=2, pp=2, micro=1),
]  # fmt: skip


def alone():
    """Losses of three steps on the whole batch, in one process."""
    torch.manual_seed(0)
    model = GPT(96, 64, 4, 4, 32)
    text = torch.randint(96, (BATCH, 33))
    optimizer, losses = torch.optim.AdamW(model.parameters()), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses_of(plan):
    training = make_step(MODEL, plan, BATCH)
    return [training.step() for _ in range(3)]


@pytest.mark.parametrize("plan", LAYOUTS, ids=str)
def test_a_layout_trains_as_one_process_does(ranks_of, plan):
    """The mean of the ranks' losses, where each has the whole of its rows' loss."""
    found = ranks_of(4).run(losses_of, plan, quiet=True)
    whole = [one for one in found if one[0] is not None]
    mean = torch.tensor(whole).mean(0).tolist()
    assert mean == pytest.approx(alone(), rel=2e-5)


@pytest.mark.parametrize("plan", LAYOUTS, ids=str)
def test_memory_by_kind(ranks_of, plan):
    """Within 10 % of the formulas on the fullest rank, kind by kind (it is within 2)."""
    found = max(ranks_of(4).run(memory_of, MODEL, plan, BATCH, quiet=True), key=lambda kinds: sum(kinds.values()))
    computed = training_memory(MODEL, plan, BATCH, "float32")
    for kind, size in found.items():
        assert computed[kind] == pytest.approx(size, rel=0.1), kind


def test_what_cannot_be_run_is_refused(ranks_of):
    for plan in (Plan(tp=2, pp=2), Plan(cp=4), Plan(pp=4, v=2), Plan(pp=4, micro=4), Plan(dp=2, tp=2, zero=3)):
        assert not runnable(plan, BATCH)
    with pytest.raises(RankError, match="cannot be run here"):
        ranks_of(4).run(make_step, MODEL, Plan(tp=2, pp=2), BATCH, quiet=True)
