"""The exercises of lesson 07: hints, and how an answer is checked."""

import gc
import time

import torch
import torch.distributed as dist

from .cases import number, numbers, values
from .judge import Wrong, equal, only_calls, same, type_of
from .watch import _under_way, watched

F32, F64 = torch.float32, torch.float64


class padded_shard:
    hints = (
        "All n shards together must have room for numel elements: how long is the shortest shard that does it? "
        "-(-a // b) is a / b rounded up.",
        "Without regard to the end of the line the rank's shard is rank * length to (rank + 1) * length. Both can lie "
        "beyond numel: min(…, numel) cuts them off.",
        "What is missing to the full length is padding: length - (stop - start).",
    )

    @staticmethod
    def check(run):
        cases = [(8, 4), (10, 4), (7, 3), (5, 4), (3, 4), (0, 2), (6, 1), (1_000_003, 64)]
        [seen] = run(_all_shards, cases, n=1)
        for (numel, n), shards in zip(cases, seen.result, strict=True):
            _judge_shards(numel, n, shards)


def _all_shards(answer, cases):
    return watched(lambda: [[answer(numel, rank, n) for rank in range(n)] for numel, n in cases])


def _judge_shards(numel, n, shards):
    length = -(-numel // n)
    right = [(min(r * length, numel), min((r + 1) * length, numel)) for r in range(n)]
    right = [(start, stop, length - (stop - start)) for start, stop in right]
    for rank, (got, want) in enumerate(zip(shards, right, strict=True)):
        where = f"rank {rank}, {numel:,} elements on {n} rank{'s' * (n > 1)}"
        shown = {"expected": str(want), "got": str(got)}
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            raise Wrong(f"it returns {type_of(got)}: three whole numbers (start, stop, padding) are asked for", where)
        if strange := [v for v in got if not isinstance(v, int) or isinstance(v, bool)]:
            use = "use // instead of /" if isinstance(strange[0], float) else f"a {type_of(strange[0])} is among them"
            raise Wrong(f"whole numbers (int) are asked for: {use}", where, **shown)
        if tuple(got) != want:
            raise Wrong(_why(numel, n, rank, got, want, length), where, **shown)


def _why(numel, n, rank, got, want, length):
    start, stop, padding = got
    down, (start_wanted, stop_wanted, _) = numel // n, want
    four = -(-numel // 4)
    if n != 4 and tuple(got) == (a := min(rank * four, numel), b := min(a + four, numel), four - (b - a)):
        return f"this is right for 4 ranks, and here are {n}: is a 4 written into it?"
    if numel % n and stop - start == down and length > down and stop == (rank + 1) * down:
        return f"shards of {down} elements hold {n * down} of {numel}: the length has to be rounded up"
    if stop > numel:
        return f"stop is {stop}, but the line has {numel} elements: what lies beyond is padding"
    if start > stop:
        return f"start {start} is beyond stop {stop}: a shard of padding alone begins and ends at {numel}"
    if start == stop and start_wanted == numel:
        return f"a shard of padding alone begins and ends at the line's end, at {numel}"
    if start == start_wanted and stop == stop_wanted - start_wanted != stop_wanted:
        return f"stop is where the shard ends on the line, at {stop_wanted}: {stop} is its length"
    if (start, stop) == (start_wanted, stop_wanted):
        if padding == n * length - numel:
            return f"padding {padding} is what the whole line needs: each shard has only its own part of it"
        if padding == stop - start:
            return f"the third number is the shard's length, {padding}: its padding, {want[2]}, is asked for"
        return f"start and stop are right, padding is not: shards are {length} long with it"
    uneven = [down + (r < numel % n) for r in range(n)]
    if (start, stop) == (sum(uneven[:rank]), sum(uneven[: rank + 1])):
        return "this cuts the line evenly: with padding, every shard but the last ones is full"
    if start == start_wanted and stop == stop_wanted - 1:
        return "stop is one too small: line[start:stop] does not include it"
    return f"with padding every shard is {length} long, and rank {rank}'s begins at {rank} · {length}"


# ---- memory ---------------------------------------------------------------------------------------------------


class zero_memory:
    hints = (
        "Three kinds, each with its own bytes a parameter: parameters, gradients, optimizer state. Each is either "
        "held whole by every rank, or one n-th of it.",
        "Stage 1 shards the state, stage 2 the gradients as well, stage 3 the parameters as well.",
        "held = parameter_bytes / (n if stage >= 3 else 1), and so on for the two others; times parameters.",
    )

    @staticmethod
    def check(run):
        inputs, labels = [], []
        for stage in range(4):
            for psi, n, *kinds in ((1_000_000, 4), (7_500_000_000, 64, 2, 2, 12), (1000, 3, 4, 2, 1), (100, 1)):
                inputs.append((psi, n, stage, *(kinds or (4, 4, 8))))
                about = "" if not kinds else f", {kinds[0]} + {kinds[1]} + {kinds[2]} bytes"
                labels.append(f"{psi:,} parameters, {n} rank{'s' * (n > 1)}, stage {stage}{about}")

        def held(psi, n, stage, p=4, g=4, s=8):
            return psi * (p / (n if stage > 2 else 1) + g / (n if stage > 1 else 1) + s / (n if stage > 0 else 1))

        mistakes = [
            ("the bytes of each kind are ignored: 4, 4 and 8 are only their defaults",
             lambda psi, n, stage, *kinds: held(psi, n, stage)),
            ("parameter_bytes is not used: 4 is only its default",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, 4, g, s)),
            ("gradient_bytes is not used: 4 is only its default",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, p, 4, s)),
            ("state_bytes is not used: 8 is only its default",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, 8)),
            ("stage 2 does no more than stage 1 here: it shards the gradients, too",
             lambda psi, n, stage, *kinds: held(psi, n, 1 if stage == 2 else stage, *kinds)),
            ("stage 2 does what stage 3 does here: it leaves the parameters whole",
             lambda psi, n, stage, *kinds: held(psi, n, 3 if stage == 2 else stage, *kinds)),
            ("n is not used: this is for 4 ranks", lambda psi, n, stage, *kinds: held(psi, 4, stage, *kinds)),
            ("at stage 3 the gathered parameters are counted: they are not held all the time",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, s) + psi * p * (stage == 3)),
            ("the stages are shifted by one: stage 0 shards nothing",
             lambda psi, n, stage, *kinds: held(psi, n, stage + 1, *kinds)),
            ("the stages are shifted by one: stage 1 shards the optimizer's state",
             lambda psi, n, stage, *kinds: held(psi, n, stage - 1, *kinds)),
            ("each stage shards only its own kind here: stage 2 shards the state too, stage 3 all three",
             lambda psi, n, stage, p, g, s: psi * (p / (n if stage == 3 else 1) + g / (n if stage == 2 else 1)
                                                   + s / (n if stage == 1 else 1))),
            ("this is for all ranks together: one rank is asked for",
             lambda psi, n, stage, *kinds: n * held(psi, n, stage, *kinds)),
            ("the order is wrong: first the optimizer's state is sharded, the parameters last",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, s, g, p)),
            ("at every stage everything is divided by n", lambda psi, n, stage, *kinds: psi * sum(kinds) / n),
            ("nothing is divided by n: what is sharded is held to one n-th", lambda psi, n, stage, *kinds:
             psi * sum(kinds)),
            *((f"this is in {unit}: bytes are asked for", lambda *args, unit=unit, size=size: held(*args) / size)
              for unit, size in (("GB", 1e9), ("MB", 1e6), ("GiB", 2**30), ("MiB", 2**20), ("bits", 1 / 8))),
            ("at stage 1 the gradients are still whole: only stage 2 shards them",
             lambda psi, n, stage, p, g, s: psi * (p / (n if stage > 2 else 1) + (g + s) / (n if stage > 0 else 1))),
            ("the order is wrong: stage 2 shards the gradients, and only stage 3 the parameters",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, g, p, s)),
            ("state_bytes is not used: the state need not be two numbers of the parameters' kind",
             lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, 2 * p)),
            ("n-ths are rounded up here: divide with /, and round nothing", lambda psi, n, stage, p, g, s: sum(
                b * (-(-psi // n) if stage > level else psi) for b, level in ((p, 2), (g, 1), (s, 0)))),
            ("n-ths are rounded down here: divide with /, not with //",
             lambda psi, n, stage, p, g, s: psi * p // (n if stage > 2 else 1) + psi * g // (n if stage > 1 else 1)
             + psi * s // (n if stage > 0 else 1)),
        ]  # fmt: skip
        numbers(run, inputs, [held(*args) for args in inputs], labels, mistakes)


# ---- a step of ZeRO-1 -----------------------------------------------------------------------------------------

STEPS = 2


def _rates(seed):
    """(lr, beta): others in the second case, in case somebody writes them down."""
    return (0.1, 0.9) if seed == 0 else (0.3, 0.6)


def _start(k, n, dtype, seed):
    """(parameters, whole momentum, [gradients of each rank, for each step])"""
    gradients = [[values((k,), dtype, rank, seed + 10 * (step + 1)) for rank in range(n)] for step in range(STEPS)]
    return values((k,), dtype, 0, seed), values((k,), dtype, 77, seed), gradients


def _counted(seen, n):
    """`seen`, where a reduce_scatter of a list is one call (gloo makes n of it, and torch counts those), and
    functional collectives have the names of the others."""
    for call in seen.calls:
        call.op = {"all_gather_into_tensor": "all_gather", "all_to_all_single": "all_to_all"}.get(call.op, call.op)
    seen.hidden = max(0, seen.hidden - (n - 1) * sum(call.op == "reduce_scatter" for call in seen.calls))
    return seen


def _take_steps(answer, k, dtype, seed):
    rank, n = dist.get_rank(), dist.get_world_size()
    parameters, momentum, gradients = _start(k, n, dtype, seed)
    parameters, momentum = parameters.clone(), momentum.chunk(n)[rank].clone()
    own = [g[rank].clone() for g in gradients]
    seen = watched(lambda: [answer(parameters, g, momentum, *_rates(seed)) for g in own][-1])
    read_only = all(torch.equal(g, before[rank]) for g, before in zip(own, gradients, strict=True))
    seen.kept = {"parameters": parameters, "momentum": momentum, "read_only": read_only}
    return _counted(seen, n)


def _by_rule(k, n, dtype, seed, mean=None, rule=None, gathered=True, rates=None, steps=STEPS):
    """(every rank's parameters, every rank's momentum) after the steps, by the right rule or a mistaken one."""
    parameters, momentum, gradients = _start(k, n, dtype, seed)
    mean = mean or (lambda g, rank: sum(g) / n)
    lr, beta = rates or _rates(seed)
    rule = rule or (lambda p, m, g: (p - lr * (beta * m + g), beta * m + g))
    shards = [list(parameters.chunk(n)) for _ in range(n)]
    momenta = list(momentum.chunk(n))
    for g in gradients[:steps]:
        for rank in range(n):
            own = mean(g, rank).chunk(n)[rank]
            shards[rank][rank], momenta[rank] = rule(shards[rank][rank], momenta[rank], own)
        if gathered:
            shards = [[shards[owner][owner] for owner in range(n)]] * n
            shards = [list(s) for s in shards]
    return [torch.cat(s) for s in shards], momenta


ONLY_SHARDS = {
    "all_reduce": "it calls all_reduce, which brings the whole mean to every rank: a rank needs its own n-th, and "
    "reduce_scatter brings that for half the bytes",
    "broadcast": "it broadcasts: one all_gather brings every rank's shard to all",
    "": "it calls {op}: one reduce_scatter and one all_gather do it",
}


class zero1_step:
    hints = (
        "Three parts: dist.reduce_scatter(mean, list(gradients.chunk(n))) leaves the sum of everybody's rank-th n-th "
        "in `mean`; then the optimizer's rule on that n-th; then an all_gather of the parameters.",
        "reduce_scatter gives a sum: divide by n. The rule in place: momentum.mul_(beta).add_(mean), then "
        "parameters.chunk(n)[rank] -= lr * momentum.",
        "chunk gives views, so dist.all_gather(list(parameters.chunk(n)), mine.clone()) writes into parameters.",
    )

    @staticmethod
    def check(run):
        for seed, (n, k, dtype) in enumerate([(4, 8, F32), (4, 20, F64), (3, 9, F64), (2, 6, F32), (4, 4096, F32)]):
            about = f"{STEPS} steps with {k} parameters, {str(dtype)[6:]}, on {n} ranks"
            seen = run(_take_steps, k, dtype, seed, n=n, about=about)
            only_calls(seen, ("reduce_scatter", "all_gather", "all_to_all", "send", "recv"), ONLY_SHARDS)
            try:
                _judge_step(seen, n, k, dtype, seed, about)
            except Wrong as wrong:
                if seed == 2:
                    wrong.diagnosis = (
                        f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {wrong.diagnosis}"
                    )
                raise


def _judge_step(seen, n, k, dtype, seed, about):
    case, (lr, beta) = (k, n, dtype, seed), _rates(seed)
    parameters, momentum, _ = _start(*case)
    expected, momenta = _by_rule(*case)
    rules = {
        f"the sum was not divided by {n}, the number of ranks": _by_rule(*case, lambda g, _: sum(g)),
        f"divided twice by {n}": _by_rule(*case, lambda g, _: sum(g) / n**2),
        "nothing was reduced: each shard is updated with its owner's gradient alone": _by_rule(
            *case, lambda g, r: g[r]
        ),
        "the shards were not gathered: a rank has updated its own n-th only": _by_rule(*case, gathered=False),
        "the sign is wrong: parameters go down along the momentum": _by_rule(
            *case, rule=lambda p, m, g: (p + lr * (beta * m + g), beta * m + g)
        ),
        "the step uses the gradient instead of the new momentum": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * g, beta * m + g)
        ),
        "the parameters are updated before the momentum: the step uses the old one": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * m, beta * m + g)
        ),
        "the gradient is multiplied by 1 - beta: momentum is beta * momentum + gradient": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * (beta * m + (1 - beta) * g), beta * m + (1 - beta) * g)
        ),
        "the momentum is never kept: write it into `momentum`, the next step needs it": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * (beta * m + g), m)
        ),
        "the old momentum is lost: momentum is beta * momentum + gradient": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * g, g)
        ),
        "this is Nesterov's step, gradient + beta * momentum: the momentum alone is asked for": _by_rule(
            *case, rule=lambda p, m, g: (p - lr * (g + beta * (beta * m + g)), beta * m + g)
        ),
    }
    rules["lr is multiplied into the momentum: it belongs to the step, parameters - lr * momentum"] = _by_rule(
        *case, rule=lambda p, m, g: (p - (beta * m + lr * g), beta * m + lr * g)
    )
    if seed:
        first = _rates(0)
        for what, rates in (("lr is", (first[0], beta)), ("beta is", (lr, first[1])), ("lr and beta are", first)):
            why = f"{what} not used: it is right where they are {first[0]} and {first[1]}, and here {lr} and {beta}"
            rules[why] = _by_rule(*case, rates=rates)
        rules[f"beta is not used: here it is {beta}, and not 1 - lr"] = _by_rule(*case, rates=(lr, 1 - lr))
    before = _by_rule(*case, steps=STEPS - 1)[0][0].chunk(n)
    stale = [torch.cat([p if o == r else before[o] for o, p in enumerate(whole.chunk(n))])
             for r, whole in enumerate(expected)]  # fmt: skip
    mistakes = [(why, would[0]) for why, would in rules.items()]
    mistakes.append(("the shards are gathered before the step: the others have this rank's old one", stale))
    backwards = torch.cat(list(expected[0].chunk(n))[::-1])
    mistakes.append(("the shards are in the wrong order: shard r is rank r's", [backwards] * n))
    idle = "parameters are as they were: write the new shard into them, and those that are gathered"
    mistakes.append((idle, [parameters] * n))
    same([s.kept["parameters"] for s in seen], expected, "parameters", about, mistakes)
    same([s.kept["momentum"] for s in seen], momenta, "momentum", about,
         [("the momentum is never kept: write it into `momentum`", list(momentum.chunk(n)))])  # fmt: skip
    for rank, one in enumerate(seen):
        if not one.kept["read_only"]:
            raise Wrong("the result is right, but `gradients` was changed: work on what reduce_scatter gives",
                        f"rank {rank}, {about}")  # fmt: skip
    _judge_moved(seen, n, STEPS * parameters.nbytes, 2, about)


def _judge_moved(seen, n, size, times, about):
    """Raise Wrong where more than `times`·(n − 1)/n·size bytes leave a rank."""
    enough = times * (n - 1) * size // n
    for rank, one in enumerate(seen):
        made = _moved(one.calls, n)
        if made > enough:
            raise Wrong(
                f"the result is right, but {made:,.0f} bytes leave a rank where {enough:,} are enough: "
                "is something moved whole, or twice?",
                f"rank {rank}, {about}", f"{enough:,} bytes", f"{made:,.0f} bytes",
            )  # fmt: skip


def _moved(calls, n):
    """Bytes that leave a rank for these calls, as the best implementation would send them. (A call's bytes are those
    of the tensor that it fills: one n-th for a reduce_scatter, all for an all_gather.)"""
    share = {"reduce_scatter": n - 1, "all_to_all": (n - 1) / n, "all_gather": (n - 1) / n, "send": 1, "recv": 0}
    return sum(call.bytes * share[call.op] for call in calls)


# ---- a layer of ZeRO-3 ----------------------------------------------------------------------------------------

WHOLE_KEPT = (
    "{:,} bytes are kept from forward to backward besides x, shard and output, and the whole weight has {:,}: save the "
    "shard, and gather it again in backward"
)
KEPT_SINCE = (
    "backward computes with a weight, or parts of it, kept from forward, and shard has changed since (the check did "
    "it): save the shard, and gather it again in backward"
)


def _layers(seed, rank, sizes, batch, dtype):
    """(x, [whole weight of each layer], gradient of the output)"""
    weights = [values((b, a), dtype, 50 + i, seed) for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))]
    return values((batch, sizes[0]), dtype, rank, seed), weights, values((batch, sizes[-1]), dtype, 20 + rank, seed)


def _use(answer, seed, sizes, batch, dtype):
    rank, n = dist.get_rank(), dist.get_world_size()
    x, weights, gradient = _layers(seed, rank, sizes, batch, dtype)
    shards = [w.flatten().chunk(n)[rank].clone().requires_grad_() for w in weights]
    x.requires_grad_()
    saved, outputs = [], []  # (what `watched` returns is a copy without a graph)

    def forward():
        y = x
        for shard, weight in zip(shards, weights, strict=True):
            outputs.append(y := answer(y, shard, len(weight)))
        return y

    gc.collect()
    before = _memory(_tensors())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        seen = _counted(watched(forward), n)
    _under_way.clear()  # else what the calls filled would be alive still
    known = before | _memory(t for t in [*outputs, seen.result, x, *shards] if isinstance(t, torch.Tensor))
    for _ in range(20):  # gloo's threads may hold on to tensors for a moment
        gc.collect()
        kept = {at: size for at, size in _memory([*_tensors(), *saved]).items() if at not in known}
        if batch > 1 or max(kept.values(), default=0) < shards[0].nbytes:
            break
        time.sleep(0.05)
    y = outputs[-1]
    seen.kept = {"graph": isinstance(y, torch.Tensor) and y.requires_grad, "saved": sum(kept.values())}
    seen.kept |= {"copy": shards[0].nbytes in kept.values(), "backward": None}
    if seen.kept["graph"] and y.shape == gradient.shape:
        if batch == 1:  # the case that looks at what is kept
            for shard in shards:
                shard.data *= CHANGED
        given, x_before = gradient.clone(), _layers(seed, rank, sizes, batch, dtype)[0]
        shards_before = [shard.detach().clone() for shard in shards]
        after = _counted(watched(lambda: y.backward(given)), n)
        pairs = {"`x`": [(x, x_before)], "`shard`": list(zip(shards, shards_before, strict=True)),
                 "the gradient that backward is given": [(given, gradient)]}  # fmt: skip
        seen.kept |= {"backward": after.calls, "x": x.grad, "shards": [s.grad for s in shards]}
        seen.kept["changed"] = [what for what, both in pairs.items() if not all(torch.equal(a, b) for a, b in both)]
        for name in ("reference", "torchs", "hidden", "unwaited", "early"):
            setattr(seen, name, getattr(seen, name) or getattr(after, name))
    return seen


CHANGED = -3.0  # the shards are multiplied by it between forward and backward


def _tensors():
    """The tensors that are alive."""
    return [t for t in gc.get_objects() if type(t) is torch.Tensor]


def _memory(tensors):
    """{address: bytes} of the memory behind tensors."""
    found = {}
    for t in tensors:
        try:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
            pass
    return found


NO_OTHER = {
    "all_reduce": "it calls all_reduce, which brings the whole gradient to every rank: a rank keeps its own n-th, and "
    "reduce_scatter brings that for half the bytes",
    "scatter": "its backward calls scatter, as that of torch.distributed.nn's all_gather does, for which autograd "
    "keeps the whole weight: write backward yourself, in a torch.autograd.Function",
    "": "it calls {op}: all_gather and reduce_scatter do it",
}


class sharded_linear:
    hints = (
        "torch.autograd.Function is a class with two static methods: forward(ctx, x, shard) returns the output, "
        "backward(ctx, gradient) returns one gradient for each argument of forward. ctx.save_for_backward(…) keeps "
        "tensors, ctx.saved_tensors has them again. Call it as Linear.apply(x, shard).",
        "Forward: all_gather the shards, torch.cat them, view as (out_features, -1), and x @ weight.T. Save x and "
        "shard only: the weight is gone when forward returns.",
        "Backward: gather the weight again for gradient @ weight, the gradient of x. The weight's is gradient.T @ x: "
        "reduce_scatter its n chunks and divide by n.",
    )

    @staticmethod
    def check(run):
        cases = [
            (4, (6, 8), 3, F32), (4, (5, 4), 2, F64), (3, (4, 6), 3, F64), (2, (3, 2), 2, F32), (4, (4, 8, 6), 2, F64),
            (4, (64, 48), 1, F64),
        ]  # fmt: skip
        for seed, (n, sizes, batch, dtype) in enumerate(cases):
            layers = "" if len(sizes) == 2 else ", two layers one after the other"
            about = f"{sizes[0]} → {sizes[-1]} features, {batch} rows a rank, {str(dtype)[6:]}, {n} ranks{layers}"
            try:
                _judge_use(run(_use, seed, sizes, batch, dtype, n=n, about=about), seed, sizes, batch, dtype, about)
            except Wrong as wrong:
                if layers:
                    wrong.diagnosis = (
                        f"one layer works, two do not (is something kept outside of ctx?): {wrong.diagnosis}"
                    )
                if seed == 2:
                    wrong.diagnosis = (
                        f"it works with 4 ranks, but not with 3 (is a 4 written into it?): {wrong.diagnosis}"
                    )
                raise


def _judge_use(seen, seed, sizes, batch, dtype, about):
    n = len(seen)
    size = sum(w.nbytes for w in _layers(seed, 0, sizes, batch, dtype)[1])
    outputs, x_grads, w_grads = [], [], []
    for rank in range(n):
        x, weights, gradient = _layers(seed, rank, sizes, batch, dtype)
        x.requires_grad_()
        y = x
        for w in weights:
            y = y @ w.requires_grad_().T
        y.backward(gradient)
        outputs.append(y.detach())
        x_grads.append(x.grad)
        w_grads.append([w.grad for w in weights])
    only_calls(seen, ("all_gather", "send", "recv"), {
        "broadcast": "it broadcasts in forward: one all_gather brings every rank's shard to all",
        "": "it calls {op} in forward: one all_gather is all that is needed"})  # fmt: skip
    mistakes = []
    if len(sizes) == 2:
        inputs = [_layers(seed, rank, sizes, batch, dtype) for rank in range(n)]
        wrong_view = [x @ w[0].reshape(sizes[0], sizes[1]) for x, w, _ in inputs]
        mistakes.append(("the weight is (out_features, in_features): here it was read as (in, out)", wrong_view))
    same([one.result for one in seen], outputs, "the output", about, mistakes)
    for rank, one in enumerate(seen):
        if not one.kept["graph"]:
            raise Wrong(
                "the output has no graph: torch.distributed's calls are not differentiable, so backward must be "
                "written, in a torch.autograd.Function", f"rank {rank}, {about}",
            )  # fmt: skip
        if one.kept["x"] is None:
            raise Wrong("x has no gradient: return it from backward, in the place of x", f"rank {rank}, {about}")
    mistakes = [
        ("x has the mean of the ranks' gradients: its rows are this rank's own", [sum(x_grads) / n] * n),
        (f"x's gradient is divided by {n}: its rows are this rank's own", [g / n for g in x_grads]),
    ]
    if batch == 1:
        _judge_memory(seen, size, about)
        old = all(one.kept["copy"] and equal(one.kept["x"], g) for one, g in zip(seen, x_grads, strict=True))
        x_grads = [(1.0 if old else CHANGED) * g for g in x_grads]  # (a copy of the shard is not a whole weight)
    try:
        same([one.kept["x"] for one in seen], x_grads, "the gradient of x", about, mistakes)
    except Wrong as wrong:
        if batch == 1:  # it was right in all other cases
            wrong.diagnosis = KEPT_SINCE
        raise
    for i in range(len(sizes) - 1):
        whole = [w[i] for w in w_grads]
        total = sum(whole).flatten().chunk(n)
        mistakes = [
            (f"the sum was not divided by {n}: shard.grad is the mean over the ranks", list(total)),
            (f"divided twice by {n}", [t / n**2 for t in total]),
            (f"divided by the {batch} rows: the loss has done that, only ranks are to be averaged over",
             [t / n / batch for t in total]),
            ("shard.grad is counted twice: backward returns it, and autograd adds it up", [2 * t / n for t in total]),
            ("nothing was reduced: shard.grad is cut from this rank's own gradient",
             [w.flatten().chunk(n)[r] for r, w in enumerate(whole)]),
            ("nothing was reduced, and the own gradient is divided by n",
             [w.flatten().chunk(n)[r] / n for r, w in enumerate(whole)]),
            ("every rank has the first n-th of the gradient: rank r keeps the r-th", [total[0] / n] * n),
            ("shard.grad is made from the transposed gradient: the weight's is gradient.T @ x",
             list((sum(w.T.flatten() for w in whole) / n).chunk(n))),
        ]  # fmt: skip
        got = [one.kept["shards"][i] for one in seen]
        if any(g is None for g in got):
            raise Wrong("shard has no gradient: return it from backward, in the place of shard", about)
        same(got, [t / n for t in total], "shard.grad", about, mistakes)
    for rank, one in enumerate(seen):
        where = f"rank {rank}, {about}"
        for what in one.kept["changed"]:
            raise Wrong(f"{what} was changed: others may use it too, work on a copy", where)
        for call in one.kept["backward"]:
            if call.op not in ("all_gather", "reduce_scatter", "all_to_all", "send", "recv"):
                raise Wrong(NO_OTHER.get(call.op, NO_OTHER[""]).format(op=call.op), where)
    _judge_moved(seen, n, size, 1, f"forward, {about}")
    for one in seen:
        one.calls = one.kept["backward"]
    _judge_moved(seen, n, size, 2, f"backward, {about}")


def _judge_memory(seen, size, about):
    for rank, one in enumerate(seen):
        if one.kept["saved"] >= size:
            raise Wrong(WHOLE_KEPT.format(one.kept["saved"], size), f"rank {rank}, {about}")


# ---- clipping -------------------------------------------------------------------------------------------------


def _gradients(rank, n, shapes, dtype, seed, scale):
    """This rank's tensors; the last rank has none where `shapes` says so."""
    mine = [] if shapes == "last has none" and rank == n - 1 else [(3,), (0,), (2, 2)] if rank % 2 else [(5,), (1,)]
    return [values(shape, dtype, 10 * rank + i, seed) * scale for i, shape in enumerate(mine)]


def _clip(answer, shapes, dtype, seed, scale, most):
    tensors = _gradients(dist.get_rank(), dist.get_world_size(), shapes, dtype, seed, scale)
    seen = watched(lambda: answer(list(tensors), most))
    seen.kept = torch.cat([torch.empty(0, dtype=dtype), *(t.flatten() for t in tensors)])
    return seen


class clip_sharded:
    hints = (
        "The norm is a square root of a sum of squares. Sums can be taken rank by rank and then over the ranks; square "
        "roots cannot.",
        "Add up the squares of this rank's elements in a tensor of one number, all_reduce that, then take the root. "
        "A rank without tensors takes part with 0.",
        "if norm > max_norm: for g in gradients: g *= max_norm / norm. Return norm.",
    )

    @staticmethod
    def check(run):
        cases = [(4, "", F64, 1.0, 0.5), (4, "", F64, 0.01, 0.5), (4, "last has none", F64, 1.0, 0.5),
                 (3, "", F32, 3.0, 0.5), (2, "last has none", F32, 2.0, 0.5), (4, "", F32, 0.0, 0.5),
                 (4, "", F64, 1.0, 8.0)]  # fmt: skip
        for seed, (n, shapes, dtype, scale, most) in enumerate(cases):
            about = f"{n} ranks, {str(dtype)[6:]} gradients, max_norm {most}"
            about += f", rank {n - 1} has none" if shapes else ""
            stuck = (
                f"rank {n - 1} has no gradients here, and does not make the call that the others make" if shapes else ""
            )
            seen = run(_clip, shapes, dtype, seed, scale, most, n=n, about=about, stuck=stuck)
            _judge_clip(seen, shapes, dtype, seed, scale, most, about)


def _judge_clip(seen, shapes, dtype, seed, scale, most, about):
    n = len(seen)
    before = [
        torch.cat([torch.empty(0, dtype=dtype), *(t.flatten() for t in _gradients(r, n, shapes, dtype, seed, scale))])
        for r in range(n)
    ]
    own = [b.double().norm() for b in before]
    norm = torch.cat(before).double().norm()
    many = [len(_gradients(r, n, shapes, dtype, seed, scale)) for r in range(n)]
    for rank, one in enumerate(seen):
        for call in one.calls:
            if call.op == "barrier":
                raise Wrong("it calls barrier: the all_reduce itself waits for everybody", f"rank {rank}, {about}")
            if call.bytes > 16 * max(n, many[rank]) and call.op != "recv":
                raise Wrong(
                    f"its {call.op} moves {call.bytes} bytes, as if the gradients travelled: one number is enough, "
                    "the sum of squares", f"rank {rank}, {about}", "at most 8 bytes", f"{call.bytes} bytes",
                )  # fmt: skip
    got = [number(one.result) for one in seen]
    got = [g.double() if isinstance(g, torch.Tensor) else g for g in got]
    exact, close = (None, (1e-6, 1e-9)) if dtype == F64 else ((1e-5, 1e-7), (1e-4, 1e-7))  # many add 1e-6 to the norm
    of_tensors = [[t.double().norm() for t in _gradients(r, n, shapes, dtype, seed, scale)] for r in range(n)]
    mistakes = [
        ("each rank returns the norm of its own gradients: the squares have to be added up over the ranks", own),
        ("the ranks' norms were added: norms do not add up, their squares do", [sum(own)] * n),
        ("the square root is missing: this is the sum of squares", [norm**2] * n),
        ("the mean over the ranks was taken, where the sum is asked for", [norm / n**0.5] * n),
        ("the mean of the ranks' norms is not the norm of all", [sum(own) / n] * n),
        ("the largest of the ranks' norms is not the norm of all", [max(own)] * n),
        ("this is the norm after clipping: the one before is asked for", [norm.clamp(max=most)] * n),
        ("this is the factor, not the norm", [most / norm] * n),
        ("this is the largest element, not the root of the sum of squares",
         [torch.cat(before).double().abs().max()] * n),
        ("this is the sum of absolute values, not the root of the sum of squares",
         [torch.cat(before).double().abs().sum()] * n),
        ("the tensors' norms were added: norms do not add up, their squares do", [sum(sum(of_tensors, []))] * n),
        ("the tensors' norms were added: norms do not add up, their squares do",
         [sum(sum(norms) ** 2 for norms in of_tensors) ** 0.5] * n),
    ]  # fmt: skip
    same(got, [norm] * n, "the norm", about, mistakes, tolerance=exact)

    def times(factor):
        return [b * float(f) for b, f in zip(before, factor if isinstance(factor, list) else [factor] * n, strict=True)]

    right = times(min(1.0, most / norm) if norm else 1.0)
    squared = times(most / norm if norm**2 > most else 1.0)
    fixed = [f for f in (0.5, 1.0) if f != most and norm > f]
    mistakes = [
        *((f"max_norm is not used: it is {most} here, and not {f}", times(f / norm)) for f in fixed),
        *[("the norm is below max_norm, and yet the gradients are scaled up to it: what is compared with max_norm, the "
           "sum of squares?", squared)] * bool(norm < most < norm**2),
        ("the gradients are as they were: scale them in place (g *= …)", before),
        (f"divided by {n}, besides: one factor for all, max_norm / norm", times(most / norm / n if norm else 1.0)),
        ("gradients below max_norm were scaled up to it: clip only where the norm is above", times(most / norm)),
        ("each rank scaled by its own norm: one factor for all, from the global norm",
         times([min(1.0, most / float(o)) if o else 1.0 for o in own])),
        ("scaled by max_norm / norm twice", times(min(1.0, (most / norm) ** 2) if norm else 1.0)),
        ("divided by the norm, but not multiplied by max_norm", times(1 / norm if norm else 1.0)),
        ("every element was clamped to ±max_norm: that changes the gradient's direction",
         [b.clamp(-most, most) for b in before]),
    ]  # fmt: skip
    same([one.kept for one in seen], right, "the gradient", about, mistakes, tolerance=close)
    for rank, one in enumerate(seen):
        reduced = [call.bytes for call in one.calls if call.op == "all_reduce"]
        if len(reduced) > 1 or len(one.calls) > 2 * n:
            raise Wrong(
                f"the result is right, but it takes {len(one.calls)} calls: one is enough", f"rank {rank}, {about}"
            )
        if max(reduced, default=0) > 8:
            raise Wrong(
                f"the result is right, but the all_reduce carries {reduced[0]} bytes: one number is enough, 8 bytes",
                f"rank {rank}, {about}",
            )
