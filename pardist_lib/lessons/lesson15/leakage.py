"""What a gradient tells about the rows it was computed from: three attacks, and how alike two digits are.

read_off   a first layer with a bias: each row of its weight's gradient is (a number) · x, and the bias's gradient is
           that number. One division, for a single row exact (Phong et al. 2017; Geiping et al. 2020, prop. 3.1).
invert     any network: begin with noise and change it until *its* gradient is the one that was seen (Zhu et al. 2019,
           "Deep Leakage from Gradients"; Geiping et al. 2020, "Inverting Gradients": cosine distance, smoothness).
look_up    pictures of the same kind that anybody may have, and the gradient of each: those that the message is most
           like. It rebuilds nothing exactly, but noise that stops the other two leaves it a long way to go: it asks for
           one of many pictures, not for each pixel.

All look at all messages at once, which is fast and changes nothing. `strongest` tries them with many settings and
takes the ones that do best on the true digits: more than an attacker could know, so that no defence is flattered.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from pardist_lib.mechanisms.private.dp_sgd import per_sample_gradients

SETTINGS = [("read off", {"units": k}) for k in (1, 8, 64)]
SETTINGS += [("invert", {"match": m, "smooth": s}) for m in ("squares", "cosine") for s in (0.0, 0.01)]
SETTINGS += [("look up", {"many": k}) for k in (1, 10)]


def messages_of(model, x, y):
    """(b, P): the gradient of every row alone, flat, in the order of model.parameters(): what a client would send."""
    return torch.cat([g.flatten(1) for g in per_sample_gradients(model, F.cross_entropy, x, y).values()], 1)


def read_off(messages, model, units=1):
    """(b, P) -> (b, inputs): x from the first layer's gradients, by the `units` hidden units that say most."""
    hidden, inputs = model.fc1.weight.shape
    weight = messages[:, : hidden * inputs].view(-1, hidden, inputs)
    bias = messages[:, hidden * inputs : hidden * (inputs + 1)]
    top = bias.abs().topk(min(units, hidden), 1).indices
    bias = bias.gather(1, top)
    weight = weight.gather(1, top[:, :, None].expand(-1, -1, inputs))
    return (weight * bias[:, :, None]).sum(1) / (bias**2).sum(1, keepdim=True).clamp(min=1e-30)  # least squares


def invert(messages, model, *, rows=1, match="cosine", smooth=0.0, steps=150, lr=0.1, labels=None, low=-1.5, high=2.0,
           seed=0):  # fmt: skip
    """(b, P) -> (b, rows, inputs): for each message `rows` inputs whose mean gradient is like it.

    match   "squares" or "cosine": what to make small; smooth: how much differences of neighbouring pixels cost
    labels  (b, rows) where the attacker knows them; None: they are looked for too
    low, high   what a pixel can be
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    b, inputs = len(messages), model.fc1.weight.shape[1]
    x = torch.randn(b, rows, inputs, generator=generator).requires_grad_()
    guess = torch.zeros(b, rows, 10) if labels is None else 20.0 * F.one_hot(labels, 10)
    guess.requires_grad_(labels is None)

    def loss(parameters, x, guess):
        scores = functional_call(model, parameters, (x,))
        return -(F.log_softmax(scores, 1) * F.softmax(guess, 1)).sum(1).mean()

    gradient = vmap(grad(loss), (None, 0, 0))
    optimizer = torch.optim.Adam([x] if labels is not None else [x, guess], lr)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    side = round(inputs**0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: on busy cores, threads that wait for each other take far longer
    for _ in range(steps):
        found = torch.cat([g.flatten(1) for g in gradient(parameters, x, guess).values()], 1)
        if match == "cosine":
            apart = 1 - F.cosine_similarity(found, messages, dim=1)
        else:
            apart = (found - messages).square().sum(1) / messages.square().sum(1)
        image = x.view(b, rows, side, side)
        rough = image.diff(dim=2).abs().sum() + image.diff(dim=3).abs().sum()
        optimizer.zero_grad()
        (apart.sum() + smooth / inputs * rough).backward()
        optimizer.step()
        slower.step()
        with torch.no_grad():
            x.clamp_(low, high)
    torch.set_num_threads(threads)
    return x.detach()


def likest(messages, model, public, many=1):
    """(b, many): the numbers of the public rows whose gradients point most nearly where each message points.

    public: (x, y), rows of the same kind. Where all gradients are clipped to one length and the noise is Gaussian, the
    first is the likeliest of them.
    """
    alike = [messages @ F.normalize(messages_of(model, x, y), dim=1).T
             for x, y in zip(*(part.split(240) for part in public), strict=True)]  # fmt: skip
    return torch.cat(alike, 1).topk(many, 1).indices


def look_up(messages, model, public, many=1):
    """(b, P) -> (b, inputs): for each message the mean of the `many` public rows most like it."""
    return public[0][likest(messages, model, public, many)].mean(1)


def similarity(found, true, average, low=-1.5, high=2.0):
    """(what is particular to the digit, the whole picture): the structural similarity of each pair, two tensors (b,).

    Wang et al. 2004, as scikit-image computes it (windows of 7 × 7): 1 for the same picture, about 0 for noise.
    All digits are alike, though: the average digit, which needs no message at all, is already about 0.5 similar to
    each. So the first figure takes the average digit off both pictures before it compares them.
    """
    from skimage.metrics import structural_similarity

    def of(a, b):
        side = round(len(a) ** 0.5)
        return structural_similarity(a.view(side, side).numpy(), b.view(side, side).numpy(), data_range=high - low)

    pairs = list(zip(found.clamp(low, high).float(), true.float(), strict=True))
    return torch.tensor([of(a - average, b - average) for a, b in pairs]), torch.tensor([of(a, b) for a, b in pairs])


def matched(found, true, average):
    """`found` in the order in which it is most like `true`: for attacks that get several digits at once, unsorted."""
    alike = F.normalize(found - average, dim=1) @ F.normalize(true - average, dim=1).T
    rows, columns = linear_sum_assignment(-alike.numpy())
    order = torch.empty(len(true), dtype=torch.long)
    order[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return found[order]


def strongest(messages, model, true, average, settings=SETTINGS, public=None, **options):
    """(its name, (b, inputs), the two similarities) of the attack that does best, by the median over all messages.

    Best is what has the larger of the two medians, so that neither of the two figures is too kind to a defence.
    public: (x, y), rows that anybody may have; without them nothing is looked up.
    """
    best = None
    for kind, setting in settings:
        if kind == "read off":
            found = read_off(messages, model, **setting)
        elif kind == "look up":
            if public is None:
                continue
            found = look_up(messages, model, public, **setting)
        else:
            found = invert(messages, model, **setting, **options)[:, 0]
        alike = similarity(found, true, average)
        score = max(s.median().item() for s in alike)
        if best is None or score > best[0]:
            said = ", ".join(f"{k} {v}" for k, v in setting.items())
            best = score, f"{kind}: {said}", found, alike
    return best[1:]
