"""The timeline to move about in: zoom, pick a rank, pick a call; in the notebook, and as a page of its own."""

import json
from collections import Counter
from html import escape
from pathlib import Path

import ipywidgets

from . import palette
from .timeline import _events, timeline
from .widgets import Live

_PAGE = Path(__file__).with_suffix(".html")


class TimelinePage(Live):
    """A timeline in the notebook (its still picture is `timeline`'s); `save(path)` writes it as one HTML file."""

    def __init__(self, trace, title, height):
        self.html = page(trace, title)
        frame = (
            f'<iframe srcdoc="{escape(self.html, quote=True)}" title="{escape(title, quote=True)}" '
            f'style="width:100%;height:{height}px;border:1px solid {palette.LINE};border-radius:4px"></iframe>'
        )
        hint = "Run this cell to zoom, and to click on blocks."
        super().__init__(ipywidgets.HTML(frame), timeline(trace, title=title), hint)

    def save(self, path):
        """Write the page to `path`, which must end in .html: one file that needs no network. Returns the path."""
        path = Path(path)
        if path.suffix.lower() != ".html":
            raise ValueError(f"save: {str(path)!r} must end in .html")
        path.write_text(self.html, encoding="utf-8")
        return path


def explore(trace, *, title="timeline", height=None):
    """The `timeline` of a trace to move about in: drag, zoom, pick a rank or a kind of call; a click on a block says
    its bytes, group and peer, how long it took, and which rank it waited for.

    trace: as for `timeline`. height: of the widget in pixels, by default enough for up to eight ranks.
    Raises ValueError as `timeline` does.
    """
    world = 1 + max(e.rank for e in _events(trace))
    return TimelinePage(trace, title, height or min(260 + 64 * world, 760))


def page(trace, title="timeline"):
    """The stand-alone page as text."""
    events = sorted(_events(trace), key=lambda e: e.start)
    world = max(getattr(trace, "world_size", 0), 1 + max(e.rank for e in events))
    zero = events[0].start
    counted = Counter(e.name for e in events if e.kind == "communication")
    calls = sorted(counted, key=lambda name: (-counted[name], name))
    names = {("communication", name): i for i, name in enumerate(calls)}
    fills = [fill for fill, _ in palette.kind_styles(list(calls)).values()]
    groups, lanes = {(): 0}, [{"c": [], "m": []} for _ in range(world)]
    for e in events:
        number = names.setdefault((e.kind, e.name), len(names))
        row = [number, round((e.start - zero) * 1e6, 1), round((e.end - e.start) * 1e6, 1)]
        if e.kind == "compute":
            lanes[e.rank]["c"].append(row)
            continue
        group = groups.setdefault(tuple(getattr(e, "group", ())), len(groups))
        peer, waited_for = (_rank(e, name) for name in ("peer", "waited_for"))
        moved, waited = getattr(e, "bytes", 0) or 0, round((getattr(e, "waited", 0) or 0) * 1e6, 1)
        lanes[e.rank]["m"].append([*row, moved, group, peer, waited_for, waited])
    fills += [palette.NEUTRAL] * (len(names) - len(fills))
    data = {
        "names": [name for _, name in names],
        "calls": calls,
        "fills": fills,
        "inks": [palette.text_on(fill) for fill in fills],
        "plain": palette.NEUTRAL,
        "chips": palette.RANKS,
        "chipInks": [palette.text_on(fill) for fill in palette.RANKS],
        "groups": [list(group) for group in groups],
        "lanes": lanes,
        "end": round((max(e.end for e in events) - zero) * 1e6, 1),
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it can end the script
    return _PAGE.read_text(encoding="utf-8").replace("/*TITLE*/", escape(title)).replace("/*DATA*/", text)


def _rank(event, name):
    rank = getattr(event, name, None)
    return -1 if rank is None else rank
