"""Send Python objects between the notebook and its ranks.

Functions written in notebook cells cannot be imported by another process, so they travel by value
(cloudpickle). Tensors and arrays travel beside the pickle: their bytes go into one piece of anonymous shared
memory whose file descriptor is handed over the Unix socket, and the receiver maps it. A large tensor is thus
copied once, whoever reads it; the mapping is copy-on-write, so nobody sees another's changes.

Every connection is made over a Unix socket in a private folder and has to answer an HMAC challenge with the
session's key first (`multiprocessing.connection`).
"""

import contextlib
import io
import mmap
import operator
import os
import pickle
import socket
import sys
import tempfile
import types
from multiprocessing import connection
from pathlib import Path

import cloudpickle

OUT_OF_BAND = 1 << 16  # bytes from which a buffer goes beside the pickle
HANDSHAKE_SECONDS = 5
LONGEST_SOCKET = 104  # bytes of a Unix socket's path: 108 on Linux, 104 on macOS


def _tensor(buffer, dtype, shape, requires_grad, parameter):
    import torch

    flat = torch.frombuffer(buffer, dtype=torch.uint8).view(dtype) if 0 not in shape else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    if parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def _code(code):
    """As cloudpickle takes code apart, but with the file it is from: errors name the reader's cell by it. (From 3.1.3
    on cloudpickle writes <dynamic-code> instead.)"""
    make, parts = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return make, tuple(code.co_filename if part == "<dynamic-code>" else part for part in parts)


def _name_in_torch(obj):
    """ "ops.aten.add" of torch's operators and of what holds them, which cannot be taken apart; "" of other things."""
    if isinstance(obj, types.ModuleType):
        return obj.__name__.removeprefix("torch.")
    return f"ops.{obj}" if type(obj).__name__ in ("OpOverloadPacket", "OpOverload") else ""


class _Pickler(cloudpickle.Pickler):
    """cloudpickle, with ordinary tensors as plain bytes: values only, on the CPU, without their autograd graph."""

    dispatch_table = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: _code})

    def reducer_override(self, obj):
        torch, functional = map(sys.modules.get, ("torch", "torch.distributed._functional_collectives"))
        if functional and isinstance(obj, functional.AsyncCollectiveTensor):
            obj = obj.wait()  # DTensor's results may still be on their way
        if torch and type(obj).__module__ in ("torch._ops", "torch._classes") and (name := _name_in_torch(obj)):
            return operator.attrgetter(name), (torch,)
        if torch and type(obj) in (torch.Tensor, torch.nn.Parameter):
            if obj.layout == torch.strided and not obj.is_quantized and obj.device.type != "meta":
                values = obj.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
                values = values if values.numel() else values.new_empty(0)  # whatever strides an empty one has
                wants_grad = obj.requires_grad and obj.is_leaf
                buffer = pickle.PickleBuffer(values.view(torch.uint8).numpy())
                return _tensor, (buffer, obj.dtype, tuple(obj.shape), wants_grad, type(obj) is torch.nn.Parameter)
        return super().reducer_override(obj)


class Parcel:
    """An object made ready to be sent, any number of times: a pickle and, for large buffers, shared memory."""

    def __init__(self, obj):
        self.sizes, buffers = [], []

        def beside(buffer):
            raw = buffer.raw()
            if raw.nbytes < OUT_OF_BAND:
                return True  # small: keep it in the pickle
            buffers.append(raw)
            self.sizes.append(raw.nbytes)

        stream = io.BytesIO()
        _Pickler(stream, protocol=5, buffer_callback=beside).dump(obj)
        self.pickle = stream.getbuffer()
        if not beside(pickle.PickleBuffer(self.pickle)):  # a long pickle too: what is left fits the socket, so that
            self.pickle = b""  # nobody ever waits for a receiver that does not read
        self.fd = _shared(buffers, sum(map(_padded, self.sizes))) if buffers else None

    def send(self, conn, head):
        """Send `head` (any small picklable value) and the object over a multiprocessing Connection."""
        conn.send((head, self.sizes))
        conn.send_bytes(self.pickle)
        if self.fd is not None:
            with _socket(conn) as s:
                socket.send_fds(s, [b"\0"], [self.fd])

    def close(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Arrived:
    """What `receive` returns: the head at once, the object when `load` is called (so that errors in loading it
    can be told from errors of the connection)."""

    def __init__(self, head, data, sizes, memory):
        self.head, self._data, self._sizes, self._memory = head, data, sizes, memory

    def load(self):
        view = memoryview(self._memory) if self._memory is not None else None
        buffers, start = [], 0
        for size in self._sizes:
            buffers.append(view[start : start + size])
            start += _padded(size)
        data = self._data or buffers.pop()
        return pickle.loads(data, buffers=buffers)


def receive(conn):
    """Receive what `Parcel.send` sent; EOFError when the other side is gone."""
    head, sizes = conn.recv()
    data = conn.recv_bytes()
    memory = None
    if sizes:
        with _socket(conn) as s:
            _, fds, _, _ = socket.recv_fds(s, 1, 1)
        memory = mmap.mmap(fds[0], sum(map(_padded, sizes)), access=mmap.ACCESS_COPY)
        os.close(fds[0])
    return Arrived(head, data, sizes, memory)


def _padded(size):
    return -(-size // 64) * 64  # every buffer starts on a cache line


def _shared(buffers, size):
    """A file descriptor of memory that holds them. Written, not mapped: the kernel then fills its pages without a
    page fault for each, in half the time."""
    fd, start = _anonymous_memory(size), 0
    for raw in buffers:
        done = 0
        while done < raw.nbytes:  # one call writes 2 GB at most
            done += os.pwrite(fd, raw[done:], start + done)
        start += _padded(raw.nbytes)
    return fd


def _anonymous_memory(size):
    """A file descriptor of `size` bytes that no folder lists: gone with its last user."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("pardist")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _socket(conn):
    return socket.socket(fileno=os.dup(conn.fileno()))


def private_folder(prefix):
    """A new folder that nobody else gets into (mode 0700), in the temporary folder; where that one's path is too long
    for a Unix socket in it, as on macOS, clusters and hubs, in /tmp."""
    folder = tempfile.mkdtemp(prefix=prefix)
    if len(os.fsencode(f"{folder}/listener-12345678")) < LONGEST_SOCKET:  # as multiprocessing calls those in a rank
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix=prefix, dir="/tmp")


class Door:
    """The notebook's listening socket in the session's private folder."""

    def __init__(self, folder):
        self.key = os.urandom(32)
        key_file = Path(folder, "key")
        key_file.touch(mode=0o600)
        key_file.write_bytes(self.key)
        self.listener = connection.Listener(str(Path(folder, "door")), family="AF_UNIX", backlog=64)
        self._socket = self.listener._listener._socket

    def fileno(self):
        return self._socket.fileno()

    def accept(self):
        """The next caller and what it says it is, or None for one that did not prove that it has the key."""
        conn = self.listener.accept()
        try:
            connection.deliver_challenge(_Impatient(conn), self.key)
            connection.answer_challenge(_Impatient(conn), self.key)
            return conn, conn.recv()
        except (connection.AuthenticationError, EOFError, OSError):
            conn.close()
            return None

    def close(self):
        with contextlib.suppress(FileNotFoundError):  # a host that went first has taken the folder along
            self.listener.close()


class _Impatient:
    """A connection that gives up on a silent caller, so that a stranger cannot hold the notebook."""

    def __init__(self, conn):
        self.send_bytes, self._conn = conn.send_bytes, conn

    def recv_bytes(self, maxlength):
        if not self._conn.poll(HANDSHAKE_SECONDS):
            raise EOFError("the caller stays silent")
        return self._conn.recv_bytes(maxlength)


def call_in(folder, **who):
    """Connect to the session whose private folder this is, and say who is calling."""
    conn = connection.Client(str(Path(folder, "door")), family="AF_UNIX", authkey=Path(folder, "key").read_bytes())
    conn.send(who)
    return conn
