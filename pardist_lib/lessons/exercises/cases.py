"""What checks have in common: the inputs they give, and how they judge what happened to a tensor or a number."""

import torch
import torch.distributed as dist

from .judge import Wrong, a, same
from .watch import watched


def values(shape, dtype, rank, seed=0):
    """What a rank holds at the beginning: seeded, another on every rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(-99, 100, shape, generator=generator).to(dtype)


def call_with_tensor(answer, shape, dtype, seed, *args):
    """On a rank: give the answer this rank's tensor, and keep what the tensor is afterwards."""
    tensor = values(shape, dtype, dist.get_rank(), seed)
    seen = watched(answer, tensor, *args)
    seen.kept = tensor
    return seen


F32, F64, I64 = torch.float32, torch.float64, torch.int64
CASES = (  # ranks, shape, dtype: one thing after the other departs from the first case
    (4, (8,), F32),
    (4, (10,), F32),
    (4, (3,), F32),
    (4, (4, 3), F32),
    (4, (8,), I64),
    (4, (3, 5), F64),
    (4, (), F32),
    (4, (2, 50), F32),
    (3, (8,), F32),
    (2, (5,), F64),
)


def every_case(one, split=False):
    """Call `one(n, shape, dtype, seed, about)` for each of CASES; a failure tells what is new in its case.

    split: whether the answer has to cut the tensor into n pieces.
    """
    known = set()
    for seed, (n, shape, dtype) in enumerate(CASES):
        size, kind = torch.Size(shape).numel(), str(dtype)[6:]
        notable = {
            f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
            f"it works where {n} divides the number of elements, but not for {size}": split and size % n,
            f"it works for 8 elements, but not for {size} (is a size written into it?)": not split
            and size not in (1, 8),
            "it does not work where there are fewer elements than ranks": split and size < n,
            "it works only for tensors with one dimension": len(shape) > 1,
            "it does not work for a tensor without dimensions, a single number": not shape,
            f"it works for float32, but not for {kind}": dtype != F32,
        }
        kinds = {i: text for i, (text, holds) in enumerate(notable.items()) if holds}
        try:
            one(n, shape, dtype, seed, f"{a(kind)} tensor of shape {shape} on {n} ranks")
        except Wrong as wrong:
            if wrong.hangs and n % 2 and 0 not in known:
                kinds[0] = f"it works with 4 ranks, but {n} cannot be paired off, even ranks with odd ones"
            if len(new := [text for i, text in kinds.items() if i not in known]) == 1:
                wrong.diagnosis = f"{new[0]}: {wrong.diagnosis}"
            raise
        known |= kinds.keys()


def in_place(seen, expected, before, about, mistakes=()):
    """Raise Wrong unless every rank's own tensor has become the expected one."""
    after = [one.kept for one in seen]
    if all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
        returned = [one.result for one in seen]
        if all(isinstance(r, torch.Tensor) and r.shape == e.shape for r, e in zip(returned, expected, strict=True)):
            same(returned, expected, "the returned tensor", about, mistakes, before)
            raise Wrong(
                "it returns the right values, but `tensor` itself is unchanged: write them into it",
                f"every rank, {about}",
            )
    idle = "tensor is as it was before the call: write into it with += or copy_ (x = x + y only makes a new tensor)"
    same(after, expected, "tensor", about, [*mistakes, (idle, before)], before)


def unchanged(seen, before, about):
    """Raise Wrong where an answer changed the tensor it was given."""
    for rank, one in enumerate(seen):
        if not torch.equal(one.kept, before[rank]):
            raise Wrong("the input `tensor` was changed: work on a copy of it", f"rank {rank}, {about}")


def _each(answer, inputs):
    return watched(lambda: [answer(*args) for args in inputs])


def numbers(run, inputs, expected, labels, mistakes, tolerance=(1e-6, 0)):
    """Raise Wrong unless the answer gives these numbers. mistakes: (diagnosis, function of the inputs)."""
    [seen] = run(_each, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
    got = [number(value) for value in seen.result]
    wrong = [(why, [torch.tensor(float(formula(*args)), dtype=torch.float64) for args in inputs])
             for why, formula in mistakes]  # fmt: skip
    expected = [torch.tensor(float(e), dtype=torch.float64) for e in expected]
    same(got, expected, "", mistakes=wrong, labels=labels, tolerance=tolerance)


def number(value):
    """A number as a float64 tensor without dimensions; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    return value
