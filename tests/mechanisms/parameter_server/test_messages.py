"""The header of a push."""

import pytest

from pardist_lib.mechanisms.parameter_server.messages import LEAVING, header, header_bytes, read_header


@pytest.mark.parametrize("parameters", [0, 1, 8, 9, 17])
@pytest.mark.parametrize("rows", [0, 3, 2**40, LEAVING])
def test_a_header_is_read_as_it_was_written(parameters, rows):
    used = [i % 3 == 1 for i in range(parameters)]
    raw = header(rows, used)
    assert raw.numel() == header_bytes(parameters) == 8 + (parameters + 7) // 8
    assert read_header(raw, parameters) == (rows, used)
