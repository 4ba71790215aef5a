"""Compare what an answer gave with what it should have given, and name the likeliest cause of a difference.

A mistake is recognised by its result: the checks compute what each typical mistake would give, and look which of
them the answer gave.
"""

import torch

from pardist_lib.ranks.report import plural

from .watch import Other

TOLERANCE = {  # (relative, absolute)
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (2e-2, 1e-2),
}


class Wrong(Exception):
    """An answer is refused: `diagnosis` is the likeliest cause in one sentence, the rest says where it shows.

    hangs: whether it did not come back at all.
    """

    hangs = False

    def __init__(self, diagnosis, where="", expected="", got="", note=""):
        super().__init__(diagnosis)
        self.diagnosis, self.where, self.expected, self.got, self.note = diagnosis, where, expected, got, note


def equal(got, expected, tolerance=None):
    """True where `got` is the tensor `expected`, within what its dtype can hold."""
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    relative, absolute = tolerance or TOLERANCE.get(expected.dtype, (0, 0))
    return torch.allclose(got, expected, relative, absolute)


def same(got, expected, what, about="", mistakes=(), before=None, labels=None, tolerance=None):
    """Raise `Wrong` unless got[i] equals expected[i] for every i.

    got       what each rank has, or what came out in each case: anything at all
    labels    the ranks' numbers, or instead of `what` a name for each case; None for ranks 0, 1, 2, …
    expected  a tensor that all of them have to be, or a list with one for each
    what      its name in a sentence: "the gradient of fc1.weight"
    mistakes  (diagnosis, what it would give) in order: as `expected`, with None where that is not known; or a
              torch.Size, a type: any tensor of that shape, any value of that type
    before    what was there before the call, a list like `expected`
    """
    expected = _for_each(expected, len(got))
    bad = [i for i, (g, e) in enumerate(zip(got, expected, strict=True)) if not equal(g, e, tolerance)]
    if not bad:
        return
    first = bad[0]
    labels = range(len(got)) if labels is None else labels
    if isinstance(labels[first], str):
        what, who = labels[first], ""
    else:
        who = plural([labels[i] for i in bad])
    where = ", ".join(filter(None, [who, what, about]))
    trouble = _other_kind(got[first], expected[first], what)
    if trouble:
        shown = _kind(expected[first]), _kind(got[first])
    else:
        at = _first_difference(got[first], expected[first], tolerance)
        shown = show(expected[first], at), show(got[first], at)
        where += f", from element {at}" if at else ""
    for diagnosis, would in mistakes:
        if all(_gives(would, got[i], i, tolerance) for i in bad):
            raise Wrong(diagnosis, where, *shown)
    trouble = trouble or _pattern(got[first], expected[first], before and before[first], what, tolerance)
    raise Wrong(trouble, where, *shown)


def _gives(would, got, i, tolerance):
    """Whether it is what a mistake would give on rank i."""
    if isinstance(would, torch.Size):
        return isinstance(got, torch.Tensor) and got.shape == would
    if isinstance(would, type):
        return isinstance(got, would)
    would = would[i] if isinstance(would, (list, tuple)) else would
    return would is not None and equal(got, would, tolerance)


def _for_each(value, count):
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _other_kind(got, expected, what):
    """What is wrong where `got` is not even a tensor of the right shape and dtype, else None."""
    if got is None:
        inplace = " (What a collective returns is None, too: it works in place.)" * bool(expected.dim())
        return f"{what} is None: does the function end without a return?{inplace}"
    if isinstance(got, Other):
        return f"{what} is of type {got.type}, where {_kind(expected)} is asked for"
    if isinstance(got, (list, tuple)) and got and isinstance(got[0], torch.Tensor):
        return f"{what} is a {type_of(got)} of {len(got)} tensors, where {_kind(expected)} is asked for"
    if not isinstance(got, torch.Tensor):
        return f"{what} is {str(got)[:60]!r} ({type_of(got)}), where {_kind(expected)} is asked for"
    if got.shape != expected.shape:
        return f"{what} has shape {tuple(got.shape)}, where {tuple(expected.shape)} is asked for"
    if got.dtype != expected.dtype:
        return f"{what} is {_dtype(got)}, where {_dtype(expected)} is asked for"
    return None


def _pattern(got, expected, before, what, tolerance):
    """One sentence on how two tensors of one shape and dtype differ."""
    g, e = got.flatten().double(), expected.flatten().double()
    if got.dim() == 0 and not e and not g.isnan():
        return f"{what} is {g.item():.4g} where 0 is right"
    if not g.isfinite().all():
        return f"{what} contains {'NaN' if g.isnan().any() else 'infinity'}"
    if before is not None and equal(got, before):
        return f"{what} is as it was before the call"
    if not g.any():
        return f"{what} is {'0' if got.dim() == 0 else 'zero everywhere'}"
    if torch.allclose(g, e, 1e-5, 1e-6):
        return f"{what} is right to about 7 digits only: float64 values went through float32"
    if got.dim() == 0:
        return f"{what} is {(g / e).item():.4g} times what it should be"
    if (e != 0).all() and torch.allclose(g / e, (g / e)[0], 1e-4):
        return f"every element of {what} is {(g / e)[0].item():.4g} times as large as it should be"
    if torch.allclose(g, e, 5e-3, 1e-4 * e.abs().max().item()):
        return f"{what} is right to about 3 digits only: did its values go through 16 bits?"
    if g.numel() > 1 and torch.allclose(g.sort()[0], e.sort()[0], 1e-5):
        return f"{what} holds the right values in the wrong places"
    differs = (g - e).abs() > 1e-5 * e.abs() + 1e-6
    count, places = int(differs.sum()), differs.nonzero().flatten().tolist()
    if count < len(g):
        block = places[-1] - places[0] + 1 == count
        which = f"elements {places[0]} to {places[-1]}" if block and count > 1 else f"{count} of {len(g)} elements"
        which = f"element {places[0]}" if count == 1 else which
        return f"in {what} {which} (counted in one row from 0) {'is' if count == 1 else 'are'} wrong, the others right"
    return f"no element of {what} is right"


def _first_difference(got, expected, tolerance):
    relative, absolute = tolerance or TOLERANCE.get(expected.dtype, (0, 0))
    differs = ~torch.isclose(got, expected, relative, absolute).flatten()
    return int(differs.nonzero()[0])


def show(tensor, at=0, most=4):
    """The values of a tensor from element `at`, as short text."""
    flat = tensor.flatten()
    some = flat[at : at + most].tolist()
    text = ", ".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in some)
    text += ", …" if at + most < len(flat) else ""
    return text if tensor.dim() == 0 else f"[{'…, ' if at else ''}{text}]"


def _kind(value):
    if isinstance(value, torch.Tensor):
        return "a number" if value.dim() == 0 else f"{a(_dtype(value))} tensor of shape {tuple(value.shape)}"
    return f"a {value.type}" if isinstance(value, Other) else "nothing (None)" if value is None else repr(value)[:80]


def a(noun):
    """'a tensor', 'an int64'"""
    return f"{'an' if noun[:1] in 'aeio' else 'a'} {noun}"  # "a uint8"


def type_of(value):
    return value.type if isinstance(value, Other) else "nothing" if value is None else type(value).__name__


def _dtype(tensor):
    return _name(tensor.dtype)


def _name(dtype):
    return str(dtype)[6:]


# ---- traffic --------------------------------------------------------------------------------------------------


def only_calls(seen, allowed, because):
    """Raise `Wrong` where an answer communicates otherwise than by the operations in `allowed`.

    because: {operation: diagnosis}, with "" for any other operation ({op} is replaced by its name).
    """
    for rank, one in enumerate(seen):
        for call in one.calls:
            if call.op not in allowed:
                raise Wrong(because.get(call.op, because[""]).format(op=call.op), f"rank {rank}")


def only_within(members, mine, about):
    """Raise `Wrong` where a collective goes over other ranks than those of the answer's group. mine: its members'
    `Seen`. (Not for answers that send and receive: between the right ranks a message is right over any group.)"""
    for rank, one in zip(members, mine, strict=True):
        if strange := [call.op for call in one.calls if call.group and set(call.group) != set(members)]:
            raise Wrong(f"{strange[0]} goes over all ranks: `group` is missing from it", f"rank {rank}, {about}")


def as_many_bytes(members, mine, what, size, about, calls=1):
    """Raise `Wrong` unless each rank gives `size` bytes to at most `calls` calls. what: "the output", right by now."""
    for rank, one in zip(members, mine, strict=True):
        made = [call.bytes for call in one.calls]
        if sum(made) != size or len(made) > calls:
            op = one.calls[0].op if made else "all_reduce"
            why = f"{what} is right, but {len(made)} {op} of {sum(made):,} bytes are made for {size:,}"
            shown = f"{calls} of {size:,} bytes", f"{len(made)} of {sum(made):,} bytes"
            raise Wrong(why, f"rank {rank}, {about}", *shown)


def by_hand(seen):
    """Raise `Wrong` where an answer uses more of torch.distributed than send and receive."""
    why = "it calls torch's own {op}: write it here from send and receive alone"
    barrier = "it calls barrier: nothing but send and receive may be called here, and they wait as long as is needed"
    only_calls(seen, ("send", "recv"), {"barrier": barrier, "": why})


def own_dtype(seen, dtype, about=""):
    """Raise `Wrong` where a message has another dtype than the tensor it comes from."""
    for rank, one in enumerate(seen):
        for call in one.calls:
            if call.op == "send" and call.dtype not in ("", _name(dtype)):
                why = f"the message is {call.dtype}, the tensor {_name(dtype)}: send it in its own dtype"
                raise Wrong(why, ", ".join(filter(None, [f"rank {rank}", about])))


def sent(seen):
    """Bytes each rank sent, as a list."""
    return [sum(call.bytes for call in one.calls if call.op == "send") for one in seen]


def peers(seen):
    """The ranks to which each rank sent, as a list of sets."""
    return [{call.peer for call in one.calls if call.op == "send" and call.bytes} for one in seen]
