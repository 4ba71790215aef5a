"""Bytes that this process put on the wire, read from the kernel."""

import os
import socket
import stat
import struct
import sys

_ESTABLISHED = 1
_BYTES_SENT = 200  # where tcpi_bytes_sent stands in struct tcp_info: linux/tcp.h, since Linux 4.19


def bytes_on_the_wire() -> int:
    """Bytes sent so far over all TCP connections that this process has open: payload, headers of gloo, repeats.

    Headers of TCP and IP do not count; nor does what other ways than TCP carry (nccl inside a machine). Take the
    difference of two calls, with no connection closed in between. Linux only: NotImplementedError elsewhere.
    """
    if not sys.platform.startswith("linux"):
        raise NotImplementedError(f"bytes on the wire are read from Linux's TCP_INFO; this is {sys.platform}")
    return sum(_sent(int(name)) for name in os.listdir("/proc/self/fd"))


def _sent(fd):
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return 0
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
                return 0
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:  # closed meanwhile, or made a moment ago by another thread
        return 0
    if len(info) < _BYTES_SENT + 8:
        raise NotImplementedError("this kernel's TCP_INFO does not count bytes sent: Linux 4.19 or newer is needed")
    return struct.unpack_from("=Q", info, _BYTES_SENT)[0] if info[0] == _ESTABLISHED else 0
