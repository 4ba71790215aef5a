"""The exercises of lesson 03: hints, and how an answer is checked."""

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from .cases import numbers, values
from .judge import Wrong, equal, only_calls, plural, same, type_of
from .watch import group_of, watched

F32, F64 = torch.float32, torch.float64


def _split(tensor, n, dim=0):
    return tensor.tensor_split(n, dim)


def _untouched(seen, about):
    """Raise Wrong where an answer changed what it was given."""
    for rank, one in enumerate(seen):
        if one.kept["changed"]:
            why = f"`{one.kept['changed'][0]}` was changed: += and calls ending in _ write into what was given"
            raise Wrong(why, f"rank {rank}, {about}")


def _rows(tensor):
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _there_and_back(seen, answer, tensors, g, **options):
    """Call the answer again, with tensors that want gradients, and go back with `g`: seen.kept gets what comes out."""
    leaves = {name: t if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    given = [t if t is None else t.clone() for t in leaves.values()]  # autograd lets nobody write into a leaf
    y = answer(*given, **options)
    back = watched(lambda: y.backward(g.clone())) if getattr(y, "requires_grad", False) and y.shape == g.shape else None
    grads = {name: t.grad for name, t in leaves.items() if t is not None}
    seen.kept |= {"g": g, "grads": grads, "back": back.calls if back else []}


def _judge_gradients(seen, labels, expected, mistakes, sent, about):
    """Raise Wrong where what came back to x, weight and bias is not as `expected`; mistakes: {name: as in `same`}."""
    for name in expected[0]:
        got = [seen[r].kept["grads"][name] for r in labels]
        lost = [r for r, grad, wanted in zip(labels, got, expected, strict=True) if grad is None and wanted[name].any()]
        if len(lost) == len(labels):
            raise Wrong(f"the result is right, but `{name}` gets no gradient: detach(), .data or a copy that autograd "
                        "knows nothing of cuts it off", f"{name}.grad, {about}")  # fmt: skip
        if lost:
            why = f"`{name}` gets a gradient on some ranks only: after one step its copies differ; use it on all alike"
            raise Wrong(f"the result is right, but {why}", f"{plural(lost)}, {name}.grad, {about}")
        wanted = [e[name] for e in expected]
        got = [w if grad is None else grad for grad, w in zip(got, wanted, strict=True)]
        same(got, wanted, f"{name}.grad", about, mistakes.get(name, ()), labels=list(labels))
    for r in labels:
        if seen[r].kept["back"]:
            raise Wrong(sent.format(op=seen[r].kept["back"][0].op), f"rank {r}, {about}")


def _changed(before, **now):
    return [name for name, tensor in now.items() if tensor is not None and not torch.equal(tensor, before[name])]


# ---- column-parallel, forward ---------------------------------------------------------------------------------

COLUMN_CASES = [  # ranks, shape of x, in, out, dtype, bias; what is new in it
    (4, (3,), 5, 8, F32, True, ""),
    (4, (3,), 5, 10, F32, True, "where 4 does not divide the output features"),
    (4, (3,), 5, 3, F32, True, "where there are fewer output features than ranks"),
    (4, (2, 3), 4, 8, F64, True, "where x has three dimensions"),
    (4, (), 4, 8, F32, True, "where x is one token alone, (in)"),
    (4, (3,), 5, 8, F32, False, "where bias is None"),
    (3, (2,), 7, 11, F64, True, "with 3 ranks (is a 4 written into it?)"),
    (2, (2,), 3, 6, F32, False, "with 2 ranks"),
]


def _layer(shape, wide, out, dtype, bias, seed):
    """x, weight, bias, the same on every rank."""
    x, weight, b = (values(s, dtype, 50 + i, seed) for i, s in enumerate([(*shape, wide), (out, wide), (out,)]))
    return x, weight, b if bias else None


def _column(answer, shape, wide, out, dtype, bias, seed):
    x, weight, b = _layer(shape, wide, out, dtype, bias, seed)
    before = {"x": x.clone(), "weight": weight.clone(), "bias": None if b is None else b.clone()}
    counter = FlopCounterMode(display=False)

    def counted():
        with counter:
            return answer(x, weight, b)

    seen = watched(counted)
    seen.kept = {"flops": counter.get_total_flops(), "changed": _changed(before, x=x, weight=weight, bias=b)}
    own = len(_split(weight, dist.get_world_size())[dist.get_rank()])
    g = values((*shape, own), dtype, 60 + dist.get_rank(), seed)  # each rank comes back with its own features' part
    _there_and_back(seen, answer, before, g)
    return seen


class column_forward:
    hints = (
        "torch's linear layer keeps its weight as (out, in): an output feature is a row of weight and an entry of "
        "bias. weight.tensor_split(n) cuts rows.",
        "With w = weight.tensor_split(n)[rank], the result is x @ w.T, and to it belongs the same part of the bias, "
        "bias.tensor_split(n)[rank].",
        "Cut first, multiply then: multiplying by the whole weight would do every rank's work on every rank.",
    )

    @staticmethod
    def check(run):
        for seed, (n, shape, wide, out, dtype, bias, new) in enumerate(COLUMN_CASES):
            about = f"{n} ranks, x {(*shape, wide)}, weight {(out, wide)}{'' if bias else ', no bias'}"
            try:
                seen = run(_column, shape, wide, out, dtype, bias, seed, n=n, about=about)
                _judge_column(seen, *_layer(shape, wide, out, dtype, bias, seed), about)
            except Wrong as wrong:
                if new:
                    wrong.diagnosis = f"{new}: {wrong.diagnosis}"
                raise


def _judge_column(seen, x, weight, bias, about):
    n, out = len(seen), len(weight)
    why = "it calls {op}: a column-parallel layer's forward sends nothing, its output stays in parts"
    only_calls(seen, (), {"": why})
    _untouched(seen, about)
    zero = weight.new_zeros(out) if bias is None else bias
    whole = x @ weight.T
    expected = [part.clone() for part in _split(whole + zero, n, -1)]
    got = [one.result for one in seen]
    widths = [y.shape[-1] if isinstance(y, torch.Tensor) and y.dim() else None for y in got]
    right, equal_parts = [p.shape[-1] for p in expected], [out // n] * n
    cut_up = [part.shape[-1] for part in whole.chunk(n, -1)]
    ways = [
        ([out] * n, "every rank has all output features: only its own are asked for"),
        (cut_up + [0] * (n - len(cut_up)), "cut as torch.chunk cuts, which can leave the last rank little or nothing"),
        (equal_parts, f"every rank has {out // n} of the {out} output features: the remainder is on no rank"),
        (equal_parts[1:] + [out - out // n * (n - 1)], "the last rank has all of the remainder"),
        (right[::-1], "the larger parts are on the last ranks"),
    ]
    for given, why in ways:
        if widths == given != right:
            raise Wrong(f"{why}; torch.tensor_split is the rule", about, f"widths {right}", f"widths {widths}")
    starts = [sum(right[:r]) for r in range(n)]
    first = [zero[:width] for width in right]
    strided = [(whole + zero)[..., r::n] for r in range(n)]
    mistakes = [
        ("every rank has rank 0's features: the rank is not used", [expected[0] if right[r] == right[0] else None
                                                                    for r in range(n)]),
        ("the bias is left out", list(_split(whole, n, -1))),
        ("the bias is counted twice", list(_split(whole + 2 * zero, n, -1))),
        (f"the bias is divided by {n}: no other rank adds to these features", list(_split(whole + zero / n, n, -1))),
        ("the weight is this rank's part, but the bias is rank 0's: it is cut the same way",
         [whole[..., s : s + w] + b for s, w, b in zip(starts, right, first, strict=True)]),
        ("rank r has every n-th feature, from r on: the parts are to be contiguous",
         [s if s.shape == e.shape else None for s, e in zip(strided, expected, strict=True)]),
        ("the parts are in reverse order", [e if e.shape == expected[r].shape else None
                                            for r, e in enumerate(expected[::-1])]),
    ]  # fmt: skip
    same(got, expected, "the result", about, mistakes)
    for rank, one in enumerate(seen):
        fair = 2 * x.numel() * right[rank]
        if one.kept["flops"] > 1.01 * fair:
            raise Wrong(
                f"the result is right, but rank {rank} multiplies {one.kept['flops'] / max(fair, 1):.3g} times as much "
                "as its part needs: cut the weight before, not the result after", about,
                f"{fair:,} floating point operations", f"{one.kept['flops']:,}",
            )  # fmt: skip
    expected = []
    for rank, one in enumerate(seen):
        g, place = one.kept["g"], slice(starts[rank], starts[rank] + right[rank])
        flat = _rows(g)
        dw, db = torch.zeros_like(weight), weight.new_zeros(out)
        dw[place], db[place] = flat.T @ _rows(x), flat.sum(0)
        expected.append({"x": g @ weight[place], "weight": dw} | ({} if bias is None else {"bias": db}))
    summed = [("this is the sum over the ranks: that is the work of f, which stands before this layer",
               [sum(e["x"] for e in expected)] * n)]  # fmt: skip
    sent = "the gradients are right, but backward calls {op}: nothing is sent here"
    _judge_gradients(seen, range(n), expected, {"x": summed}, sent, about)


# ---- row-parallel, forward ------------------------------------------------------------------------------------

ALL, PAIRS = None, ((0, 2), (1, 3))
ROW_CASES = [  # ranks, groups, shape of x, in, out, dtype, bias; what is new in it
    (4, ALL, (3,), 8, 5, F32, True, ""),
    (4, ALL, (3,), 10, 5, F64, True, "where 4 does not divide the input features"),
    (4, ALL, (3,), 3, 5, F32, True, "where there are fewer input features than ranks"),
    (4, ALL, (2, 3), 8, 1, F64, True, "where x has three dimensions"),
    (4, ALL, (3,), 8, 5, F32, False, "where bias is None"),
    (3, ALL, (2,), 7, 4, F64, True, "with 3 ranks (is a 4 written into it?)"),
    (2, ALL, (2,), 3, 6, F32, True, "with 2 ranks"),
    (4, PAIRS, (2,), 5, 3, F64, True, "in two groups of 2 ranks"),
]


def _row(answer, groups, shape, wide, out, dtype, bias, seed):
    rank, options = dist.get_rank(), {}
    x, weight, b = _layer(shape, wide, out, dtype, bias, seed)
    members = _members(groups, rank)
    if groups:
        made = [group_of(g) for g in groups]
        options = {"group": next(g for g, ranks in zip(made, groups, strict=True) if rank in ranks)}
        x = x + groups.index(members)  # the groups have something else to do each
    x, weight = (_split(t, len(members), -1)[members.index(rank)].clone() for t in (x, weight))
    before = {"x": x.clone(), "weight": weight.clone(), "bias": None if b is None else b.clone()}
    seen = watched(answer, x, weight, b, **options)
    seen.kept = {"changed": _changed(before, x=x, weight=weight, bias=b), "x": before["x"], "weight": before["weight"]}
    g = values((*shape, out), dtype, 60 + members[0], seed)  # the same on every rank of a group, as its loss is
    _there_and_back(seen, answer, before, g, **options)
    return seen


def _members(groups, rank):
    n = dist.get_world_size() if dist.is_initialized() else 4
    return tuple(range(n)) if groups is None else next(g for g in groups if rank in g)


class row_forward:
    hints = (
        "A rank's x @ weight.T has the shape of the whole result, but is only a summand of it: what do the ranks have "
        "to do with their summands?",
        "dist.all_reduce(y, group=group) replaces y by the sum over the ranks, on every rank.",
        "Whatever is added before the all_reduce is added by every rank. The bias belongs into the result once.",
        "Backward is g's: a torch.autograd.Function whose forward returns the sum of all ranks' y, and whose backward "
        "returns the gradient as it came, for every rank has it already.",
    )

    @staticmethod
    def check(run):
        for seed, (n, groups, shape, wide, out, dtype, bias, new) in enumerate(ROW_CASES):
            about = f"{n} ranks, whole input {(*shape, wide)}, whole weight {(out, wide)}{'' if bias else ', no bias'}"
            about += ", groups (0, 2) and (1, 3)" if groups else ""
            try:
                seen = run(_row, groups, shape, wide, out, dtype, bias, seed, n=n, about=about)
                _judge_row(seen, groups or (tuple(range(n)),), _layer(shape, wide, out, dtype, bias, seed)[2], about)
            except Wrong as wrong:
                if new:
                    wrong.diagnosis = f"{new}: {wrong.diagnosis}"
                raise


ROW_CALLS = {
    "reduce": "it calls reduce, which brings the sum to one rank only: every rank needs the output",
    "all_gather": "it calls all_gather, which brings every summand to every rank, n times as many bytes as a sum: "
    "all_reduce adds up on the way",
    "broadcast": "it broadcasts one rank's tensor: the output is the sum of all ranks'",
    "": "it calls {op}: one all_reduce of the output is all that is needed",
}


def _judge_row(seen, groups, bias, about):
    only_calls(seen, ("all_reduce",), ROW_CALLS)
    _untouched(seen, about)
    summands = [one.kept["x"] @ one.kept["weight"].T for one in seen]
    zero = summands[0].new_zeros(summands[0].shape[-1]) if bias is None else bias
    everywhere = sum(summands)
    for members in groups:
        n, mine = len(members), [summands[r] for r in members]
        total = sum(mine)
        mistakes = [
            (f"the bias is added {n} times, once by each rank: add it after the all_reduce", [total + n * zero] * n),
            ("the bias is in the output of rank 0 only: add it before the all_reduce there, or after it everywhere",
             [total + zero * (r == members[0]) for r in members]),
            ("the bias is left out", [total] * n),
            ("nothing was added up: each rank has its own summand", [m + zero for m in mine]),
            ("nothing was added up: each rank has its own summand", mine),
            (f"divided by {n}: the output is the sum of the summands, not their mean", [total / n + zero] * n),
            (f"divided by {n}: the output is the sum of the summands, not their mean", [(total + n * zero) / n] * n),
            ("it takes the MAX over the ranks, not the sum", [torch.stack(mine).amax(0) + zero] * n),
            ("the bias is counted twice", [total + 2 * zero] * n),
        ]  # fmt: skip
        if n < len(seen):
            mistakes[:0] = [
                ("the group argument is ignored: this is the sum over all ranks", [everywhere + zero] * n),
                ("the group argument is ignored: this is the sum over all ranks", [everywhere + len(seen) * zero] * n),
            ]
        same([seen[r].result for r in members], [total + zero] * n, "the output", about, mistakes, labels=list(members))
        for rank in members:
            made, fair = [call.bytes for call in seen[rank].calls], total.numel() * total.element_size()
            if sum(made) != fair or len(made) > 1:
                raise Wrong(
                    f"the output is right, but {len(made)} all_reduce of {sum(made):,} bytes are made for an output of "
                    f"{fair:,}", f"rank {rank}, {about}", f"1 of {fair:,} bytes", f"{len(made)} of {sum(made):,} bytes",
                )  # fmt: skip
        _judge_row_backward(seen, members, bias, about)


def _judge_row_backward(seen, members, bias, about):
    n, expected, mistakes = len(members), [], {}
    for rank in members:
        x, weight, g = (seen[rank].kept[name] for name in ("x", "weight", "g"))
        grads = {"x": g @ weight, "weight": _rows(g).T @ _rows(x), "bias": _rows(g).sum(0)}
        expected.append(grads if bias is not None else {k: grads[k] for k in ("x", "weight")})
    for name in expected[0]:
        what = [e[name] for e in expected]
        mistakes[name] = [
            (f"the output is right, its backward {n} times too large: every rank comes back with the whole gradient, "
             f"and adding {n} equal ones counts it {n} times", [n * w for w in what]),
            (f"the output is right, its backward divided by {n}: "
             + ("a share of the bias from each rank gets a share of its gradient; add it whole, after the sum"
                if name == "bias" else "the gradient of a sum goes on to each summand whole"), [w / n for w in what]),
        ]  # fmt: skip
    sent = "the gradients are right, but backward calls {op}: every rank has the whole gradient already"
    _judge_gradients(seen, members, expected, mistakes, sent, about)


# ---- f: nothing forward, all-reduce backward ------------------------------------------------------------------


def _forth_and_back(answer, shape, dtype, seed, groups=None, layout="", direct=False, alike=False, needs_grad=True):
    """On a rank: the answer forward, then backward, watched each by itself; kept: all there is to look at.

    layout: "strided" or "expanded", of the gradient. direct: x is used a second time, beside the answer.
    alike: every rank comes back with the same gradient."""
    rank, options = dist.get_rank(), {}
    members = _members(groups, rank)
    if groups:
        made = [group_of(g) for g in groups]
        options = {"group": next(g for g, ranks in zip(made, groups, strict=True) if rank in ranks)}
    x = values(shape, dtype, members[0] if not alike else rank, seed)  # f's x is the same on every rank
    before, box = x.clone(), []
    x.requires_grad_(needs_grad)

    def forward():
        box.append(answer(x, **options))
        return box[0]

    seen = watched(forward)
    y = box[0]
    seen.kept = kept = {"x": before, "same": y is x, "tensor": isinstance(y, torch.Tensor), "members": members,
                        "needs": getattr(y, "requires_grad", False), "back": [], "grad": None}  # fmt: skip
    kept["changed"] = _changed({"x": before}, x=x.detach())
    if not kept["tensor"] or not kept["needs"]:
        return seen
    g = values(y.shape if layout != "expanded" else (1,), dtype, 20 + (members[0] if alike else rank), seed)
    if layout == "strided":
        g = torch.stack([g, g + 1], -1)[..., 0]
    elif layout == "expanded":
        g = g.expand(y.shape)
    given = g.clone()
    total = y if not direct else torch.cat([y.flatten(), x.flatten()])
    back = watched(total.backward, torch.cat([g.flatten(), given.flatten()]) if direct else g)
    seen.reference, seen.torchs = seen.reference or back.reference, seen.torchs or back.torchs
    seen.hidden += back.hidden
    kept |= {"back": back.calls, "unwaited": back.unwaited, "g": given, "intact": torch.equal(g, given)}
    kept["grad"] = None if x.grad is None else x.grad.clone()
    return seen


def _differentiable(seen, about, lost):
    for rank, one in enumerate(seen):
        if one.kept.get("unwaited"):
            raise Wrong("backward's async_op=True was never waited for: until wait() returns, the sum is not there",
                        f"rank {rank}, {about}")  # fmt: skip
        if not one.kept["tensor"]:
            raise Wrong(f"it returns {type_of(one.result)}: a tensor is asked for", f"rank {rank}, {about}")
        if not one.kept["needs"]:
            raise Wrong(f"autograd does not know where the result comes from: {lost}", f"rank {rank}, {about}")
        if one.kept["grad"] is None:
            raise Wrong(f"autograd does not come back to x: {lost}", f"rank {rank}, x.grad, {about}")


COPY_CASES = [  # ranks, shape, dtype, options, what is new in it
    (4, (3, 5), F32, {}, ""),
    (4, (7,), F64, {}, ""),
    (4, (2, 3, 2), F32, {"layout": "strided"}, "where the gradient is not contiguous"),
    (4, (3, 2), F64, {"layout": "expanded"}, "where the gradient is one number for all elements (after a sum)"),
    (4, (3, 2), F64, {"direct": True}, "where x is used a second time, beside the layer"),
    (3, (4,), F32, {}, "with 3 ranks (is a 4 written into it?)"),
    (2, (2, 2), F64, {}, "with 2 ranks"),
    (4, (3,), F64, {"groups": PAIRS}, "in two groups of 2 ranks"),
    (4, (3,), F32, {"needs_grad": False}, "where x needs no gradient (it is data)"),
]


class my_copy_to_group:
    hints = (
        "A class inside the function does it: class Copy(torch.autograd.Function), with static methods forward(ctx, x) "
        "and backward(ctx, grad); then return Copy.apply(x).",
        "forward returns x.view_as(x). backward returns what is to be x's gradient: the sum over the ranks of what "
        "each rank's backward is given.",
        "dist.all_reduce works in place. total = grad.clone(memory_format=torch.contiguous_format) is yours to change.",
    )

    @staticmethod
    def check(run):
        for seed, (n, shape, dtype, options, new) in enumerate(COPY_CASES):
            about = f"{n} ranks, x {shape}" + (", groups (0, 2) and (1, 3)" if "groups" in options else "")
            try:
                seen = run(_call, shape, dtype, seed, options, n=n, about=about)
                _judge_copy(seen, about, options)
            except Wrong as wrong:
                if new:
                    wrong.diagnosis = f"{new}: {wrong.diagnosis}"
                raise


def _call(answer, shape, dtype, seed, options):
    return _forth_and_back(answer, shape, dtype, seed, **options)


def _judge_copy(seen, about, options):
    n = len(seen)
    xs = [one.kept["x"] for one in seen]
    only_calls(seen, (), {"": "forward calls {op}: x is the same on every rank already, forward sends nothing"})
    _untouched(seen, about)
    same([one.result for one in seen], xs, "the result", about, [
        ("x is divided by the number of ranks: forward leaves it as it is", [x / n for x in xs]),
    ])  # fmt: skip
    if not options.get("needs_grad", True):
        return
    _differentiable(seen, about, "detach() and .data cut x off, and x would get no gradient")
    backward = {"": "backward calls {op}: one all_reduce of the gradient is all that is needed"}
    for rank, one in enumerate(seen):
        for call in one.kept["back"]:
            if call.op != "all_reduce":
                raise Wrong(backward[""].format(op=call.op), f"rank {rank}")
        if not one.kept["intact"]:
            raise Wrong(
                "the gradient that came in was changed: whoever else was handed it (the other branch of a residual "
                "connection, say) now has the sum too; all_reduce a clone of it", f"rank {rank}, {about}",
            )  # fmt: skip
    direct, gs = options.get("direct"), [one.kept["g"] for one in seen]
    for members in sorted({one.kept["members"] for one in seen}):
        k, mine = len(members), [gs[r] for r in members]
        total = sum(mine)
        extra = mine if direct else [torch.zeros_like(total)] * k
        everyone = sum(gs)
        mistakes = [
            ("nothing is added up: each rank passes on its own part of the gradient (the all_reduce is missing)",
             [g + e for g, e in zip(mine, extra, strict=True)]),
            (f"divided by {k}: the parts of a gradient are summands, their mean is {k} times too small",
             [total / k + e for e in extra]),
            (f"{k} times too large: every rank had the sum, and it was added up again", [k * total + e for e in extra]),
        ]  # fmt: skip
        if direct:
            mistakes.append(("what x gets from its other use is added up over the ranks, too: give the result a hook "
                             "of its own, not x", [2 * total] * k))  # fmt: skip
        if k < n:
            mistakes[:0] = [("the group argument is ignored: this is the sum over all ranks",
                             [everyone + e for e in extra])]  # fmt: skip
        same([seen[r].kept["grad"] for r in members], [total + e for e in extra], "x.grad", about, mistakes,
             labels=list(members))  # fmt: skip
        for rank in members:
            made, fair = [call.bytes for call in seen[rank].kept["back"]], total.numel() * total.element_size()
            if sum(made) != fair or len(made) > 1:
                raise Wrong(f"the gradient is right, but {len(made)} all_reduce of {sum(made):,} bytes are made for a "
                            f"gradient of {fair:,}", f"rank {rank}, {about}")  # fmt: skip


# ---- gather, and its backward ---------------------------------------------------------------------------------

GATHER_CASES = [  # ranks, shape, dtype, options, what is new in it
    (4, (3, 2), F32, {}, ""),
    (4, (2, 3, 1), F64, {}, ""),
    (4, (3,), F64, {}, "where x has one dimension"),
    (4, (2, 2), F32, {"layout": "strided"}, "where the gradient is not contiguous"),
    (3, (4, 2), F32, {}, "with 3 ranks (is a 4 written into it?)"),
    (2, (2, 2), F64, {}, "with 2 ranks"),
    (4, (3, 2), F64, {"groups": PAIRS}, "in two groups of 2 ranks"),
    (4, (3,), F32, {"needs_grad": False}, "where x needs no gradient"),
]


class my_gather_from_group:
    hints = (
        "dist.all_gather(parts, x) fills a list of n tensors of x's shape; torch.cat(parts, -1) puts them side by "
        "side. torch.distributed's calls know nothing of autograd: the result would have no gradient.",
        "A torch.autograd.Function with its own backward is one way: backward gets the whole gradient and returns "
        "grad.tensor_split(n, -1)[rank].",
        "There is a shorter one: put x itself into the list, parts[rank] = x, before torch.cat. Then autograd knows "
        "that part, and the gradient of a part of a cat is its slice.",
    )

    @staticmethod
    def check(run):
        for seed, (n, shape, dtype, options, new) in enumerate(GATHER_CASES):
            about = f"{n} ranks, each with x {shape}" + (", groups (0, 2) and (1, 3)" if "groups" in options else "")
            try:
                seen = run(_call, shape, dtype, seed, {"alike": True, **options}, n=n, about=about)
                _judge_gathered(seen, about, options)
            except Wrong as wrong:
                if new:
                    wrong.diagnosis = f"{new}: {wrong.diagnosis}"
                raise


def _judge_gathered(seen, about, options):
    xs = [one.kept["x"] for one in seen]
    why = {"all_reduce": "forward calls all_reduce, which adds the parts up: side by side they are gathered",
           "": "forward calls {op}: one all_gather is all that is needed"}  # fmt: skip
    only_calls(seen, ("all_gather",), why)
    _untouched(seen, about)
    size = xs[0].numel() * xs[0].element_size()
    for members in sorted({one.kept["members"] for one in seen}):
        n, mine = len(members), [xs[r] for r in members]
        got, whole = [seen[r].result for r in members], torch.cat(mine, -1)
        for rank, result in zip(members, got, strict=True):
            if isinstance(result, torch.Tensor) and result.shape != whole.shape:
                stacked, rows = torch.stack(mine), torch.cat(mine)
                if equal(result, rows) or equal(result, stacked) or equal(result, torch.cat(xs)):
                    raise Wrong("the parts lie one under the other: torch.cat(parts, -1) puts features side by side",
                                f"rank {rank}, {about}", str(tuple(whole.shape)), str(tuple(result.shape)))  # fmt: skip
                if n < len(xs) and equal(result, torch.cat(xs, -1)):
                    raise Wrong("the group argument is ignored: these are all ranks' features", f"rank {rank}, {about}")
        own_first = [torch.cat([mine[i], *mine[:i], *mine[i + 1 :]], -1) for i in range(n)]
        same(got, [whole] * n, "the result", about, [
            ("the parts are in reverse order", [torch.cat(mine[::-1], -1)] * n),
            ("a rank's own part comes first: rank 0's is first on every rank", own_first),
            ("x stands where rank 0's part belongs: a rank's place is its own number", [
                torch.cat([m, *mine[1:]], -1) for m in mine]),
            ("every part is the rank's own", [torch.cat([m] * n, -1) for m in mine]),
        ], labels=list(members))  # fmt: skip
    if not options.get("needs_grad", True):
        return
    _differentiable(seen, about, "torch.distributed's all_gather has no backward, so x would get no gradient")
    for members in sorted({one.kept["members"] for one in seen}):
        _judge_slices(seen, members, about, size)


def _judge_slices(seen, members, about, size):
    for rank in members:
        if not seen[rank].kept["intact"]:
            raise Wrong("the gradient that came in was changed: work on a copy of it", f"rank {rank}, {about}")
    n, g = len(members), seen[members[0]].kept["g"]
    parts = list(g.tensor_split(n, -1))
    mistakes = [
        (f"{n} times too large: every rank found the whole gradient by itself, and adding {n} equal ones counts it {n} "
         "times", [n * part for part in parts]),
        (f"divided by {n}: a rank's slice goes on as it is", [part / n for part in parts]),
        ("every rank gets rank 0's slice", [parts[0]] * n),
        ("the slices are in reverse order", parts[::-1]),
    ]  # fmt: skip
    same([seen[r].kept["grad"] for r in members], parts, "x.grad", about, mistakes, labels=list(members))
    for rank in members:
        back, made = seen[rank].kept["back"], [call.bytes for call in seen[rank].calls]
        if back:
            raise Wrong(f"x.grad is right, but backward calls {back[0].op}: every rank has the whole gradient, and its "
                        "slice costs nothing", f"rank {rank}, {about}")  # fmt: skip
        if len(made) != 1 or made[0] not in (size, n * size):  # what a rank gives, or room for what it gets
            raise Wrong(f"the result is right, but it takes {len(made)} all_gather of {sum(made):,} bytes: one is "
                        f"enough, to which each rank gives {size:,}", f"rank {rank}, {about}")  # fmt: skip


# ---- bytes of the orders --------------------------------------------------------------------------------------


class order_bytes:
    hints = (
        "Go through the two layers forward: a column-parallel layer sends nothing and leaves its output in parts, a "
        "row-parallel layer leaves summands. What does the next one need, and what does the caller?",
        "Backward is forward in a mirror: after column the input's gradient is a summand on each rank (all-reduce), "
        "after row it is in parts (nothing, where the layer before left parts; else a gather).",
        "column, row: the output's all-reduce forward, the input's all-reduce backward, 2(n - 1)/n · 4 · tokens · "
        "width each. In all other orders something as wide as hidden travels, too.",
    )

    @staticmethod
    def check(run):
        sizes = [(8, 10, 20, 4), (3, 12, 24, 2), (5, 12, 6, 3), (7, 10, 40, 1)]
        orders = ("column, row", "row, column", "column, column", "row, row")
        inputs = [(order, *size) for size in sizes for order in orders]
        labels = [f"order_bytes({', '.join(map(repr, given))})" for given in inputs]
        mistakes = [
            ("only forward is counted: a training step goes backward, too", lambda *a: _bytes(*a, back=0)),
            ("only backward is counted", lambda *a: _bytes(*a, ahead=0)),
            ("an all-reduce is counted as (n - 1)/n · S: it is two halves, 2(n - 1)/n · S",
             lambda *a: _bytes(*a, reduce=1)),
            ("an all-reduce is counted as S and a gather as S: each rank sends 2(n - 1)/n · S and (n - 1)/n · S",
             lambda *a: _bytes(*a, reduce=1, factor=1)),
            ("the factor (n - 1)/n is missing", lambda *a: _bytes(*a, factor=1)),
            ("these are numbers, not bytes: a float32 has 4", lambda *a: _bytes(*a) / 4),
            ("all ranks' bytes are counted together: each one's are asked for", lambda *a: _bytes(*a) * a[-1]),
            ("a gather is counted like an all-reduce: it costs half of it", lambda *a: _bytes(*a, gather=2)),
            ("the gathers are left out: what is in parts but needed whole has to be gathered",
             lambda *a: _bytes(*a, gather=0)),
            ("forward's gathers are counted, backward's are not: what is in parts on the way back is gathered, too",
             lambda *a: _bytes(*a, back=0) + _bytes(*a, ahead=0, gather=0)),
            ("backward's gathers are counted, forward's are not: an output in parts is gathered, too",
             lambda *a: _bytes(*a, ahead=0) + _bytes(*a, back=0, gather=0)),
            ("every order is counted like column, row", lambda order, *a: _bytes("column, row", *a)),
            ("width and hidden are swapped", lambda o, t, w, h, n: _bytes(o, t, h, w, n)),
        ]  # fmt: skip
        expected = [_bytes(*given) for given in inputs]
        numbers(run, inputs, expected, labels, mistakes)


def _bytes(order, tokens, width, hidden, n, reduce=2, gather=1, ahead=1, back=1, factor=None):
    wide, narrow = 4 * tokens * hidden, 4 * tokens * width
    forward = {
        "column, row": reduce * narrow,
        "row, column": reduce * wide + gather * narrow,
        "column, column": gather * wide + gather * narrow,
        "row, row": reduce * wide + reduce * narrow,
    }
    backward = {
        "column, row": reduce * narrow,
        "row, column": reduce * wide + gather * narrow,
        "column, column": reduce * wide + reduce * narrow,
        "row, row": gather * wide + gather * narrow,
    }
    factor = (n - 1) / n if factor is None else factor
    return factor * (ahead * forward[order] + back * backward[order])
