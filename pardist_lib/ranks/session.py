"""`Ranks`: warm ranks under torchrun, driven from a notebook or a script."""

import atexit
import gc
import inspect
import itertools
import math
import os
import sys
import threading
import time
import warnings
import weakref

from . import report
from .again import names_set_in
from .card import card, process_rows
from .link import HERE, Link
from .output import Live, in_notebook
from .rank import pull, push, run_cell
from .transport import Parcel

_all, _counter = weakref.WeakSet(), itertools.count()
_KEPT = "The ranks and what they hold are still there."
FRESH = "A fresh set of ranks takes over: names that %%ranks cells had set are gone, the next call works."


class Ranks:
    """`n` processes started by torchrun, joined in a group, and kept warm.

    Ranks(4, timeout=20, threads=1)

    n        how many ranks (torchrun's --nproc-per-node).
    timeout  seconds without a sign of life (output, a collective, a result) after which a stall is reported.
    threads  threads each rank computes with.
    fork     True: torch is imported once, by a host that forks the ranks (the default, except on macOS);
             False: every torchrun worker imports torch itself and becomes the rank.

    Each rank gets its own GPU with nccl where there are enough, a share of one over gloo where there are fewer,
    and the CPU with gloo elsewhere. Use as a context manager, or call `close`; the ranks also end with the
    notebook's kernel. In a notebook a second `Ranks(4)` replaces the first, so that running a cell again does not
    pile up processes.
    """

    def __init__(self, n=4, *, timeout=20.0, threads=1, fork=sys.platform != "darwin"):
        self.state, self.output, self.last_error, self._why = "closed", [], None, ""
        self._set, self._lost = set(), set()  # names on the ranks; names on ranks that were replaced
        if not isinstance(n, int) or not 1 <= n <= 32:
            raise ValueError(f"Ranks(n): n is a whole number from 1 to 32, not {n!r}")
        self.n, self.timeout, self._cards, self._lock = n, seconds(timeout), [], threading.Lock()
        self.made, self._notebook, self._settled = next(_counter), os.getpid(), True
        began = time.monotonic()
        self._link = Link(n, threads, fork)
        self._become("starting")
        try:
            self._link.wait_joined()
        except KeyboardInterrupt:
            self.close()
            raise report.RanksInterrupted(
                f"Ranks({n}) was still starting; nothing of it is left. {_goes_on()}"
            ) from None
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - began
        self._become("ready")
        _close_namesakes(n)  # only now: a start that fails or is interrupted leaves things as they were
        _all.add(self)

    def run(self, fn, *args, on=None, quiet=False, timeout=None, at_most=None, **kwargs):
        """Call `fn(*args, **kwargs)` on every rank (or on the ranks in `on`) and wait for all.

        Returns the list of results in rank order. `fn` may be defined in a cell. Tensors come back by value, on
        the CPU, without their autograd graph. What the ranks print is shown (not with `quiet`) and stays in
        `self.output`, one string a rank. Raises RankError or RankHang, whose first line is the root cause; the
        next call works whatever happened.

        timeout: seconds without a sign of life, by default those of the ranks. at_most: seconds after which a call is
        stopped even if it gives signs of life; None: never.
        """
        if not callable(fn):
            raise TypeError(f"run(fn, *args): fn is a function, not {type(fn).__name__}; give it without calling it")
        if missing := _does_not_fit(fn, args, kwargs):
            raise TypeError(missing)
        on = range(self.n) if on is None else [on] if isinstance(on, int) else list(on)
        if wrong := [r for r in on if r not in range(self.n)]:
            raise ValueError(f"there is no rank {wrong[0]}: this Ranks has ranks 0 to {self.n - 1}")
        if len(set(on)) < len(on):
            raise ValueError(f"a rank is named twice in on={on}: it makes one call at a time")
        timeout = self.timeout if timeout is None else seconds(timeout)
        try:
            parcel = Parcel((fn, args, kwargs))
        except Exception as error:
            raise TypeError(unsendable(fn, args, kwargs, error)) from None
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("these ranks are busy with another call")
        try:
            if self.state == "closed":
                raise RuntimeError(f"these ranks are closed{self._why}: make new ones with Ranks(n)")
            return self._call(parcel, on, quiet, timeout, math.inf if at_most is None else seconds(at_most))
        except report.RankError as error:
            self.last_error = error
            raise
        finally:
            parcel.close()
            self._lock.release()

    def trace(self, fn, *args, **kwargs):
        """Like `run`, under torch's profiler on every rank: a `Trace` of what each computed and communicated;
        the results are `trace.results`. With memory=True also of what each held (`trace.memory`)."""
        from pardist_lib.measure.trace import Trace, record

        return Trace(self.run(record, fn, *args, **kwargs))

    def push(self, **values):
        """Set names on every rank, for %%ranks cells: ranks.push(x=torch.ones(3))."""
        self.run(push, values, quiet=True)
        self._keep(values)

    def pull(self, name):
        """The value a name has on each rank, as a list."""
        return self.run(pull, name, quiet=True)

    def run_cell(self, source, filename="<cell>", on=None):
        """What %%ranks does: run source text on the ranks, in names that persist there."""
        try:
            self.run(run_cell, source, filename, on=on)
        finally:
            self._keep(names_set_in(source))

    def _keep(self, names):
        self._set |= set(names)
        self._lost -= set(names)

    def restart(self):
        """Replace all ranks by fresh ones (names set on them are gone)."""
        self._replace(FRESH)
        self._link.wait_joined()
        self._become("ready")

    def close(self):
        """End the ranks, torchrun and everything they opened."""
        if self.state != "closed" and os.getpid() == self._notebook:  # not in a process that the notebook forked
            self._become("closed")
            self._link.close()

    def _end(self, why):
        self._why = f", {why}"
        self.close()

    def processes(self):
        """The true process tree as a list of dicts (pid, parent, what, rank, threads), from the notebook down."""
        return process_rows(self._link)

    @property
    def backend(self):
        return self._link.ranks[0].backend

    @property
    def device(self):
        return self._link.ranks[0].device

    @property
    def command(self):
        """The torchrun command that runs, without this machine's paths."""
        text = " ".join(["torchrun", *self._link.torchrun[3:]]).replace("{generation}", str(self._link.generation))
        return text.replace(self._link.folder, "$SESSION").replace(f"{HERE}/", "")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if not sys.is_finalizing():
            self.close()

    def __reduce__(self):
        raise TypeError("a Ranks stays in the notebook: it cannot be sent to its own ranks")

    def __repr__(self):
        return f"Ranks({self.n}): {self.state}" + (f", {self.backend} on {self.device}" if self.backend else "")

    def _ipython_display_(self):
        from IPython.display import display

        shown = display({"text/html": card(self), "text/plain": repr(self)}, raw=True, display_id=True)
        self._cards = [*self._cards[-3:], shown]

    # ---- one call ---------------------------------------------------------------------------------------------

    def _call(self, parcel, on, quiet, timeout, at_most):
        link = self._link
        if not self._settled:  # the stop button was pressed a second time, or while ranks were being replaced
            self._replace(FRESH)
        self._settled = False
        try:
            link.wait_joined()
        except RuntimeError:
            self.close()
            raise
        self._become("running")
        link.number += 1
        for r in link.ranks:
            r.begin(r.number in on)
        mine, live = [link.ranks[r] for r in on], Live(quiet)
        try:
            for r in mine:
                try:
                    parcel.send(r.calls, link.number)
                except OSError:
                    pass  # it died while idle: the host tells how
            self._wait(mine, live, timeout, at_most)
            if behind := link.ledger.behind():
                lasts = link.last_calls()
                raise report.unfinished(behind, lasts, self._replace(FRESH))
            if all(r.in_group for r in mine):
                self._settled = True
            else:
                warnings.warn(
                    f"The ranks have left their group (destroy_process_group). {self._replace(FRESH)}", stacklevel=3
                )
            return [r.outcome[1].load() for r in mine]
        except KeyboardInterrupt:
            link.ask_where(0.5)
            said = report.folded(report.where(self._outcomes(), link.calls()))
            raise report.RanksInterrupted(f"{said}\n{self._replace(FRESH)}") from None
        finally:
            live.finish(mine)
            self.output = [r.printed.text() for r in mine] if len(mine) == self.n else self._output_of(mine)
            if self.state == "running":
                self._become("ready")

    def _output_of(self, mine):
        return [next((r.printed.text() for r in mine if r.number == n), "") for n in range(self.n)]

    def _wait(self, mine, live, timeout, at_most):
        """Until every rank is done; raises when one has failed, nothing moves any more, or it takes too long."""
        link, began = self._link, time.monotonic()
        signs, since, probes, counted = None, began, 0, None
        while not all(r.ended for r in mine):
            moved = link.pump(0.1)
            live.update(mine)
            if link.lost:
                self.close()
                raise report.RankError(f"the ranks are gone: {link.lost}. Make new ones with Ranks(n)")
            if any(r.outcome[0] in ("error", "died") for r in mine):
                raise self._failed(mine)
            if time.monotonic() - began > at_most:
                link.ask_where(0.5)
                raise report.endless(self._outcomes(), link.calls(), at_most, self._replace(FRESH))
            now = [link.ledger.total(r) for r in range(self.n)]
            if moved or now != signs:
                signs, since, probes = now, time.monotonic(), 0
                continue
            silent = time.monotonic() - since
            # look closer after one second, at half time and at the end
            if silent > (1.0, timeout / 2, timeout)[min(probes, 2)] or silent > timeout:
                before, counted = counted, link.ask_where(0.5)
                probes += 1
                if probes > 1 and counted != before and any(counted.values()):
                    since, probes = time.monotonic(), 1  # DDP's own collectives went on meanwhile
                elif silent > timeout or self._cannot_go_on():
                    raise self._hung(silent)

    def _cannot_go_on(self):
        """True where a rank waits for a call that another one, already back, did not make."""
        back = {r.number for r in self._link.ranks if r.outcome[0] in ("result", "idle")}
        return any(one.missing and one.missing <= back for one in self._link.calls().values())

    def _failed(self, mine):
        link, began = self._link, time.monotonic()
        while not all(r.ended for r in mine):  # other failures, or a death that came before, may be on their way
            link.pump(0.05)
            if time.monotonic() - began > (1.5 if report.second_hand_only(self._outcomes()) else 0.4):
                break  # a rank whose neighbour has gone is not the cause: on a busy machine the cause comes later
        link.ask_where(0.5)
        gone = {r.number: ("left", "left the group") for r in mine if r.outcome[0] == "result" and not r.in_group}
        outcomes, calls, lasts = self._outcomes() | gone, link.calls(), link.last_calls()
        faults = link.fault_frames(report.root_cause(outcomes))
        self._settled = not link.ledger.behind() and report.harmless(outcomes) and all(r.in_group for r in mine)
        lost = set(self._lost)
        return report.failure(outcomes, calls, lasts, faults, _KEPT if self._settled else self._replace(FRESH), lost)

    def _hung(self, seconds):
        link = self._link
        outcomes, calls = self._outcomes(), link.calls()
        return report.hang(outcomes, calls, round(seconds, 1), self._replace(FRESH))

    def _outcomes(self):
        return {r.number: r.outcome for r in self._link.ranks}

    def _replace(self, ending):
        self._lost, self._set = self._lost | self._set, set()
        self._link.replace()
        self._settled = True
        self._become("replacing its ranks")
        return ending

    def _become(self, state):
        self.state = state
        if state != "running":  # too short-lived to draw
            for shown in self._cards:
                shown.update({"text/html": card(self), "text/plain": repr(self)}, raw=True)


def newest(at_least=1):
    """The Ranks made last and still open, of those with as many ranks; None where there is none."""
    return next((r for r in reversed(open_ones()) if r.n >= at_least), None)


def seconds(timeout):
    """A timeout, checked: ValueError where it is no number above 0."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout is a number of seconds above 0, not {timeout!r}")
    return timeout


def _does_not_fit(fn, args, kwargs):
    """What is wrong with the arguments of a call, and how it is written; None where they fit, or nobody knows."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as problem:
        name = getattr(fn, "__name__", type(fn).__name__)
        wanted = [p.name if p.default is p.empty else str(p) for p in signature.parameters.values()]
        return f"{name}: {problem}. It is called as ranks.run({', '.join([name, *wanted])}), on every rank"


def unsendable(fn, args, kwargs, error):
    """Say which part of a call cannot be pickled."""
    parts = [(f"argument {i}", a) for i, a in enumerate(args)] + [(f"argument {k}", v) for k, v in kwargs.items()]
    if inspect.isfunction(fn):
        used = inspect.getclosurevars(fn)
        parts += [(f"`{k}`, which `{fn.__name__}` uses,", v) for k, v in {**used.globals, **used.nonlocals}.items()]
    for what, value in parts:
        try:
            Parcel(value).close()
        except Exception as problem:
            return f"{what} cannot be sent to the ranks: {problem}"
    return f"the call cannot be sent to the ranks: {error}"


def open_ones():
    """The Ranks that are not closed, in the order in which they were made."""
    return sorted((r for r in _all if r.state != "closed"), key=lambda r: r.made)


def _close_namesakes(n):
    for old in open_ones() if in_notebook() else []:
        if old.n == n and not old._lock.locked():
            old._end(f"because a newer Ranks({n}) was made")


def close_forgotten(*_):
    """In a notebook, after each cell: end the sets that none of the reader's names leads to any more; what the notebook
    remembers of outputs (Out, _) does not count. The newest stays: %%ranks runs on it."""
    others = open_ones()
    while len(others) > 1:
        old = others.pop(0)  # a list that has it would hold it
        if not old._lock.locked() and not _held(old):
            old._end("because no variable held them any more")


def _held(ranks):
    from IPython import get_ipython

    shell = get_ipython()
    if any(value is ranks for name, value in shell.user_ns.items() if not name.startswith("_")):
        return True
    notebooks = [id(o) for o in (shell.user_ns, shell.user_ns.get("Out"), shell.user_ns_hidden)]
    return any(isinstance(r, (dict, list, tuple, set)) and id(r) not in notebooks for r in gc.get_referrers(ranks))


def _goes_on():
    last = newest()
    return f"Ranks({last.n}), made before, is still there." if last else "Run the cell again to have ranks."


@atexit.register
def _close_all():
    for ranks in list(_all):
        ranks.close()
