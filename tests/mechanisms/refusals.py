"""What a mechanism refuses on a rank, and in which words."""

import re
from contextlib import contextmanager

import pytest

from pardist_lib import RankError


@contextmanager
def refused(pattern):
    """As pytest.raises(RankError, match=pattern), but looks at the exception's own words only: the report around them
    quotes the line that raised it, which in a table of cases has the pattern beside it."""
    with pytest.raises(RankError) as caught:
        yield caught
    assert re.search(pattern, caught.value.message), caught.value.message
