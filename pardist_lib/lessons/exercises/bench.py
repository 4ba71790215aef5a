"""Run an answer on real ranks, and say in one sentence why it did not come back."""

import importlib
import re

from pardist_lib.ranks import RankError, RankHang, Ranks, newest
from pardist_lib.ranks.output import rendered
from pardist_lib.ranks.report import folded, plural
from pardist_lib.ranks.session import FRESH, unsendable

from ..worlds import in_world
from .causes import likeliest_cause
from .judge import Wrong
from .watch import CASE, ENDLESS

PATIENCE = 5.0  # seconds without a sign of life after which an answer hangs; right ones take milliseconds
LONGEST = 20.0  # seconds after which an answer is stopped that goes on making calls
REPLACED = "The ranks were replaced: names that %%ranks cells had set are gone."
_started = []


class Blocked(Exception):
    """The check could not be made; the text says what is missing."""


def four_ranks():
    """The newest open Ranks of at least four, or four new ones. Raises Blocked where they cannot be started."""
    if ranks := newest(at_least=4):
        return ranks
    try:
        _started[:] = [Ranks(4)]
    except Exception as error:
        raise Blocked(f"four ranks are needed, and they could not be started: {error}") from None
    return _started[0]


class Bench:
    """Runs one answer; `printed` is what the ranks printed in the last run."""

    def __init__(self, answer):
        self.answer, self.ranks, self.printed, self._known = answer, four_ranks(), "", set()

    def __call__(self, fn, *args, n=4, about="", stuck="", raises=()):
        """`fn(answer, *args)` on each rank of a world of n; returns its n results, which are `Seen`.

        n=1 runs in rank 0 alone. about: the case, for the reader. stuck: the diagnosis, where one is known, for
        ranks that wait for ever or do not make the same calls. raises: (pattern, clause), what an exception whose
        "Type: message" has the pattern means in this exercise, before `causes`. Raises Wrong, or Blocked.
        """
        self._prepare(fn.__module__)
        on = [0] if n == 1 else None
        call = (fn, self.answer, *args) if n == 1 else (in_world, n, fn, self.answer, *args)
        try:
            seen = self.ranks.run(*call, on=on, quiet=True, timeout=PATIENCE, at_most=LONGEST)
        except TypeError as error:
            raise Wrong(unsendable(self.answer, args, {}, error)) from None
        except RankError as error:
            self.printed = self._said()
            explained = self._explained(error, about, stuck, raises, n)
            if ENDLESS in error.message and FRESH not in str(error):  # so many messages are still under way
                self.ranks.restart()
                explained.note = REPLACED
            raise explained from None
        except RuntimeError as error:
            raise Blocked(str(error)) from None
        self.printed = self._said()
        seen = seen[:n]
        refuse(seen)
        return seen

    def _prepare(self, module):
        """Let fresh ranks import what check and answer need, before patience begins: that may take seconds."""
        if module not in self._known:
            self._known.add(module)
            try:
                self.ranks.run(_import, module, self.answer, quiet=True, timeout=120)
            except (TypeError, RankError):
                pass  # what is wrong with the answer, the check itself will say; ranks that had died are replaced
            except RuntimeError as error:
                raise Blocked(str(error)) from None

    def _said(self):
        spoke = {r: text.splitlines() for r, text in enumerate(self.ranks.output) if text.strip()}
        lines = rendered(spoke).splitlines() if spoke else []
        cut = [f"… {len(lines) - 20} lines …"] if len(lines) > 20 else []
        return "\n".join(line[:200] for line in [*lines[:10], *cut, *lines[10:][-10:]])

    def _explained(self, error, about, stuck, raises, n):
        head = str(error).splitlines()[0]
        where = error.where[:n]  # what ranks outside of this case do says nothing
        if error.rank is None:
            return Blocked(head)
        if "its process" in head or "was ended by" in head:
            said = f"{head}, so the others lost a member of their group"
        elif error.cause == "NotImplementedError":
            said = f"`raise NotImplementedError` is still reached on {plural([error.rank])}"
        elif error.cause == "endless":
            said = _waiting(error, where)
        elif stuck and (isinstance(error, RankHang) or error.cause in ("CollectiveMismatch", "unmatched call")):
            said = stuck
        elif isinstance(error, RankHang):
            said = _waiting(error, where)
        elif error.cause == "CollectiveMismatch":
            what, _, who = error.message.partition("\n")
            said = f"{what}: {' '.join(who.split())}"
        elif "should not be the same as the rank of the current process" in error.message or (
            "receives from itself" in error.message
        ):
            said = f"rank {error.rank} sends to itself or receives from itself, which torch refuses"
        elif error.cause == "ValueError" and error.message.startswith("there is no rank"):
            said = f"rank {error.rank} sends to or receives from a rank that does not exist: {error.message}"
        elif error.message.endswith(" is None)"):
            said = f"{head.partition(':')[0]}: {' '.join(error.message.split())}"
        elif clause := likeliest_cause(error.cause, error.message, raises):
            said = f"{head.rstrip('.')}: {clause}"
        elif "'NoneType'" in error.message:
            said = f"{head} (something is None there?)"
        else:
            said = head
        if known := re.search(f"^{CASE}(.*)$", error.message, re.MULTILINE):
            said = f"{known[1]}: {said}"
        note = REPLACED if FRESH in str(error) else ""
        doing = folded(where).replace("; ", "\n") if isinstance(error, RankHang) else ""
        wrong = Wrong(said, ", ".join(filter(None, [_spot(error), about])), got=doing, note=note)
        wrong.hangs = isinstance(error, RankHang)
        return wrong


def refuse(seen):
    """Raise `Wrong` where an answer calls the course's own solution, or where its calls cannot be judged."""
    for rank, one in enumerate(seen):
        if one.reference:
            raise Wrong(f"it calls the course's own `{one.reference}`: write it yourself", f"rank {rank}")
        if one.torchs:
            pickles = ", which pickles what it sends: make a tensor of it, and send that" * ("object" in one.torchs)
            raise Wrong(f"it calls torch's own {one.torchs}{pickles}", f"rank {rank}")
        if one.hidden:
            raise Wrong("it communicates from another thread, where the check cannot see it", f"rank {rank}")
        if one.unwaited:
            total = len(one.calls)
            many = "its only call" if total == 1 else f"{one.unwaited} of its {total} calls"
            raise Wrong(
                f"{many} (isend, irecv or async_op=True) {'was' if one.unwaited == 1 else 'were'} never waited for: "
                "until wait() returns, a tensor is neither received nor free to change",
                f"rank {rank}",
            )
        if one.early:
            raise Wrong(f"{one.early}: what comes out is chance, so wait() first", f"rank {rank}")


def _waiting(error, where):
    """A deadlock in one sentence. where: what each rank of this case was doing."""
    ops = [re.match(r"was in (send|recv)\(.*, ((?:to|from) rank \d+)\)", text) for text in where]
    kinds = {op[1] for op in ops if op} if all(ops) else set()
    if kinds == {"send"}:
        return "every rank is in send, which returns when the other side receives: nobody gets to receive"
    if kinds == {"recv"}:
        return "every rank waits in recv, and what it waits for is never sent"
    if error.cause == "deadlock" and any(ops):
        who = ", ".join(f"rank {r} is in {op[1]} {op[2]}" for r, op in enumerate(ops) if op)
        return f"a deadlock, nobody does what the others wait for: {who}"
    if error.cause == "endless":
        return f"it goes on and on: {folded(where)}"
    if error.cause == "stall" and not any("was in" in text for text in where):
        return f"it does not come back: {folded(where)}"
    return str(error).splitlines()[0]


def _spot(error):
    """`In[3], line 7: dist.send(tensor, right)`"""
    if error.cell is None:
        return ""
    if "_execution_engine" in error.details and error.cell == "graph.py":  # torch's own line: the reader has none there
        return "in backward"
    source = re.search(rf"{re.escape(error.cell)}, line {error.line}, in .*\n +(.+)", error.details)
    return f"{error.cell}, line {error.line}" + (f": {source[1]}" if source else "")


def _import(module, answer):  # the answer is unpickled by now
    importlib.import_module(module)
