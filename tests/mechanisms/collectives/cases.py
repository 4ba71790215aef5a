"""One call of one collective as plain data, and what every rank must end with, by one process."""

import inspect

import torch
import torch.distributed as dist

from pardist_lib.mechanisms import collectives

OPS = {
    "SUM": torch.sum,
    "AVG": lambda stacked, dim: torch.sum(stacked, dim) / len(stacked),
    "MAX": torch.amax,
    "MIN": torch.amin,
    "PRODUCT": torch.prod,
}

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool,
]  # fmt: skip

KINDS = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather", "scatter"]

NAMES = [name for name in collectives.__all__ if name != "split_sizes" and not name.endswith("_group")]


def kind_of(name):
    return next(kind for kind in KINDS if name.endswith(kind))


def case_of(name, n, **changes):
    """One call of one collective, as plain data: every process can make every rank's input from it."""
    case = {
        "name": name, "n": n, "rows": 7, "shape": (), "dtype": torch.float32, "op": "SUM", "root": n - 1, "seed": 0,
        "layout": "contiguous", "sizes": [(5 * rank + 3) % 4 for rank in range(n)], "piece_bytes": 16,
    }  # fmt: skip
    return case | changes


def input_of(rank, case):
    """Small whole numbers: their sums and products are exact in every dtype, whatever the order."""
    kind, rows = kind_of(case["name"]), case["rows"]
    if kind in ("all_gather", "gather"):
        rows = case["sizes"][rank]
    elif kind == "scatter":
        rows = sum(case["sizes"])
    elif case["name"] == "bruck_all_to_all":
        rows *= case["n"]
    numbers = torch.Generator().manual_seed(1000 * case["seed"] + rank)
    x = torch.randint(0, 3, (rows, *case["shape"]), generator=numbers).to(case["dtype"])
    if case["layout"] == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0] if case["layout"] == "strided" else x


def expected(case):
    """What every rank must end with, by one process that sees all inputs."""
    kind, n, root = kind_of(case["name"]), case["n"], case["root"]
    inputs = [input_of(rank, case) for rank in range(n)]
    if kind == "broadcast":
        return [inputs[root]] * n
    if kind == "all_gather":
        return [torch.cat(inputs)] * n
    if kind == "gather":
        return [torch.cat(inputs) if rank == root else None for rank in range(n)]
    if kind == "scatter":
        return list(inputs[root].split(case["sizes"]))
    if kind == "all_to_all":
        return [torch.cat([x.tensor_split(n)[rank] for x in inputs]) for rank in range(n)]
    total = OPS[case["op"]](torch.stack(inputs), 0).to(case["dtype"])
    if kind == "reduce":
        return [total if rank == root else inputs[rank] for rank in range(n)]
    return [total] * n if kind == "all_reduce" else list(total.tensor_split(n))


def called(case, group=None, members=None):
    """On a rank: make the call, look at what can only be seen there, return the result."""
    members = members or list(range(case["n"]))
    rank, root = members.index(dist.get_rank()), members[case["root"]]
    kind, op = kind_of(case["name"]), getattr(dist.ReduceOp, case["op"])
    function, x = getattr(collectives, case["name"]), input_of(rank, case)
    options = {"group": group, "op": op, "sizes": case["sizes"], "piece_bytes": case["piece_bytes"]}
    options |= {"src": root, "dst": root}
    options = {name: value for name, value in options.items() if name in inspect.signature(function).parameters}
    if kind == "scatter":
        whole, x = (x if rank == case["root"] else None), torch.empty_like(x.split(case["sizes"])[rank])
        result = function(x, whole, **options)
    else:
        result = function(x, **options)
    if kind in ("broadcast", "reduce", "all_reduce", "scatter"):
        assert result is x, "not in place"
    else:
        assert torch.equal(x, input_of(rank, case)), "the input was changed"
    return result


def several(cases):
    results = [called(case) for case in cases]
    return [result if result is None else result.clone(memory_format=torch.contiguous_format) for result in results]


def check(ranks, cases):
    results = ranks.run(several, cases, quiet=True)
    for i, case in enumerate(cases):
        for rank, want in enumerate(expected(case)):
            same(results[rank][i], want, f"rank {rank} of {case}")


def same(got, want, what):
    assert (got is None) == (want is None), what
    if want is not None:
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")
