"""One attention of one sequence as plain data, what one process makes of it, and what ranks do."""

import torch
from torch.nn import functional as F

from pardist_lib.mechanisms.context_parallel.all_to_all import all_to_all_attention
from pardist_lib.mechanisms.context_parallel.order import collect, deal
from pardist_lib.mechanisms.context_parallel.ring import ring_attention

ATTENTIONS = {"ring": ring_attention, "all to all": all_to_all_attention}
MASKS = {
    None: None,
    "window": lambda q, k: (q - k).abs() < 5,
    "some see nothing": lambda q, k: (q % 3 != 1) & (k % 2 == 0),
    "nobody sees anything": lambda q, k: (q < 0) & (k < 0),
    "not oneself": lambda q, k: q != k,
    "of keys only": lambda q, k: k % 4 != 2,
}
PLAIN = {
    "how": "ring", "s": 24, "heads": 2, "kv": 2, "d": 4, "e": 4, "batch": 2, "order": "zigzag", "causal": True,
    "mask": None, "documents": None, "scale": 1.0, "dtype": torch.float64, "length": None, "layout": "contiguous",
}  # fmt: skip


def inputs_of(case):
    """[q, k, v, the gradient that the result gets], whole, in float64 to the case's precision."""
    b, s, heads, kv, d, e = (case[name] for name in ("batch", "s", "heads", "kv", "d", "e"))
    g = torch.Generator().manual_seed(s)
    shapes = (b, heads, s, d), (b, kv, s, d), (b, kv, s, e), (b, heads, s, e)
    q, k, v, grad = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return [x.to(case["dtype"]) for x in (q * case["scale"], k, v, grad)]


def documents_of(case):
    """None; "one row": of all batches alike; "each": every batch its own. Documents of seven tokens or so."""
    at, batch = torch.arange(case["s"]), torch.arange(case["batch"])[:, None]
    return {None: None, "one row": at // 7, "each": (at + 3 * batch) // 7}[case["documents"]]


def alone(case):
    """[result, dq, dk, dv] of one process, in float64, by torch's own attention with the whole square of a mask."""
    q, k, v, grad = (x.double() for x in inputs_of(case))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gqa = {"enable_gqa": True} if case["heads"] != case["kv"] else {}
    if case["mask"] is None and case["documents"] is None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=case["causal"], **gqa)
    else:
        at = torch.arange(case["s"])
        seen = at[:, None] >= at if case["causal"] else torch.ones(len(at), len(at), dtype=torch.bool)
        seen = seen & MASKS[case["mask"]](at[:, None], at) if case["mask"] else seen
        if case["documents"]:
            documents = documents_of(case).expand(case["batch"], -1)
            seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
        anything = seen.any(-1, keepdim=True)  # where a row sees nothing let it see all, and count 0
        y = F.scaled_dot_product_attention(q, k, v, seen | ~anything, **gqa) * anything
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def together(case):
    """On a rank: [own result, its gradients' own parts], put together to what one process has."""
    order, more = case["order"], {"mask": MASKS[case["mask"]], "documents": documents_of(case)}
    *whole, grad = (deal(x, dim=2, order=order) for x in inputs_of(case))
    if case["layout"] == "transposed":  # as after qkv.view(b, s, heads, d).transpose(1, 2)
        whole = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in whole]
    leaves = [x.requires_grad_() for x in whole]
    y = ATTENTIONS[case["how"]](*leaves, None, case["causal"], order, length=case["length"], **more)
    parts = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    return [collect(part, dim=2, order=order) for part in parts]


def apart(got, want):
    """The largest difference, in units of the largest number that there is (or of 1)."""
    assert got.shape == want.shape
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1)).item() if got.numel() else 0.0
