"""Wrong answers to input_and_weights, as people really write them, and unusual right ones."""

import torch

from tests.lessons.planted import mistake, right


@mistake("input_and_weights", "relu is left out on the way back")
def forgets_relu(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = grad @ w2
    return dh @ w1, lambda: (dh.T @ x, grad.T @ h)


@mistake("input_and_weights", "the gradient goes through relu's values")
def times_h(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * h
    return dh @ w1, lambda: (dh.T @ x, grad.T @ h)


@mistake("input_and_weights", "relu is applied to the gradient")
def relu_of_the_gradient(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = torch.relu(grad @ w2)
    return dh @ w1, lambda: (dh.T @ x, grad.T @ h)


@mistake("input_and_weights", "the function has nothing left to do")
def all_at_once(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)
    dw1, dw2 = dh.T @ x, grad.T @ h
    return dh @ w1, lambda: (dw1, dw2)


@mistake("input_and_weights", "the function has nothing left to do")
def one_of_them_early(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dw2 = grad.T @ h
    dh = (grad @ w2) * (h > 0)
    return dh @ w1, lambda: (dh.T @ x, dw2)


@mistake("input_and_weights", "what led to x is computed again; keep it")
def computes_it_again(x, w1, w2, grad):
    def later():
        h = torch.relu(x @ w1.T)
        return ((grad @ w2) * (h > 0)).T @ x, grad.T @ h

    h = torch.relu(x @ w1.T)
    return ((grad @ w2) * (h > 0)) @ w1, later


@mistake("input_and_weights", "the function returns the gradient of w2 first")
def w2_first(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)
    return dh @ w1, lambda: (grad.T @ h, dh.T @ x)


@mistake("input_and_weights", "it returns no pair of a tensor and a function")
def no_function(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)
    return dh @ w1, (dh.T @ x, grad.T @ h)


@mistake("input_and_weights", "forward's values before relu")
def before_relu(x, w1, w2, grad):
    a = x @ w1.T
    dh = (grad @ w2) * (a > 0)
    return dh @ w1, lambda: (dh.T @ x, grad.T @ a)


@mistake("input_and_weights", "the gradient of w1 is turned, .T")
def turned(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)
    return dh @ w1, lambda: (x.T @ dh, h.T @ grad)


@mistake("input_and_weights", "it was kept in a variable outside, and overwritten since")
def one_place_for_all(x, w1, w2, grad, place={}):  # noqa: B006 - that is the mistake
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)
    place.update(x=x, h=h, dh=dh, grad=grad)
    return dh @ w1, lambda: (place["dh"].T @ place["x"], place["grad"].T @ place["h"])


@mistake("input_and_weights", "was changed")
def writes_into_grad(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    grad *= 1.5
    dh = (grad @ w2 / 1.5) * (h > 0)
    return dh @ w1, lambda: (dh.T @ x, (grad / 1.5).T @ h)


@mistake("input_and_weights", "the function returns nothing (None)")
def returns_none(x, w1, w2, grad):
    h = torch.relu(x @ w1.T)
    dh = (grad @ w2) * (h > 0)

    def later():
        dh.T @ x, grad.T @ h

    return dh @ w1, later


@right("input_and_weights")
def a_class_that_is_called(x, w1, w2, grad):
    class Later:
        def __init__(self, x, h, dh, grad):
            self.kept = x, h, dh, grad

        def __call__(self):
            x, h, dh, grad = self.kept
            return [dh.T.mm(x), grad.T.mm(h)]

    a = torch.nn.functional.linear(x, w1)
    dh = torch.where(a > 0, grad.mm(w2), 0)
    return dh.mm(w1), Later(x, a.clamp(min=0), dh, grad)


@right("input_and_weights")
def einsum(x, w1, w2, grad):
    h = torch.relu(torch.einsum("bi,hi->bh", x, w1))
    dh = torch.einsum("bo,oh->bh", grad, w2) * h.sign()
    return torch.einsum("bh,hi->bi", dh, w1), lambda: (
        torch.einsum("bh,bi->hi", dh, x),
        torch.einsum("bo,bh->oh", grad, h),
    )
