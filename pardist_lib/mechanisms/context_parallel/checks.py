"""What context parallelism refuses, in words that say where and what to do; and what the ranks ask each other first."""

import torch
import torch.distributed as dist

from ..group import rank_and_size

ORDERS = ("zigzag", "contiguous")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_group(group, who):
    """Raises ValueError, naming `who`, for what is no process group, or none of this rank's."""
    if not (group is None or isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER):
        raise ValueError(f"{who}: group has to be a process group, or None for all ranks, not a {type(group).__name__}")
    try:
        rank_and_size(group)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def place(who, group):
    """Where an error was found, as its message begins."""
    return f"{who}, rank {rank_and_size(group)[0]}"


def check_order(order):
    if order not in ORDERS:
        raise ValueError(f"order is {' or '.join(map(repr, ORDERS))}, not {order!r}")


def check_length(length, who):
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"{who}: length is how many tokens the whole sequence has, 0 or more, not {length!r}")


def dimension(x, dim, who):
    """`dim` counted from the front. Raises ValueError where x has no such dimension."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{who}: a tensor of shape {list(x.shape)} has no dimension {dim} for the sequence")
    return dim % x.dim()


def check_attention(q, k, v, group, mask, who):
    """Raises ValueError unless q, k and v are one rank's tokens for one attention."""
    check_group(group, who)
    here = place(who, group)
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{here}: q, k and v are (batch, heads, own tokens, width), not {shapes}")
    if not q.size(2) == k.size(2) == v.size(2):
        raise ValueError(
            f"{here}: q has {q.size(2)} tokens, k {k.size(2)} and v {v.size(2)}, but they are those of the same "
            "positions: deal all three in the same order"
        )
    if not q.size(0) == k.size(0) == v.size(0) or k.size(1) != v.size(1) or q.size(3) != k.size(3) or not q.size(3):
        raise ValueError(
            f"{here}: all have the same batch, k and v the same heads, q and k the same width, 1 or more: not {shapes}"
        )
    if not q.size(1) or not k.size(1) or q.size(1) % k.size(1):
        raise ValueError(
            f"{here}: {q.size(1)} heads of queries cannot share {k.size(1)} heads of keys and values evenly: the first "
            "number has to be a multiple of the second"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(f"{here}: q, k and v are of one floating-point dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if mask is not None and not callable(mask):
        raise ValueError(
            f"{here}: mask is a function of positions, f(query position, key position) → bool, not a "
            f"{type(mask).__name__}: no rank has the whole square"
        )


def check_heads(heads, kv_heads, n, who):
    """Raises ValueError where n ranks cannot have equally many whole heads, with what would fit."""
    if heads % n == kv_heads % n == 0:
        return
    many, what = (heads, "heads") if heads % n else (kv_heads, "key-value heads")
    fit = [str(m) for m in range(1, kv_heads + 1) if heads % m == kv_heads % m == 0]
    near = sorted({max(n, many // n * n), (many // n + 1) * n})
    raise ValueError(
        f"{who}: {many} {what} cannot be split over {n} ranks, for a head stays whole: {' or '.join(fit)} ranks would "
        f"fit, or {' or '.join(map(str, near))} {what}; ring_attention takes any number of heads"
    )


def check_documents(documents, length, q, here):
    """`documents` as a tensor beside q, None as None. Raises ValueError where it is not one number for each token."""
    if documents is None:
        return None
    documents = torch.as_tensor(documents, device=q.device)
    if documents.shape not in ((length,), (q.size(0), length)) or documents.is_floating_point():
        raise ValueError(
            f"{here}: documents says of each token of the whole sequence which one it is in: whole numbers of shape "
            f"[{length}] or [{q.size(0)}, {length}], not {documents.dtype} {list(documents.shape)}"
        )
    return documents


def check_visible(visible, rows, columns, here):
    """Raises ValueError, saying where, unless a mask has answered with bool that expands to (rows, columns)."""
    shape = list(getattr(visible, "shape", ()))
    fits = len(shape) <= 2 and all(have in (1, want) for have, want in zip(shape[::-1], (columns, rows), strict=False))
    if not isinstance(visible, torch.Tensor) or visible.dtype != torch.bool or not fits:
        what = f"{visible.dtype} {shape}" if isinstance(visible, torch.Tensor) else type(visible).__name__
        raise ValueError(
            f"{here}: mask(query position, key position), called with int64 of shapes [{rows}, 1] and [1, {columns}], "
            f"has to answer with bool of shape [{rows}, {columns}], True where the query sees the key, not with {what}"
        )


def check_dealt(own, lengths, rank, length, order, dealt, who):
    """Raises ValueError where a rank's tokens are not as many as `order` gives it. lengths: those of all ranks, None
    where only this rank's `own` are known; dealt: {order: tokens of each rank}."""
    want = dealt[order]
    if own == want[rank] and lengths in (None, want):
        return
    have = f"the ranks have {lengths} tokens" if lengths else f"rank {rank} has {own} tokens"
    right = f"{want}" if lengths else f"it {want[rank]}"
    other = [name for name in dealt if (dealt[name] == lengths if lengths else dealt[name][rank] == own)]
    raise ValueError(
        f"{who}: {have}, but of {length} the order {order!r} gives {right}: "
        + (f"were they dealt with order={other[0]!r}?" if other else "deal(sequence, group, dim, order) cuts them so")
    )


# ---- what the ranks ask each other ----------------------------------------------------------------------------


def facts_of(q, k, v, causal, mask, documents):
    """What has to be alike on all ranks, as plain values, in words."""
    return {
        "batch": q.size(0),
        "heads": q.size(1),
        "key-value heads": k.size(1),
        "width": q.size(3),
        "width of values": v.size(3),
        "dtype": q.dtype,
        "causal": bool(causal),
        "mask given": mask is not None,
        "documents given": documents is not None,
        "gradients wanted": torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)),
    }


def lengths_of_all(own, facts, group, who, device=None):
    """How many tokens each rank has: one all-gather of 8 bytes, and of 8 for each fact.

    facts: {what: value} that has to be the same on every rank. Raises ValueError on all ranks where one is not.
    """
    _, n = rank_and_size(group)
    if n == 1:
        return [own]
    mine = torch.tensor([own, *map(_coded, facts.values())], device=device)
    everyone = [torch.empty_like(mine) for _ in range(n)]
    dist.all_gather(everyone, mine, group=group)
    lengths, *values = zip(*(each.tolist() for each in everyone), strict=True)
    for what, codes in zip(facts, values, strict=True):
        for rank, code in enumerate(codes):
            if code != codes[0]:
                kind = facts[what]
                first, other = _decoded(codes[0], kind), _decoded(code, kind)
                raise ValueError(f"{who}: the ranks differ in {what}: rank 0 has {first}, rank {rank} has {other}")
    return list(lengths)


_WORDS = (*ORDERS, *DTYPES)


def _coded(value):
    return _WORDS.index(value) if value in _WORDS and not isinstance(value, (bool, int)) else int(value)


def _decoded(code, kind):
    if isinstance(kind, bool):
        return bool(code)
    return code if isinstance(kind, int) else _WORDS[code]
