"""From what every rank reported to one message: the root cause first, the rest folded.

When one rank fails, the others fail a moment later because their neighbour is gone, and that is what most
launchers print. Here a call that differs between ranks comes first, then a death, then the earliest exception
that is not merely "connection closed by peer".
"""

import linecache
import re
import signal
import sys
from types import ModuleType

from .again import cell_to_run
from .ledger import is_ours, is_readers

_SECOND_HAND = re.compile(
    r"Connection (closed by peer|reset|refused)|Broken pipe|remote worker|Socket (closed|Timeout)"
    r"|pair closure|Timed out waiting|Connection to .* (lost|closed)|was closed by (peer|remote)|NCCL.*remote process"
)


# What code raises that was told of another rank's end, or saw it: the cause where nobody has another one
_OF_ANOTHERS_END = {"ConnectionError", "ConnectionResetError", "ConnectionAbortedError", "ConnectionRefusedError",
                    "BrokenPipeError", "EOFError", "DistNetworkError", "DistStoreError"}  # fmt: skip


class RankError(RuntimeError):
    """A call failed on a rank.

    Attributes: `rank` (whose failure came first), `cause` (the exception's type, or how the rank ended), `message`,
    `cell` and `line` (where, in the reader's code; None where it never got there), `where` (what every rank was
    doing, one string each) and `details` (everything, unfolded).
    """

    def __init__(self, text, *, rank=None, cause="", message="", cell=None, line=None, where=(), details=""):
        super().__init__(text)
        self.rank, self.cause, self.message, self.cell, self.line = rank, cause, message, cell, line
        self.where, self.details = list(where), details

    def _render_traceback_(self):  # IPython shows this instead of the notebook's own frames
        head, _, rest = str(self).partition("\n")
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {head}"] + rest.split("\n")


class RankHang(RankError):
    """Nothing moved for `timeout` seconds, or nothing can move any more."""


class RanksInterrupted(KeyboardInterrupt):
    """The stop button, with what every rank was doing."""

    def _render_traceback_(self):
        return [f"\x1b[31mInterrupted\x1b[0m: {self}"]


def plural(ranks):
    """[0, 1, 2, 5] -> 'ranks 0–2, 5'"""
    ranks, parts = sorted(ranks), []
    while ranks:
        run = 1
        while run < len(ranks) and ranks[run] == ranks[0] + run:
            run += 1
        first, last = ranks[0], ranks[run - 1]
        parts.append(f"{first}" if run == 1 else f"{first}, {last}" if run == 2 else f"{first}–{last}")
        del ranks[:run]
    text = ", ".join(parts)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


# ---- places in the reader's code ------------------------------------------------------------------------------


def cell_name(filename):
    """`In[5]` for the code of a cell, the file's own name for a script."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    if shell and (name := shell.compile.format_code_name(filename)):
        return name[1]
    return filename.rsplit("/", 1)[-1]


def spoken(text):
    """`text` with cells called by their names instead of by ipykernel's temporary files."""
    text = re.sub(r"(?<![\w/])(/\S+?|In\[\d+\]):(\d+)\b", lambda m: f"{cell_name(m[1])}, line {m[2]}", text)
    return re.sub(r"\S*/ipykernel_\d+/\d+\.py", lambda m: cell_name(m[0]), text)


def _innermost(frames):
    mine = [f for f in frames if is_readers(f[0])] or [f for f in frames[-1:] if not is_ours(f[0])]
    return mine[-1] if mine else None


def excerpt(frames):
    """The reader's frames: the innermost one with the lines around it, the others as one line each."""
    mine = [f for f in frames if is_readers(f[0])] or [f for f in frames[-1:] if not is_ours(f[0])]
    lines = []
    for filename, number, name in mine[-4:]:
        lines.append(f"{cell_name(filename)}, line {number}" + (f", in {name}" if name != "<module>" else ""))
    if mine:
        filename, number, _ = mine[-1]
        for n in range(max(1, number - 2), number + 1):
            if source := linecache.getline(filename, n).rstrip():
                lines.append(f"{'----> ' if n == number else '      '}{n:3} {source}")
    return lines


def doing(frames, call):
    """One sentence fragment: what a rank was doing, from its stack and the call (waits.Call) that it was in."""
    here = _innermost(frames)
    if here is None:
        return "busy"
    filename, number, _ = here
    source = linecache.getline(filename, number).strip()
    spot = f"at {cell_name(filename)}, line {number}"
    if does := next((name for *_, name in reversed(frames) if " " in name), ""):  # see rank.py: no function's name
        spot = f"for {does}, {spot}"
    if call and call.place == f"{filename}:{number}":
        return f"in {call.text} {spot}"
    return (f"in {call.text} " if call else "") + spot + (f": {source}" if source else "")


# ---- outcomes -------------------------------------------------------------------------------------------------
# A rank's outcome is a tuple: ("result", ...), ("error", described), ("died", exit code, time[, last lines]),
# ("busy", frames) or ("busy", None[, whether a signal has stopped it]) where it does not answer, ("idle",) for a rank
# that took no part in the call, ("left", "ended" or "left the group"[, True where it may have been another one]) for
# one that others could still be waiting for, ("stopped",) in a whole program.


def fate(code):
    if code is None:
        return "has gone", "gone"
    if code >= 0:
        return f"ended its process with exit code {code}", f"exit {code}"
    name = signal.Signals(-code).name
    why = {
        "SIGKILL": "killed from outside, or by the system because memory ran out",
        "SIGABRT": "native code gave up",
        "SIGSEGV": "native code crashed",
    }.get(name, "")
    return f"was ended by {name}" + (f" ({why})" if why else ""), name


def _second_hand(described):
    return bool(_SECOND_HAND.search(described["message"])) and described["type"] != "CollectiveMismatch"


_OF_A_PEER = re.compile(r"\.cc\b.*(by peer|Broken pipe)|remote (worker|process)")  # in gloo's and nccl's own words


def _left_alone(outcomes):
    """The ranks that had gone of their own accord, where that is all that the failures of the others tell."""
    errors = [o[1]["message"] for o in outcomes.values() if o[0] == "error"]
    gone = [r for r, o in outcomes.items() if o[0] == "left"]
    return gone if second_hand_only(outcomes) and any(map(_OF_A_PEER.search, errors)) else []


def root_cause(outcomes):
    """The rank whose failure came first, or None where no rank failed."""

    def order(item):
        rank, (kind, *rest) = item
        if kind == "died":
            return 1, rest[1], rank
        described = rest[0]
        if described["type"] == "CollectiveMismatch":
            return 0, described["time"], rank
        later = 2 if _second_hand(described) else described["type"] in _OF_ANOTHERS_END
        return 2 + later, described["time"], rank

    failed = [item for item in outcomes.items() if item[1][0] in ("error", "died")]
    return min(failed, key=order)[0] if failed else None


def second_hand_only(outcomes):
    """True where some rank failed, and all of them, it seems, only because another one had gone."""
    rank = root_cause(outcomes)
    if rank is None or outcomes[rank][0] != "error":
        return False
    return outcomes[rank][1]["type"] in _OF_ANOTHERS_END or _second_hand(outcomes[rank][1])


def harmless(outcomes):
    """True where every rank came back and no failure can have disturbed the group."""
    return all(
        kind in ("result", "idle")
        or kind == "error"
        and rest[0]["type"] != "CollectiveMismatch"
        and not _second_hand(rest[0])
        for kind, *rest in outcomes.values()
    )


def where(outcomes, calls):
    """What each rank was doing at the end, as a list of strings in rank order. calls: {rank: waits.InCall}"""
    said = []
    for rank, (kind, *rest) in sorted(outcomes.items()):
        if kind == "result":
            said.append("had finished")
        elif kind == "idle":
            said.append("took no part")
        elif kind == "died":
            said.append(fate(rest[0])[0])
        elif kind == "error":
            second = " (because another rank had gone)" if _second_hand(rest[0]) else ""
            said.append(f"raised {rest[0]['type']}{second}")
        elif kind == "left":
            said.append(f"had {rest[0]}{', or was stopped' * any(rest[1:])}")
        elif kind == "stopped":
            said.append("was stopped")
        elif rest[0] is None and any(rest[1:]):
            said.append("was stopped by a signal (SIGSTOP) and not continued")
        elif rest[0] is None:
            said.append("did not answer: native code does not let its interpreter go")
        else:
            said.append("was " + doing(rest[0], calls[rank].call if rank in calls else None))
    return said


def folded(said, leave_out=()):
    """['a', 'a', 'b'] -> 'ranks 0, 1 a; rank 2 b'"""
    same = {}
    for rank, text in enumerate(said):
        if rank not in leave_out:
            same.setdefault(text, []).append(rank)
    return "; ".join(
        f"{plural(ranks)} {text if len(ranks) == 1 else _of_several(text)}" for text, ranks in same.items()
    )


def _of_several(text):
    return re.sub(r"^was ", "were ", text).replace("ended its process", "ended their processes")


def native_frames(text):
    """[(file, line, function), …] from what faulthandler wrote about one thread, outermost first."""
    found = re.findall(r'File "(.+?)", line (\d+) in (.+)', text)
    return [(file, int(number), name) for file, number, name in reversed(found)]


def failure(outcomes, calls, last_calls, fault_frames, ending, lost=()):
    """The RankError for outcomes in which a rank failed. `last_calls`: each rank's newest note in the ledger; `ending`:
    what became of the ranks, in a sentence; `lost`: names that cells had set on ranks that were replaced since."""
    rank = root_cause(outcomes)
    kind, *rest = outcomes[rank]
    said = where(outcomes, calls)
    if kind == "died":
        sentence, cause = fate(rest[0])
        head, message, frames = f"rank {rank} {sentence}", sentence, fault_frames
        body = excerpt(frames) if frames else [f"      {line}" for lines in rest[2:] for line in lines]
        if not body and last_calls[rank]:
            body = [f"its last call to another rank: {spoken('{0[0]} at {0[1]}'.format(last_calls[rank]))}"]
    else:
        described = rest[0]
        cause, message, frames = described["type"], spoken(described["message"]), described["frames"]
        same = [r for r, o in outcomes.items() if o[0] == "error" and _alike(o[1], described)]
        head = f"{plural(same)} raised {cause}" + (f": {_short(message)}" if message else "")
        body = excerpt(frames)
        earlier = described["earlier"]
        if earlier and not _second_hand(earlier):
            body.append(f"while handling {earlier['type']}: {_short(spoken(earlier['message']))}")
        if hint := _hint(described, lost):
            body.append(hint)
    same = same if kind == "error" else [rank]
    if gone := _left_alone(outcomes):
        how, doubt = outcomes[gone[0]][1], any(outcomes[gone[0]][2:])
        others = [r for r, o in outcomes.items() if o[0] == "error"]
        still = f"{plural(others)} still waited for {'it' if len(gone) == 1 or doubt else 'them'}"
        head = message = f"{'one of ' * doubt}{plural(gone)} {how} while {still}"
        rank, cause, same = gone[0], f"{how} early", gone
    rest_of_them = folded(said, leave_out=same)
    lines = [head, *body]
    if rest_of_them:
        lines.append(f"Meanwhile {rest_of_them}.")
    lines.append(ending)
    here = _innermost(frames) if frames else None
    return RankError(
        "\n".join(lines),
        rank=rank,
        cause=cause,
        message=message,
        cell=here and cell_name(here[0]),
        line=here and here[1],
        where=said,
        details=details(outcomes, said),
    )


def _alike(a, b):
    return a["type"] == b["type"] and a["message"] == b["message"] and a["frames"] == b["frames"]


def _short(message, limit=600):
    return message if len(message) <= limit else message[: limit // 2] + " … " + message[-limit // 2 :]


def _hint(described, lost):
    if "initialize the default process group twice" in described["message"]:
        return "(the ranks are in a group already, as torchrun and init_process_group make it: leave that line out)"
    if described["type"] in ("NameError", "KeyError") and "'" in described["message"]:
        name = described["message"].split("'")[1]
        if name in lost:
            return f"(the ranks were replaced since `{name}` was set: run the cell that set it again)"
        shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
        if shell and described["type"] == "NameError" and isinstance(value := shell.user_ns.get(name), ModuleType):
            line = f"import {value.__name__}" + f" as {name}" * (name != value.__name__)
            return f"`{name}` was imported in the notebook, not on the ranks: {line} in the %%ranks cell"
        if shell and described["type"] == "NameError" and name in shell.user_ns:
            return f"`{name}` lives in the notebook, not on the ranks: send it with ranks.push({name}={name})"
        if shell and described["type"] == "NameError":
            return cell_to_run(name, on_ranks=True)
    return None


def details(outcomes, said):
    parts = []
    for rank, outcome in sorted(outcomes.items()):
        parts.append(f"rank {rank} {said[rank]}")
        frames = outcome[1]["frames"] if outcome[0] == "error" else outcome[1] if outcome[0] == "busy" else None
        for filename, number, name in frames or []:
            parts.append(f"    {cell_name(filename)}, line {number}, in {name}")
            parts += [f"        {source}" for source in [linecache.getline(filename, number).strip()] if source]
        if outcome[0] == "error":
            parts.append(f"    {outcome[1]['type']}: {spoken(outcome[1]['message'])}")
    return "\n".join(parts)


def hang(outcomes, calls, seconds, ending, patience="ranks.run(..., timeout=…) or Ranks(…, timeout=…)"):
    """The RankHang for outcomes in which some rank is still busy. patience: how the reader lets it wait longer."""
    said = where(outcomes, calls)
    busy = [r for r, o in outcomes.items() if o[0] == "busy"]
    waiting = [r for r in busy if r in calls]
    awaited = _awaited(waiting, calls)
    elsewhere = [r for r in busy if r not in waiting and (r in awaited or not awaited)]
    late = sorted(r for r, o in outcomes.items() if o[0] in ("result", "idle") and r in awaited)
    silence, cause = f"no sign of life for {seconds:g} s", "stall"
    if waiting and late:
        blame = late[0]
        what = "takes no part in this call" if outcomes[blame][0] == "idle" else "returned without making that call"
        what = what if len(late) == 1 else what.replace("takes", "take")
        head, cause = f"{_wait_for(waiting, late)}, which {what}", "skipped call"
    elif waiting and elsewhere:
        blame = elsewhere[0]
        head = f"{_wait_for(waiting, elsewhere)}: {silence}"
    elif waiting and awaited:
        some, others = _sides(waiting, calls)
        blame, cause = some[0], "deadlock"
        if others:
            each = f"{_wait_for(some, others)}, and {plural(others)} for {plural(some)} in another call"
        elif len(waiting) > 1:
            each = f"{plural(waiting)} wait for each other"
        else:
            each = f"{plural(waiting)} waits for a message that nobody sends"
        head = f"{each}: a deadlock, {silence}"
    elif waiting:
        blame = waiting[0]
        head = f"{plural(waiting)} {'wait' if len(waiting) > 1 else 'waits'} in a call that does not end: {silence}"
    else:
        blame = busy[0]
        head = f"no sign of life from {plural(busy)} for {seconds:g} s"
    lines = [head]
    for rank in sorted(outcomes):
        group = [r for r in outcomes if said[r] == said[rank]]
        if rank == group[0]:
            lines.append(f"  {plural(group)} {said[rank] if len(group) == 1 else _of_several(said[rank])}")
    if cause == "stall":
        lines.append(f"If it is only slow: {patience} waits longer (seconds).")
    lines.append(ending)
    here = _innermost(outcomes[blame][1] or []) if outcomes[blame][0] == "busy" else None
    here = here or next((_innermost(outcomes[r][1] or []) for r in waiting), None)
    return RankHang(
        "\n".join(lines),
        rank=blame,
        cause=cause,
        message=head,
        cell=here and cell_name(here[0]),
        line=here and here[1],
        where=said,
        details=details(outcomes, said),
    )


def endless(outcomes, calls, seconds, ending):
    """The RankHang for a call that went on and on."""
    said = where(outcomes, calls)
    busy = [r for r, o in outcomes.items() if o[0] == "busy"]
    head = f"{plural(busy)} went on and on, and had not come to an end after {seconds:g} s"
    text = "\n".join([head, *(f"  {line}" for line in folded(said).split("; ")), ending])
    rank = busy[0] if busy else None
    here = busy and _innermost(outcomes[rank][1] or [])
    cell, line = (cell_name(here[0]), here[1]) if here else (None, None)
    more = {"where": said, "details": details(outcomes, said)}
    return RankHang(text, rank=rank, cause="endless", message=head, cell=cell, line=line, **more)


def _wait_for(some, others):
    return f"{plural(some)} wait{'s' * (len(some) == 1)} for {plural(others)}"


def _awaited(waiting, calls):
    """The ranks that a waiting one waits for, and those that these wait for."""
    found, more = set(), set(waiting)
    while more:
        reached = set().union(*(calls[r].missing for r in more if r in calls))
        more = reached - found
        found |= more
    return found


def _sides(waiting, calls):
    """Waiting ranks as two lists, the shorter first: those in one collective and those in another that wait for them;
    (waiting, []) where it is not so simple."""
    sides = {}
    for rank in waiting:
        sides.setdefault((calls[rank].call.group, calls[rank].call.text), []).append(rank)
    if len(sides) == 2 and all(group for group, _ in sides):
        one, two = sorted(sides.values(), key=len)
        if all(set(two) & calls[r].missing for r in one) and all(set(one) & calls[r].missing for r in two):
            return one, two
    return waiting, []


def unfinished(behind, last_calls, ending):
    """Every rank returned, but they did not make the same calls."""
    ahead, late = behind[0]
    call, at = last_calls[ahead[0]] or ("a call", "")
    text = (
        f"{plural(ahead)} made a call that {plural(late)} did not make: {spoken(f'{call} at {at}')}\n"
        "Nobody waited for it this time, but it is still open, and the next call would be matched with it.\n" + ending
    )
    return RankError(text, rank=ahead[0], cause="unmatched call", message=text.splitlines()[0], details=text)
