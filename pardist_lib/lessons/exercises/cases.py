"""What checks have in common: the inputs they give, and how they judge what happened to a tensor or a number."""

from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..worlds import group_of
from .judge import Wrong, a, same
from .watch import told, watched

F32, F64, I64 = torch.float32, torch.float64, torch.int64
LOOSE = (1e-6, 2e-7)  # tolerance where a part, rows / total, may be a float32 tensor: torch makes it of whole numbers
PAIRS = ((0, 2), (1, 3))  # two groups of two ranks each

# ---- cases ----------------------------------------------------------------------------------------------------


@contextmanager
def what_is_new(new):
    """What is wrong inside is said with what is new in this case: "with 3 ranks (is a 4 written into it?): …".

    new: "" where nothing is, as in the first case.
    """
    try:
        yield
    except Wrong as wrong:
        if new:
            wrong.diagnosis = f"{new}: {wrong.diagnosis}"
        raise


def one_by_one(cases, news, one):
    """Call `one(seed, *case)` for each case; a failure tells what is new in its case, where that is one thing.

    news: `news(*case)` is {sentence: whether it holds}, the same things in the same order for each case.
    """
    known = set()
    for seed, case in enumerate(cases):
        new = {i: said for i, (said, holds) in enumerate(news(*case).items()) if holds}
        fresh = [said for i, said in new.items() if i not in known]
        with what_is_new(fresh[0] if len(fresh) == 1 else ""):
            one(seed, *case)
        known |= new.keys()


def groups_of(in_pairs, n=4):
    """The groups of a case, each a tuple of ranks: two pairs, or all n ranks as one."""
    return PAIRS if in_pairs else (tuple(range(n)),)


def own_group(in_pairs):
    """On a rank: the keyword that gives an answer its group, {} where that is all ranks. Every rank has to call it."""
    groups = [group_of(members) for members in PAIRS] if in_pairs else []
    return {"group": groups[dist.get_rank() % 2]} if in_pairs else {}


def call(answer, inputs, *args, **options):
    """On a rank: `answer(*inputs.values(), *args, **options)`, watched.

    inputs: {name: tensor, or None}. seen.kept has "given", what they were, "after", what they are now, and "changed",
    the names of those that the answer wrote into: see `untouched`.
    """
    given = {name: t if t is None else t.detach().clone() for name, t in inputs.items()}
    seen = watched(answer, *inputs.values(), *args, **options)
    changed = [name for name, t in inputs.items() if t is not None and not torch.equal(t.detach(), given[name])]
    after = {name: t if t is None else t.detach().clone() for name, t in inputs.items()}
    seen.kept = {"given": given, "after": after, "changed": changed}
    return seen


def untouched(seen, about, but=()):
    """Raise Wrong where an answer wrote into what it was given: the other half of `call`.

    but: names of inputs that it is to write into; `same` then looks at one.kept["after"][name].
    """
    for rank, one in enumerate(seen):
        if changed := [name for name in one.kept["changed"] if name not in but]:
            why = f"`{changed[0]}` was changed: += and calls ending in _ write into what was given"
            raise Wrong(why, f"rank {rank}, {about}")


# ---- tensors and numbers --------------------------------------------------------------------------------------


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

    def news(n, shape, dtype):
        size, kind = torch.Size(shape).numel(), str(dtype)[6:]
        return {
            f"it works with 4 ranks, but not with {n} (is a 4 written into it?)": n != 4,
            f"it works where {n} divides the number of elements, but not for {size}": split and size % n,
            f"it works for 8 elements, but not for {size} (is a size written into it?)": not split
            and size not in (1, 8),
            "it does not work where there are fewer elements than ranks": split and size < n,
            "it works only for tensors with one dimension": len(shape) > 1,
            "it does not work for a tensor without dimensions, a single number": not shape,
            f"it works for float32, but not for {kind}": dtype != F32,
        }

    def with_its_name(seed, n, shape, dtype):
        one(n, shape, dtype, seed, f"{a(str(dtype)[6:])} tensor of shape {shape} on {n} ranks")

    try:
        one_by_one(CASES, news, with_its_name)
    except Wrong as wrong:
        if wrong.hangs:
            odd = "but 3 cannot be paired off, even ranks with odd ones"
            wrong.diagnosis = wrong.diagnosis.replace("but not with 3 (is a 4 written into it?)", odd)
        raise


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
    return watched(lambda: [told(answer, *args) for args in inputs])


def numbers(run, inputs, expected, labels, mistakes, tolerance=(1e-6, 0)):
    """Raise Wrong unless the answer gives these numbers. mistakes: (diagnosis, function of the inputs)."""
    [seen] = run(_each, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
    got = [number(value) for value in seen.result]
    wrong = [(why, [number(float(gives(*args))) for args in inputs]) for why, gives in mistakes]
    expected = [number(float(e)) for e in expected]
    same(got, expected, "", mistakes=wrong, labels=labels, tolerance=tolerance)


def formula(run, right, inputs, mistakes, tolerance=(1e-6, 0)):
    """Raise Wrong unless the answer gives the numbers of `right`, named as the exercise, for these inputs."""
    labels = [f"{right.__name__}({', '.join(map(repr, args))})" for args in inputs]
    numbers(run, inputs, [right(*args) for args in inputs], labels, mistakes, tolerance)


def number(value):
    """A number as a float64 tensor without dimensions; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    return value
