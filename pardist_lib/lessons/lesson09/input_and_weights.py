"""input_and_weights: backward in two halves. Typically wrong: all at once, relu forgotten, or computed twice."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..exercises.cases import F32, F64, untouched, values
from ..exercises.exercise import Exercise
from ..exercises.judge import Wrong, same
from ..exercises.runs import silent
from ..exercises.watch import plain, watched

hints = (
    "Write the five gradients down first: of h = relu(a) from grad; of a, which is x @ w1.T; of x, w1 and w2. Which of "
    "them lead from grad to x?",
    "dh = (grad @ w2) * (h > 0) leads to x: dh @ w1. The weights are beside the way: dh.T @ x and grad.T @ h, and "
    "nobody waits for these.",
    "A function that is defined inside of a function remembers its variables: return dh @ w1, lambda: (dh.T @ x, "
    "grad.T @ h).",
)
CASES = [(3, 4, 6, 2, F64), (2, 2, 3, 4, F64), (5, 3, 2, 3, F32)]  # rows, in, hidden, out, dtype
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_int_mm", "linear")


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::").rstrip("_") in PRODUCTS
        return function(*args, **(kwargs or {}))


def check(run):
    for seed, sizes in enumerate(CASES):
        about = "x ({0}, {1}), w1 ({2}, {1}), w2 ({3}, {2})".format(*sizes)
        [seen] = run(_called, sizes, seed, n=1, about=about)
        silent(seen)
        untouched([seen], about)
        if len(seen.kept["first"]) < 2:
            raise Wrong("it returns no pair of a tensor and a function: (gradient of x, function) is asked for", about)
        for i, at in enumerate(("", ", of the second of two micro-batches")):
            _judge(seen, i, _given(sizes, seed, i), _given(sizes, seed, 1 - i), f"{about}{at}")


def _given(sizes, seed, i):
    rows, wide, hidden, out, dtype = sizes
    shapes = {"x": (rows, wide), "w1": (hidden, wide), "w2": (out, hidden), "grad": (rows, out)}
    return {
        name: values(shape, dtype, 80 + k + 10 * i * (name in ("x", "grad")), seed)
        for k, (name, shape) in enumerate(shapes.items())
    }


def _called(answer, sizes, seed):
    """Two micro-batches: I, I, W, W, as a schedule may have them."""
    inputs, firsts, laters, counts = [_given(sizes, seed, i) for i in range(2)], [], [], []

    def both():
        pairs = []
        for given in inputs:
            with _Products() as products:
                pairs.append(answer(*given.values()))
            counts.append(products.count)
        for result in pairs:
            if not isinstance(result, (tuple, list)) or len(result) != 2 or not callable(result[1]):
                return
            first, later = result
            firsts.append(plain(first))
            with _Products() as products:
                laters.append(plain(later()))
            counts.append(products.count)

    seen = watched(both)
    given = {f"{name} of {i}": t for i, one in enumerate(inputs) for name, t in one.items()}
    fresh = {f"{name} of {i}": t for i in range(2) for name, t in _given(sizes, seed, i).items()}
    seen.kept = {"changed": [name for name in given if not torch.equal(given[name].detach(), fresh[name])]}
    seen.kept |= {"first": firsts, "later": laters, "products": counts}
    return seen


def _halves(x, w1, w2, grad):
    """What is asked for, and what it is made of."""
    h = torch.relu(x @ w1.T)
    through, mask = grad @ w2, (h > 0).to(x.dtype)
    dh = through * mask
    return {"x": dh @ w1, "w1": dh.T @ x, "w2": grad.T @ h}, h, through, mask, dh


def _judge(seen, i, given, other, about):
    x, w1, w2, grad = given.values()
    right, h, through, mask, dh = _halves(**given)
    no_mask = "relu is left out on the way back: where it gave 0, no gradient comes through"
    overwritten = "this is the other micro-batch's: it was kept in a variable outside, and overwritten since"
    mistakes = [
        (no_mask, through @ w1),
        ("the gradient goes through relu's values, h, instead of through whether they are above 0", through * h @ w1),
        ("relu's mask is the wrong way round", through * (1 - mask) @ w1),
        ("relu is applied to the gradient: it is the sign of forward's values that counts", torch.relu(through) @ w1),
    ]
    same([seen.kept["first"][i]], right["x"], "", about, mistakes, labels=["the gradient of x"])
    later = seen.kept["later"][i]
    if not isinstance(later, (tuple, list)) or len(later) != 2:
        got = "nothing (None)" if later is None else type(later).__name__
        raise Wrong(f"the function returns {got}: the gradients of w1 and w2 are asked for", about)
    if getattr(later[0], "shape", None) == right["w2"].shape != right["w1"].shape:
        raise Wrong("the function returns the gradient of w2 first: w1, then w2", about)
    wrong = {
        "w1": [
            (no_mask, through.T @ x),
            (overwritten, _halves(**other)[0]["w1"]),
            ("the gradient of w1 is turned, .T", x.T @ dh),
        ],
        "w2": [
            ("forward's values before relu stand where those after it belong", grad.T @ (x @ w1.T)),
            (overwritten, _halves(**other)[0]["w2"]),
            ("the gradient of w2 is turned, .T", h.T @ grad),
        ],
    }
    for name, got in zip(("w1", "w2"), later, strict=True):
        same([got], right[name], "", about, wrong[name], labels=[f"the gradient of {name}"])
    _judge_work(seen.kept["products"][i], seen.kept["products"][2 + i], about)


def _judge_work(first, second, about):
    right, shown = "the gradients are right, but ", ("at most 4 and 2 products", f"{first} and {second}")
    if second < 2:
        why = "the function has nothing left to do: weights' gradients are computed in the first half"
        raise Wrong(f"{right}{why}, and the rank before waits for it", about, *shown)
    if first > 4:
        why = "is a weight's gradient among them, for which nobody waits?"
        raise Wrong(f"{right}the first half takes {first} products: {why}", about, *shown)
    if second > 2:
        why = "what led to x is computed again; keep it"
        raise Wrong(f"{right}the function takes {second} products: {why}", about, *shown)


WHY = (
    "The way to the input needs the weights, the way to the weights needs the kept activations: two products that "
    "share only dh. PyTorch's pipelines split any graph so, and so does this course, by autograd's own nodes."
)
exercise = Exercise(hints, check, minutes=12, level="medium", why=WHY)
