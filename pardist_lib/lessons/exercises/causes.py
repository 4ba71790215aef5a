"""What an exception in an answer most probably means, in one clause; torch's own words say what happened, not why."""

import re

_CAUSES = [  # (in "Type: message", the clause; {1}, {2} … are the pattern's groups)
    (r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x\2\)",
     "({1}, {2}) @ ({3}, {2}) wants the second one turned, .T"),
    (r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)",
     "({1}, {2}) @ ({3}, {4}) needs {2} = {3}: is one of them cut along another dimension, or not turned with .T?"),
    (r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
     "tensors of {1} and of {2} do not fit together: is one of them this rank's part, and the other one whole?"),
    (r"expanded size of the tensor \((\d+)\) must match the existing size \((\d+)\)",
     "tensors of {1} and of {2} do not fit together: is one of them this rank's part, and the other one whole?"),
    (r"output with shape .* doesn't match the broadcast shape", "what is written is larger than where it is to go"),
    (r"size mismatch, got input \((\d+)\), mat \((\d+)x(\d+)\)",
     "({2}, {3}) @ ({1}) needs {3} = {1}: is one of them cut along another dimension?"),
    (r"IndexError: index (-?\d+) is out of bounds for dimension \d+ with size 0",
     "there is nothing in it: with few elements a rank can have none (chunk can leave the last ranks without)"),
    (r"IndexError: (list|tuple) index out of range",
     "there are fewer parts than ranks: torch.chunk can give fewer, split(n) cuts parts of n each, tensor_split(n) "
     "always gives n"),
    (r"IndexError: list assignment index out of range",
     "is a rank of the world used in a smaller group? dist.get_rank(group) counts in the group"),
    (r"IndexError: index (-?\d+) is out of bounds for dimension (\d+) with size (\d+)",
     "the last one has the number {3} - 1: is it counted from 1, or is a rank of the world used in a smaller group?"),
    (r"IndexError: Dimension out of range|Dimension specified as 0 but tensor has no dimensions|"
     r"zero-dimensional tensor|0-d tensor|no dimensions|0-dimensional",
     "there are tensors without dimensions too, a single number: view(-1) makes one dimension of any"),
    (r"shape '\[([^]]*)\]' is invalid for input of size (\d+)",
     "{2} elements do not make ({1}): they need not be a multiple of the number of ranks"),
    (r"view size is not compatible with input tensor's size and stride",
     "it is not contiguous (a cut along a later dimension, a .T): reshape, or contiguous() first"),
    (r"[Tt]ensors? must be contiguous|non-contiguous",
     "a cut along a later dimension, or a .T, is not contiguous: send a copy, .contiguous()"),
    (r"Sizes of tensors must match except in dimension|stack expects each tensor to be equal size",
     "the ranks' parts need not be equally large: make room for each one in its own size"),
    (r"allgather: invalid tensor size at index 0 \(expected \((\d+)[^)]*\), got \(1\D",
     "one tensor for all ranks' parts has them one after the other along its first dimension, n * {1}: the stacked "
     "form, (n, {1}, …), is for nccl only"),
    (r"split_with_sizes expects split_sizes to sum exactly to (\d+)",
     "the sizes have to add up to {1}: they need not come out even"),
    (r"leaf Variable that requires grad is being used in an in-place operation|"
     r"leaf variable has been moved into the graph interior|a view of a leaf Variable that requires grad",
     "a parameter is written into while autograd looks on: do it under torch.no_grad(), or work on p.grad"),
    (r"element 0 of tensors does not require grad",
     "the way back is cut: a detach, a no_grad, or a new tensor made of the values stands between"),
    (r"modified by an inplace operation", "autograd still needs what was overwritten: make a new tensor instead"),
    (r"is a view and is being modified inplace|view was created in no_grad mode",
     "it is written into a part of a tensor on which autograd looks: make a new tensor instead"),
    (r"Can't call numpy\(\) on Tensor that requires grad", ".detach() comes first"),
    (r"result type (\w+) can't be cast to the desired output type (\w+)",
     "{1} does not fit into {2} in place: there are tensors of other types than float32"),
    (r"different dtypes", "two tensors of different types meet: torch.empty_like(t) makes room in t's own type"),
    (r"same dtype|expected scalar type (\w+) but found (\w+)|dtype .* to be the same",
     "two tensors of different types meet: was one made without dtype=?"),
    (r"(min|max)\(\) (arg|iterable argument) is (an )?empty",
     "there can be nothing to take it of: a rank alone, no rows"),
    (r"ZeroDivisionError|division by zero|modulo by zero",
     "something is 0 here that can be: one rank, or no rows at all"),
    (r"Boolean value of Tensor|truth value of an array",
     "a tensor is asked for a yes or no: (…).all(), torch.equal, or `is None` say what is meant"),
    (r"a Tensor with \d+ elements cannot be converted to Scalar",
     ".item() takes a tensor of one element: which of them is meant?"),
    (r"\.(forward|backward)\(\) takes \d+ positional arguments? but",
     "the first thing it is given is ctx, in an autograd.Function (in a module, self)"),
    (r"incorrect number of gradients \(expected (\d+), got (\d+)\)",
     "backward returns a gradient for each argument that forward has after ctx, and None for what is no tensor (a "
     "group): {1} of them"),
    (r"returned an invalid gradient at index \d+ - got \[(.*)\] but expected shape compatible with \[(.*)\]",
     "what backward returns is the gradient of what forward was given, so it has that shape, ({2})"),
    (r"has to be a tensor, but got NoneType|'NoneType' object has no attribute 'wait'",
     "a collective works in place and returns None, or, with async_op=True, a work to wait for"),
    (r"unsupported operand type.*NoneType",
     "one of the two is None: what a collective returned, which works in place? A p.grad that is not there?"),
    (r"of type torch.Tensor.*\n?.*NoneType", "it is None there: the p.grad of a frozen or unused parameter?"),
    (r"of type torch.Tensor.*\n?.*class '(int|float)'", "it is a number there: torch.tensor(…) makes a tensor of it"),
    (r"missing \d+ required positional argument|takes \d+ positional arguments? but|unexpected keyword argument",
     "the call does not fit the function it calls"),
    (r"UnboundLocalError", "it gets its value in a branch that was not taken here"),
    (r"NameError: name '(\w+)' is not defined",
     "the cell that defines or imports `{1}` was not run, or it is misspelt"),
    (r"Default process group has not been initialized", "it was called in the notebook: the ranks have the group"),
    (r"RecursionError", "it calls itself without end"),
]  # fmt: skip


def likeliest_cause(kind, message, known=()):
    """A clause, or "" where none is known. known: further (pattern, clause), which come first."""
    text = f"{kind}: {message}"
    for pattern, clause in [*known, *_CAUSES]:
        if found := re.search(pattern, text):
            return re.sub(r"\{(\d)\}", lambda m: found[int(m[1])] or "", clause)
    return ""
