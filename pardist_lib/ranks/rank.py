"""What a rank does: join the group, then run what the notebook sends, one call after the other.

A rank has three connections to the notebook: `calls` (the main thread waits on it), `watch` (a thread that can
answer "where are you?" while the main thread is blocked inside gloo, and that ends the process when the notebook
is gone) and `out` (file descriptors 1 and 2: everything printed, by Python or C++).
"""

import ast
import ctypes
import faulthandler
import io
import os
import sys
import threading
import time
import traceback
import types
from contextlib import suppress

from . import ledger as ledgers
from . import surroundings, waits
from .transport import Parcel, call_in, receive

END = b"\x1e"  # after a call's output: END, the call's number, END
THIS = types.SimpleNamespace(rank=None, calls=None, device=None, pid=None, out=None)  # of the process that is a rank

names = types.ModuleType("__main__")  # where %%ranks cells run: their names stay


def serve(folder, env, generation):
    """Be one rank until the notebook goes away. Never returns."""
    os.environ.update(env)
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    who = {"rank": rank, "generation": generation, "pid": os.getpid()}
    THIS.pid, THIS.out = os.getpid(), call_in(folder, role="out", **who)
    for fd in (1, 2):
        os.dup2(THIS.out.fileno(), fd)
    sys.stdout, sys.stderr = _stream(1), _stream(2)
    faulthandler.enable(open(os.path.join(folder, f"fault-{generation}-{rank}"), "w"))

    watch = call_in(folder, role="watch", **who)
    threading.Thread(target=_watch, args=(watch, threading.get_ident()), daemon=True).start()
    try:
        backend, device = _join(folder, rank, size, generation)
    except BaseException as error:
        call_in(folder, role="calls", problem=_described(error), **who)
        os._exit(1)
    if size <= 32:
        ledgers.install(ledgers.Ledger(os.path.join(folder, "ledger"), size), rank, waits.started)
    THIS.rank, THIS.device = rank, device
    THIS.calls = call_in(folder, role="calls", backend=backend, device=str(device), **who)
    sys.modules["__main__"] = names
    names.__dict__.update({"__builtins__": __builtins__, "rank": rank, "world_size": size})
    surroundings.prepare()
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc has it
    try:
        while True:
            _one_call(receive(THIS.calls))
            give_back(0)  # what the call has freed goes back to the system: 25 MB a rank after a small training
    except (EOFError, OSError):
        os._exit(0)


def backend_and_device(rank, size):
    """By what the machine has: ("cpu:gloo,cuda:nccl", a GPU of its own), ("gloo", its share of one), ("gloo", CPU)."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    if gpus >= size and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl", torch.device("cuda", rank)
    if gpus:  # nccl refuses two ranks on one GPU: they share it, and gloo carries their messages
        return "gloo", torch.device("cuda", rank % gpus)
    return "gloo", torch.device("cpu")


def _join(folder, rank, size, generation):
    """Choose backend and device, and join the group.

    torchrun's MASTER_ADDR and MASTER_PORT would make rank 0 listen on every interface of the machine, without a
    key; a file in the session's private folder serves as well and listens nowhere.
    """
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    backend, device = backend_and_device(rank, size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(os.path.join(folder, f"store-{generation}"), size)
    forever = datetime.timedelta(days=1)  # stalls are noticed by the notebook, sooner and with more to say
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=forever)
    return backend, device


def _stream(fd):
    stream = io.TextIOWrapper(open(fd, "wb", 0, closefd=False), "utf-8", "replace", write_through=True)
    if fd == 1:
        stream.reconfigure(line_buffering=True, write_through=False)
    return stream


def _one_call(arrived):
    import torch.distributed as dist

    number = arrived.head
    try:
        fn, args, kwargs = arrived.load()
        surroundings.adopt(names)
        reply = "result", _packed(fn(*args, **kwargs))
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: the rank must live on
        reply = "error", Parcel(_described(error))
    if os.getpid() != THIS.pid:
        os._exit(0)  # the reader's os.fork: what came back here a second time is not this rank
    _flush(number)
    reply[1].send(THIS.calls, (number, reply[0], dist.is_initialized()))
    reply[1].close()


def _packed(result):
    try:
        return Parcel(result)
    except Exception as error:
        raise TypeError(
            f"the result cannot be sent back to the notebook ({error}): return plain values (tensors, numbers, lists)"
        ) from None


def _flush(number):
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the reader's own stream, or a closed one
            stream.flush()
    ctypes.CDLL(None).fflush(None)  # what C++ printed and still holds
    os.write(THIS.out.fileno(), END + str(number).encode() + END)
    for fd, name in ((1, "stdout"), (2, "stderr")):  # what the call has closed is open for the next one
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(THIS.out.fileno(), fd)
        if getattr(getattr(sys, name), "closed", False):
            setattr(sys, name, _stream(fd))


def _described(error, with_earlier=True):
    """An exception, and the one before it, as plain data: the notebook has the cells' source, so it draws the lines."""
    frames = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    try:
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
    except BaseException:
        message = "(its text cannot be shown: str() of it raises)"
    if isinstance(error, SyntaxError) and error.filename:
        frames.append(traceback.FrameSummary(error.filename, error.lineno, "<module>", lookup_line=False))
        message = error.msg
    return {
        "type": type(error).__name__,
        "message": message,
        "frames": [(f.filename, f.lineno, f.name) for f in frames],
        "time": time.time_ns(),
        "earlier": _described(earlier, False) if with_earlier and earlier is not None else None,
    }


def _watch(conn, main_thread):
    """Answer the notebook's question what this rank is doing; end the rank when the notebook is gone."""
    try:
        while True:
            question = conn.recv()
            frame, frames, spot = sys._current_frames().get(main_thread), [], None
            for f, line in traceback.walk_stack(frame):
                code = f.f_code  # where its name is not enough, a library's function says what it does in __doing__
                name = f.f_locals.get("__doing__", code.co_name) if "__doing__" in code.co_varnames else code.co_name
                frames.append((code.co_filename, line or code.co_firstlineno, name))
                if spot is None and ledgers.is_readers(code.co_filename):
                    spot = waits.spot(f)
            conn.send((question, frames[::-1], spot, _collectives_so_far(), waits.under_way()))
    except (EOFError, OSError):
        os._exit(0)


def _collectives_so_far():
    """How many collectives the groups of this rank have seen: also those that DDP's C++ code makes."""
    import torch.distributed as dist

    try:
        return sum(group._get_sequence_number_for_group() for group in list(dist.distributed_c10d._world.pg_map))
    except Exception:
        return 0


# ---- what the notebook sends for itself -----------------------------------------------------------------------


def run_cell(source, filename):
    """Run a %%ranks cell in this rank's persistent names; the value of a last expression is printed."""
    try:
        tree = ast.parse(source, filename)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        code = compile(tree, filename, "exec")
        last = last and compile(ast.Expression(last.value), filename, "eval")
    except SyntaxError as error:
        raise _notebooks_own(error, source) from None
    exec(code, names.__dict__)
    if last is not None:
        value = eval(last, names.__dict__)
        if value is not None:
            names._ = value
            print(repr(value))


def _notebooks_own(error, source):
    """The same SyntaxError, saying more where the line is one that only a notebook understands."""
    line = source.splitlines()[error.lineno - 1].strip() if error.lineno else ""
    if line.startswith(("%", "!")):
        said = "%%ranks cells are plain Python (time.perf_counter(), subprocess.run(…))"
        error.msg = f"`{line[:40]}` is the notebook's own, and {said}"
    elif "await" in line:
        error.msg = "await needs the notebook's event loop, and a rank has none: asyncio.run(…)"
    return error


def push(values):
    names.__dict__.update(values)


def pull(wanted):
    return names.__dict__[wanted]


def progress(iterable, description="", total=None):
    """Iterate as usual; the notebook shows one bar for all ranks, at the pace of the slowest.

    Outside a `Ranks` (a plain script, the notebook itself) it is `tqdm`.
    """
    total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
    if THIS.calls is None:
        from tqdm import tqdm

        yield from tqdm(iterable, desc=description, total=total)
        return
    shown = 0.0
    for done, item in enumerate(iterable):
        if time.monotonic() - shown > 0.1:
            shown = time.monotonic()
            THIS.calls.send((("progress", description, done, total), []))
            THIS.calls.send_bytes(b"N.")
        yield item


def device():
    """The device of this rank: its own GPU, its share of one, or the CPU."""
    import torch

    return THIS.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
