"""From what the reader has (tensors, arrays, lists) to plain arrays and short text."""

import numpy as np


def array(value, what):
    """A copy of `value` as a numeric numpy array. Tensors may need gradients or be bf16; torch is not imported.

    Raises ValueError, naming `what`, where it is no rectangular array of numbers.
    """
    if isinstance(value, (list, tuple)) and any(hasattr(v, "detach") for v in value):
        value = [array(v, what) for v in value]
    if hasattr(value, "detach"):  # a torch tensor
        value = value.detach().cpu()
        value = (value.float() if "bfloat16" in str(value.dtype) else value).numpy()
    try:
        result = np.array(value)
    except ValueError:
        raise ValueError(f"{what}: rows of different lengths; expected a rectangular array of numbers") from None
    if result.dtype.kind not in "biuf":
        raise ValueError(f"{what}: expected an array of numbers, got {result.dtype} from {type(value).__name__}")
    return result


def per_rank(values, what):
    """One array per rank from a list, None where a rank holds nothing; ValueError where it is no such list."""
    if isinstance(values, (str, dict)) or not hasattr(values, "__len__") or not len(values):
        raise ValueError(f"{what}: expected a list with one array per rank, got {type(values).__name__}")
    return [None if v is None else array(v, f"{what}, rank {rank}") for rank, v in enumerate(values)]


def number(value):
    """One number in few characters: whole numbers as they are, others to three significant digits."""
    value = float(value)
    whole = value.is_integer() and abs(value) < 1e6
    return str(int(value)) if whole else f"{value:.3g}"


def brief(values, most=16):
    """The numbers of an array as text, or its shape where there are more than `most`."""
    if values.size > most:
        return f"shape {shape(values)}"
    return "[" + " ".join(map(number, values.flat)) + "]" if values.ndim else number(values)


def shape(values):
    """'(2, 3)' of an array."""
    return "(" + ", ".join(map(str, values.shape)) + ("," if values.ndim == 1 else "") + ")"


def size(count):
    """A number of bytes, decimal units: '96 B', '1.5 kB', '16.8 MB', '2.8 TB'."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def listed(items):
    """'a', 'a and b', 'a, b and c'."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def count(number, noun):
    """'1 rank', '4 ranks', '2 processes', '6 bytes' (of "bytes")."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("ss") else "s" * (not noun.endswith("s")))
