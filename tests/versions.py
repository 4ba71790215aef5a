"""What older versions cannot do: why tests are skipped under them (see tests/environments)."""

import pytest
import torch


def since(version, why):
    """Skip a test where torch is older. why: what it cannot do."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"before torch {version} {why}")
