"""Bytes on the wire against what was really sent."""

import socket
import sys

import pytest

from pardist_lib.measure.wire import bytes_on_the_wire

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux's")


@pytest.fixture
def pair():
    """Two ends of a TCP connection of this process with itself."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


@linux
def test_counts_every_byte_of_every_connection(pair):
    near, far = pair
    before = bytes_on_the_wire()
    near.sendall(b"x" * 12_345)
    far.sendall(b"y" * 55)
    near.recv(55, socket.MSG_WAITALL)
    far.recv(12_345, socket.MSG_WAITALL)
    assert bytes_on_the_wire() - before == 12_345 + 55


@linux
def test_leaves_the_connection_as_it_was(pair):
    near, far = pair
    near.settimeout(None)
    bytes_on_the_wire()
    near.sendall(b"still open")
    assert far.recv(10, socket.MSG_WAITALL) == b"still open" and near.getblocking()


@linux
def test_other_sockets_and_files_do_not_count(pair):
    before = bytes_on_the_wire()
    here, there = socket.socketpair()
    with here, there, socket.create_server(("127.0.0.1", 0)):
        here.sendall(b"x" * 99)
        assert bytes_on_the_wire() == before


def test_says_so_where_the_kernel_cannot_tell(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NotImplementedError, match="darwin"):
        bytes_on_the_wire()
