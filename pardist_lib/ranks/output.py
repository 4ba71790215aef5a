"""What the ranks print: gathered per rank, folded where they say the same, shown live and then for good."""

import os
import re
import time
from html import escape

from .report import plural, spoken

HEAD, TAIL = 25, 15  # lines of a rank that are shown; `Ranks.output` has them all
KEEP = 16 << 20  # bytes of a rank that are kept; where there were twice as many, the middle is dropped

_moves = re.compile(r"\x1b\[[0-9;?]*[A-HJKSTfhl]")  # cursor movements (progress bars); colours stay
COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#F0E442", "#009E73", "#E69F00", "#CC79A7", "#000000")  # as in pictures
SEVERAL = "#deded8"  # of what more than one rank says


class Printed:
    """The output of one rank during one call."""

    def __init__(self):
        self.data, self.dropped = bytearray(), 0

    def add(self, data):
        self.data += data
        if len(self.data) > 2 * KEEP:  # keep the beginning and the end
            self.dropped += KEEP
            del self.data[KEEP // 2 : KEEP // 2 + KEEP]

    def text(self):
        note = f"\n… {self.dropped:,} bytes dropped …\n".encode() if self.dropped else b""
        text = (self.data[: KEEP // 2] + note + self.data[KEEP // 2 :]).decode("utf-8", "replace")
        return spoken(text) if "/ipykernel_" in text else text

    def lines(self):
        """As a terminal would leave them: a carriage return starts the line over."""
        text = _moves.sub("", self.text()).replace("\r\n", "\n")
        lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
        while lines and not lines[-1].strip():
            lines.pop()
        return lines


def folded(outputs):
    """[(ranks, lines), ...] from {rank: lines}: what all ranks say alike at the beginning and at the end is said
    once; between, each rank has its own block, equal blocks joined."""
    ranks, texts = list(outputs), list(outputs.values())
    shortest = min(map(len, texts), default=0)
    first = next((i for i in range(shortest) if len({t[i] for t in texts}) > 1), shortest)
    last = next((i for i in range(shortest - first) if len({t[-1 - i] for t in texts}) > 1), shortest - first)
    # a shared end only counts where each rank's own part is more than a line among others alike
    blocks = [(ranks, texts[0][:first])] if texts and first else []
    own = {}
    for rank, text in outputs.items():
        own.setdefault(tuple(text[first : len(text) - last]), []).append(rank)
    blocks += [(who, list(lines)) for lines, who in own.items() if lines]
    if last:
        blocks.append((ranks, texts[0][len(texts[0]) - last :]))
    return blocks


def rendered(outputs, note=""):
    """The folded blocks as text: who is speaking on the left, long blocks cut in the middle."""
    return "\n".join([f"{label} │ {line}" for label, _, line in _rows(outputs)] + ([note] if note else []))


def rendered_html(outputs, note=""):
    """The same as HTML, each rank in its colour; None where a rank has printed colours of its own."""
    rows = _rows(outputs)
    if any("\x1b" in line for *_, line in rows):
        return None
    lines = []
    for label, who, line in rows:
        style = colours_of(who[0]) if len(who) == 1 else f"background:{SEVERAL};color:#000"
        lines.append(f'<span style="{style}"> {label} </span> {escape(line, quote=False)}')
    lines += [escape(note)] if note else []
    return '<pre style="margin:0;line-height:1.3;white-space:pre-wrap">{}</pre>'.format("\n".join(lines))


def colours_of(rank):
    """CSS of a rank's label: its colour in pictures, and what can be read on it (4.5 : 1 or more)."""
    back = COLOURS[rank % len(COLOURS)]
    return f"background:{back};color:{'#fff' if back in ('#0072B2', '#000000') else '#000'}"


def _rows(outputs):
    """[(label, ranks, line), …]: the label on each block's first line, spaces on the others."""
    blocks = folded(outputs)
    width = max((len(plural(who)) for who, _ in blocks), default=0)
    rows = []
    for who, lines in blocks:
        if len(lines) > HEAD + TAIL:
            cut = len(lines) - HEAD - TAIL
            at = f"ranks.output[{who[0]}]"
            lines = [*lines[:HEAD], f"… {cut:,} more lines, all of them in {at} …", *lines[-TAIL:]]
        label = plural(who).ljust(width)
        for line in lines:
            line = line if len(line) <= 400 else f"{line[:300]} … {len(line) - 350:,} more characters … {line[-50:]}"
            rows.append((label, who, line))
            label = " " * width
    return rows


class Live:
    """The output of one call on the screen: updated while it runs, left as it should be read afterwards.

    In a notebook it is one display, so that the saved output does not depend on who printed first. PARDIST_LIVE=0
    shows it once, at the end (nbval does not follow updates of a display).
    """

    def __init__(self, quiet):
        self.quiet, self.handle, self.shown = quiet, None, time.monotonic()
        self.live = os.environ.get("PARDIST_LIVE", "1") != "0" and in_notebook()

    def update(self, ranks):
        if self.quiet or not self.live or time.monotonic() - self.shown < 0.15:
            return
        began = time.monotonic()
        outputs, bar = {r.number: _recent(r.printed) for r in ranks}, _bar(ranks)
        if text := rendered(outputs, bar):
            self._show(text, rendered_html(outputs, bar))
        self.shown = time.monotonic() + 5 * (time.monotonic() - began)  # a slow page is updated less often

    def finish(self, ranks):
        if self.quiet:
            return
        outputs = {r.number: r.printed.lines() for r in ranks}
        text = rendered(outputs)
        if in_notebook():
            if text or self.handle:
                self._show(text, rendered_html(outputs))
        elif text:
            print(text, flush=True)

    def _show(self, text, html):
        from IPython.display import display

        data = {"text/plain": text} | ({"text/html": html} if html else {})
        if self.handle is None:
            self.handle = display(data, raw=True, display_id=True)
        else:
            self.handle.update(data, raw=True)


class Waiting:
    """One line in a notebook, there only as long as something takes. PARDIST_LIVE=0: none."""

    def __init__(self):
        self.text, self.handle = "", None
        self.live = os.environ.get("PARDIST_LIVE", "1") != "0" and in_notebook()

    def say(self, text):
        """Show the line, or change it. Returns whether there is a place to show it."""
        if self.live and text != self.text:
            from IPython.display import display

            self.text, data = text, {"text/html": f"<em>{escape(text)}</em>" if text else "", "text/plain": text}
            if self.handle is None:
                self.handle = display(data, raw=True, display_id=True)
            else:
                self.handle.update(data, raw=True)
        return self.live

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.say("")


def _bar(ranks):
    bars = {r.number: r.bar for r in ranks if r.bar and not r.ended}
    if not bars:
        return ""
    slowest = min(bars, key=lambda r: bars[r][1])
    description, done, total = bars[slowest]
    if not total:
        return f"{description} {done} (rank {slowest} is last)"
    return f"{description} {'█' * (30 * done // total):░<30} {done}/{total} (rank {slowest} is last)"


def _recent(printed, limit=1 << 14):
    """The last lines only: enough for a live view, and cheap however much was printed."""
    cut = Printed()
    cut.data = printed.data[-limit:]
    lines = cut.lines()
    return lines[1:][-20:] if len(printed.data) > limit else lines[-20:]


def in_notebook():
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
