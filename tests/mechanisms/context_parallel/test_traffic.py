"""What attention of a dealt-out sequence sends, to the byte; when; and what it keeps."""

import gc
from itertools import pairwise

import pytest
import torch

from pardist_lib.lessons.worlds import in_world
from pardist_lib.mechanisms.context_parallel import ring
from pardist_lib.mechanisms.context_parallel.order import deal, shares, tokens
from pardist_lib.mechanisms.context_parallel.visible import ROWS
from tests.mechanisms.context_parallel.cases import ATTENTIONS

BATCH, HEADS, KV, D, E = 2, 24, 12, 4, 3


def attention(how, s, backward, dtype=torch.float32, kv=KV, length=None):
    q, k, v = (torch.zeros(BATCH, h, s, d, dtype=dtype) for h, d in ((HEADS, D), (kv, D), (kv, E)))
    own = [deal(x, dim=2).requires_grad_() for x in (q, k, v)]
    y = ATTENTIONS[how](*own, length=length)
    if backward:
        y.sum().backward()


def sent(ranks, *arguments, **more):
    """[rank] → bytes of its messages, and the set of the other calls."""
    trace = ranks.trace(attention, *arguments, **more)
    mine = [[e for e in trace.collectives if e.rank == rank and e.name != "recv"] for rank in range(ranks.n)]
    messages = [sum(e.bytes for e in events if e.name == "send") for events in mine]
    return messages, {(e.name, e.bytes) for events in mine for e in events if e.name != "send"}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("s", [48, 29])
def test_a_ring_sends_keys_and_values_once_forward_and_twice_backward(ranks_of, n, s):
    own = [tokens(share) for share in shares(s, n)]
    token = BATCH * KV * (D + E) * 4  # bytes of K and V of a token
    forward, asked = sent(ranks_of(n), "ring", s, backward=False)
    assert forward == [token * (s - own[(rank + 1) % n]) for rank in range(n)]
    assert asked == {("all_gather", 96)}
    both, _ = sent(ranks_of(n), "ring", s, backward=True)
    assert [b - 2 * f for f, b in zip(forward, both, strict=True)] == [token * (s - own[rank]) for rank in range(n)]
    if s == 48:
        assert forward == [(n - 1) * token * s // n] * n and both == [3 * f for f in forward]
    halves, _ = sent(ranks_of(n), "ring", s, backward=True, dtype=torch.bfloat16, length=s)
    assert halves == [f + token * (s - o) for f, o in zip(forward, own, strict=True)]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("kv", [HEADS, KV])
def test_an_all_to_all_sends_a_quarter_of_what_remains_of_each(ranks_of, n, kv):
    s = 48
    forward, asked = sent(ranks_of(n), "all to all", s, backward=False, kv=kv)
    numbers = BATCH * s * (HEADS * D + kv * D + kv * E + HEADS * E)
    assert forward == [4 * numbers * (n - 1) // n**2] * n and asked == {("all_gather", 96)}
    both, _ = sent(ranks_of(n), "all to all", s, backward=True, kv=kv)
    assert both == [2 * f for f in forward]


def test_who_knows_the_length_need_not_ask(ranks_of):
    for how in ATTENTIONS:
        messages, others = sent(ranks_of(4), how, 29, backward=True, length=29)
        assert all(messages) and not others


# ---- when -----------------------------------------------------------------------------------------------------


def order_of_events():
    """What a rank does in forward and backward, in words."""
    events, saved = [], {name: getattr(ring, name) for name in ("exchange", "wait", "attend", "attend_backward")}

    def told(name):
        return lambda *arguments: (events.append(name), saved[name](*arguments))[1]

    for name in saved:
        setattr(ring, name, told(name))
    try:
        attention("ring", 16, backward=True)
    finally:
        for name, function in saved.items():
            setattr(ring, name, function)
    return [a for a, b in pairwise([*events, ""]) if a != b or not a.startswith("attend")]


def test_the_next_keys_travel_while_these_are_worked_on(ranks_of):
    n = 3
    step, back = ["exchange", "attend", "wait"], ["exchange", "attend_backward", "wait"]
    first_found = ["exchange", "attend_backward", "exchange", "wait"]  # the first dK and dV leave, K and V arrive
    last_found = ["attend_backward", "wait", "exchange", "wait"]  # dK and dV arrive, leave again, and come home
    for events in ranks_of(4).run(in_world, n, order_of_events, quiet=True)[:n]:
        assert events == step * (n - 1) + ["attend"] + back + first_found + last_found


# ---- how much is kept -----------------------------------------------------------------------------------------


def memory(how, s, mask):
    """(bytes held after forward, the most bytes held in a step), both above what was there before."""
    q, k, v = (torch.zeros(1, 4, s, 64) for _ in range(3))
    own = [deal(x, dim=2).requires_grad_() for x in (q, k, v)]
    mask = (lambda q, k: q - k < 9) if mask else None
    found = []
    for _ in range(2):  # gloo's thread may let go of a tensor late
        gc.collect()
        with torch.profiler.profile(profile_memory=True) as forward:
            y = ATTENTIONS[how](*own, mask=mask)
        with torch.profiler.profile(profile_memory=True) as backward:
            y.sum().backward()
        changes = [changes_of(forward), changes_of(backward)]
        found.append((sum(changes[0]), most(changes[0] + changes[1])))
        for x in own:
            x.grad = None
    return tuple(min(numbers) for numbers in zip(*found, strict=True))


def changes_of(profile):
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def most(changes):
    held = top = 0
    for change in changes:
        held += change
        top = max(top, held)
    return top


@pytest.mark.parametrize("how", ATTENTIONS)
@pytest.mark.parametrize("mask", [False, True])
def test_memory_falls_as_ranks_are_added_and_grows_as_the_sequence(ranks_of, how, mask):
    s = 1024
    kept, peaks = {}, {}
    for n, length in ((1, s), (2, s), (4, s), (4, 2 * s)):
        results = ranks_of(4).run(in_world, n, memory, how, length, mask, quiet=True)[:n]
        kept[n, length], peaks[n, length] = (max(numbers) for numbers in zip(*results, strict=True))
    token, lse = 4 * 64 * 4, 4 * 4  # bytes of a token's q, k, v or result, and of one number for each head
    if how == "ring":
        for (n, length), held in kept.items():  # the result, and its log-sum-exp
            assert held <= (token + lse) * length / n + 1000, kept
        for (n, length), held in peaks.items():  # dq, the result; K, V twice, dK, dV four times; two blocks of scores
            assert held < 1.05 * (14 * token + 2 * 4 * ROWS * 4) * length / n, peaks
    else:
        for (n, length), held in kept.items():  # q, k, v, the result for a part of the heads, and for the own tokens
            assert held <= (5 * token + lse) * length / n + 1000, kept
        assert peaks[4, s] < 0.55 * peaks[1, s] and peaks[2, s] < 0.75 * peaks[1, s], peaks
        assert peaks[4, 2 * s] < 2.05 * peaks[4, s], peaks
