"""Real data without a download: scikit-learn's digits, and the text of Python's own standard library."""

import sysconfig
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))  # 96 characters: they split over 2, 3, 4, 6 and 8 ranks


class Digits(NamedTuple):
    """Images are rows of 64 pixels (8×8, row by row), labels are 0 to 9."""

    train_x: torch.Tensor  # (1440, 64), `dtype`
    train_y: torch.Tensor  # (1440,), int64
    test_x: torch.Tensor  # (357, 64)
    test_y: torch.Tensor  # (357,)


class Text(NamedTuple):
    """A text as numbers: `tokens[i]` is the place of the i-th character in `vocabulary`."""

    tokens: torch.Tensor  # (size,), int64, values 0 to 95
    vocabulary: str  # 96 characters

    def decode(self, tokens):
        """The characters of a tensor of tokens, as a string."""
        return "".join(self.vocabulary[i] for i in tokens.flatten().tolist())


def digits(dtype=torch.float32, seed=0):
    """The 1,797 handwritten digits that come with scikit-learn (UCI, Alpaydin and Kaynak 1998).

    Returns `Digits`: 1,440 rows to train on (a number that 2, 3, 4, 5, 6 and 8 ranks share evenly) and 357 to test
    with. All pixels are shifted and scaled by the same two numbers, so that the training pixels have mean 0 and
    standard deviation 1. The split depends on `seed` only; the global random state is left alone.
    """
    pixels, labels = (part.clone() for part in _raw_digits())
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    pixels, labels = pixels[order], labels[order]
    pixels = (pixels - pixels[:1440].mean()) / pixels[:1440].std()
    pixels = pixels.to(dtype)
    return Digits(pixels[:1440], labels[:1440], pixels[1440:], labels[1440:])


@lru_cache(1)
def _raw_digits():
    """load_digits() reads this file too, but importing scikit-learn takes a second and 75 MB, on every rank."""
    package = Path(find_spec("sklearn").origin).parent
    raw = torch.from_numpy(np.loadtxt(package / "datasets" / "data" / "digits.csv.gz", delimiter=","))
    return raw[:, :-1].contiguous(), raw[:, -1].long()


def library_text(size=500_000):
    """The first `size` characters of the running Python's standard library, its modules in alphabetical order.

    Returns `Text`. The vocabulary is fixed: newline and the 95 printable ASCII characters; a tab becomes four
    spaces and everything else a question mark. Another version of Python gives another text, of the same size.

    Raises ValueError where the library has fewer characters than `size`.
    """
    parts, found = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if found >= size:
            break
        parts.append(path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n").expandtabs(4))
        found += len(parts[-1])
    if found < size:
        raise ValueError(f"the standard library's modules here have {found:,} characters: ask for at most so many")
    place = {character: i for i, character in enumerate(VOCABULARY)}
    unknown = place["?"]
    tokens = [place.get(character, unknown) for character in "".join(parts)[:size]]
    return Text(torch.tensor(tokens), VOCABULARY)
