"""Ranked plans: where the time of a step goes, as a picture and as a page that needs neither kernel nor network."""

import json
from html import escape
from pathlib import Path

from . import palette
from .figure import WIDTH, Picture, block, fit, heading, paint, sheet, text_width, write_left
from .values import number, size

LEFT, TOP, ROW = 0.42, 0.92, 0.68  # inches: the place, heading and legend, a plan with its reason


def plans(ranked, *, title="", note="", limit=None):
    """For each plan, best first, a bar of its step's seconds stacked by part, its memory, and why it is not the best.

    ranked: [{"plan": text, "parts": {"compute": seconds, "bubble": …}, "memory": bytes, "why": text}, …]; parts of no
    seconds are left out of the legend, "why" may be missing.  limit: bytes that fit, named beside the memory.
    Raises ValueError for no plans, a plan without parts, negative seconds.
    """
    rows = [_checked(row) for row in ranked]
    if not rows:
        raise ValueError("plans: expected at least one {'plan', 'parts', 'memory'}")
    known = list(dict.fromkeys(k for r in rows for k in r["parts"]))  # a part has the same colour in every picture
    names = [name for name in known if any(r["parts"].get(name) for r in rows)]
    styles = palette.kind_styles(known)
    scale = (WIDTH - LEFT - 0.2) / (max(r["seconds"] for r in rows) or 1.0)
    lines = _legend_lines(names)
    top = TOP + 0.24 * (len(lines) - 1)
    tall = [ROW if r["why"] else ROW - 0.2 for r in rows]
    alt = f"{title or 'Plans'}: " + "; ".join(_said(i, r) for i, r in enumerate(rows)) + "."

    def draw(figure):
        axes = sheet(figure)
        heading(axes, title, note)
        for k, line in enumerate(lines):
            x = 0.15
            for name in line:
                fill, hatch = styles[name]
                block(axes, x, 0.47 + 0.24 * k, 0.26, 0.16, fill, hatch=hatch, line=0.5)
                x = write_left(axes, x + 0.32, 0.555 + 0.24 * k, name) + 0.2
        y = top
        for i, (row, high) in enumerate(zip(rows, tall, strict=True)):
            told = _numbers(row, limit)
            room = WIDTH - LEFT - 0.4 - text_width(told, 9)
            text, points = fit(row["plan"], room, 9.5, bold=not i)
            axes.text(0.15, y, f"{i + 1}", size=9.5, va="center", weight="normal" if i else "bold")
            axes.text(LEFT, y, text, size=points, va="center", weight="normal" if i else "bold")
            axes.text(WIDTH - 0.2, y, told, size=9, va="center", ha="right")
            x = LEFT
            for name in names:
                wide = row["parts"].get(name, 0) * scale
                fill, hatch = styles[name]
                if wide:
                    block(axes, x, y + 0.12, wide, 0.18, fill, hatch=hatch, line=0.5)
                x += wide
            if row["why"]:
                text, points = fit(row["why"], WIDTH - LEFT - 0.2, 8)
                axes.text(LEFT, y + 0.4, text, size=points, va="center", color=palette.MUTED)
            y += high

    table = [
        {"plan": r["plan"], "seconds": r["seconds"], "memory": r["memory"], **r["parts"], "why": r["why"]} for r in rows
    ]
    return Picture(paint((WIDTH, top + sum(tall) - 0.05), draw), alt, table, title)


def _checked(row):
    if not isinstance(row, dict) or not row.get("parts") or "plan" not in row:
        raise ValueError(f"plans: expected {{'plan', 'parts', 'memory'}}, got {str(row)[:80]}")
    parts = {str(name): float(seconds) for name, seconds in row["parts"].items()}
    if not all(seconds >= 0 for seconds in parts.values()):
        raise ValueError(f"plans: in {row['plan']!r} there are negative seconds")
    return {
        "plan": str(row["plan"]), "parts": parts, "seconds": sum(parts.values()),
        "memory": float(row.get("memory", 0)), "why": row.get("why", ""), "mfu": row.get("mfu"),
    }  # fmt: skip


def _legend_lines(names, room=WIDTH - 0.3):
    lines, x = [[]], 0.0
    for name in names:
        wide = 0.52 + 0.075 * len(name)
        if x + wide > room and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append(name)
        x += wide
    return lines


def _numbers(row, limit):
    of = f" of {size(limit)}" if limit else ""
    return f"{seconds_text(row['seconds'])}, {size(row['memory'])}{of}"


def seconds_text(value):
    """'1.23 s', '45.6 ms'"""
    return f"{number(value)} s" if value >= 1 else f"{number(1e3 * value)} ms"


def _said(i, row):
    why = f" ({row['why']})" if row["why"] else ""
    return f"{i + 1}. {row['plan']}, {seconds_text(row['seconds'])}, {size(row['memory'])}{why}"


# ---- a page of its own ----------------------------------------------------------------------------------------


def plans_page(path, knobs, results, *, title="Choosing a plan", note=""):
    """Write one HTML file with a choice for each knob and the ranked plans of every combination; returns its path.

    knobs: {"model": ["8 B", …], "GPUs": ["64", …], …}, texts; results: {(a choice of each knob, in their order):
    ranked as for `plans`, or a text where there is no plan}. Nothing is loaded, nothing computed but the drawing.
    Raises ValueError where a combination is missing, or path does not end in .html.
    """
    if Path(path).suffix.lower() != ".html":
        raise ValueError(f"plans_page: {str(path)!r} must end in .html")
    knobs = {str(name): [str(choice) for choice in choices] for name, choices in knobs.items()}
    table = {}
    for key in _combinations(list(knobs.values())):
        if key not in results:
            raise ValueError(f"plans_page: there is no result for {', '.join(key)}")
        found = results[key]
        table["|".join(key)] = found if isinstance(found, str) else [_checked(row) for row in found]
    names = list(dict.fromkeys(n for found in table.values() if not isinstance(found, str)
                               for row in found for n in row["parts"]))  # fmt: skip
    data = {"knobs": knobs, "results": table, "parts": {n: fill for n, (fill, _) in palette.kind_styles(names).items()}}
    text = json.dumps(data).replace("<", "\\u003c")
    page = PAGE.replace("TITLE", escape(title)).replace("NOTE", escape(note)).replace("DATA", text)
    Path(path).write_text(page, encoding="utf-8")
    return Path(path)


def _combinations(choices):
    return [(first, *rest) for first in choices[0] for rest in _combinations(choices[1:])] if choices else [()]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fafaf8; --muted: #595959; --line: #b8b8b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececec; --paper: #17181a; --muted: #b0b0b0; --line: #4a4a4a; } }
body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60em; margin: 1.5em auto; padding: 0 1em; }
h1 { font-size: 1.4em; margin: 0 0 .2em; } p { color: var(--muted); margin: .2em 0 1em; }
#knobs { display: flex; flex-wrap: wrap; gap: .6em 1.4em; margin-bottom: 1em; }
#knobs label { display: flex; flex-direction: column; color: var(--muted); font-size: .85em; }
select { font: inherit; color: var(--ink); background: var(--paper); border: 1px solid var(--line); padding: .25em; }
#legend { display: flex; flex-wrap: wrap; gap: .2em 1.1em; margin-bottom: .6em; font-size: .9em; }
#legend i { display: inline-block; width: 1.1em; height: .8em; border: 1px solid var(--ink); margin-right: .35em; }
ol { padding-left: 1.4em; } li { margin-bottom: .9em; } li:first-child b { text-decoration: underline; }
.bar { display: flex; height: 1.15em; margin: .15em 0; }
.bar span { border: 1px solid #1a1a1a; border-left-width: 0; box-sizing: border-box; overflow: hidden; }
.bar span:first-child { border-left-width: 1px; }
.numbers { float: right; } .why { color: var(--muted); font-size: .9em; }
table { border-collapse: collapse; font-size: .85em; } td, th { padding: .1em .7em .1em 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
#none { border-left: 5px solid #D55E00; padding-left: .7em; }
</style></head><body>
<h1>TITLE</h1><p>NOTE</p>
<div id="knobs"></div><div id="legend"></div><div id="plans" aria-live="polite"></div>
<script>
const data = DATA;
const shown = x => x >= 100 ? x.toFixed(0) : x.toPrecision(3);
const seconds = x => x >= 1 ? shown(x) + " s" : shown(1000 * x) + " ms";
const make = (tag, text, parent) => { const e = document.createElement(tag);
  if (text !== "") e.textContent = text; parent.append(e); return e; };
const selects = Object.entries(data.knobs).map(([name, choices]) => {
  const label = make("label", name, document.getElementById("knobs"));
  const select = make("select", "", label);
  select.name = name;
  choices.forEach(c => { const o = make("option", c, select); o.value = c; });
  select.onchange = draw;
  return select;
});
function draw() {
  const found = data.results[selects.map(s => s.value).join("|")];
  const box = document.getElementById("plans"), legend = document.getElementById("legend");
  box.replaceChildren(); legend.replaceChildren();
  if (typeof found === "string") { make("div", found, box).id = "none"; return; }
  const parts = Object.keys(data.parts).filter(n => found.some(p => p.parts[n] > 0));
  parts.forEach(n => { const s = make("span", "", legend);
    make("i", "", s).style.background = data.parts[n]; s.append(n); });
  const longest = Math.max(...found.map(p => p.seconds)), list = make("ol", "", box);
  found.forEach(p => {
    const item = make("li", "", list);
    item.dataset.seconds = p.seconds; item.dataset.memory = p.memory;
    const mfu = p.mfu == null ? "" : ", " + (100 * p.mfu).toFixed(1) + " % MFU";
    const numbers = make("span", seconds(p.seconds) + ", " + shown(p.memory / 1e9) + " GB" + mfu, item);
    numbers.className = "numbers";
    make("b", p.plan, item);
    const bar = make("div", "", item); bar.className = "bar";
    parts.forEach(n => { if (!p.parts[n]) return; const s = make("span", "", bar);
      s.style.width = 100 * p.parts[n] / longest + "%"; s.style.background = data.parts[n];
      s.title = n + ": " + seconds(p.parts[n]); });
    const why = make("div", p.why, item); why.className = "why";
  });
  const table = make("table", "", box), head = make("tr", "", table);
  ["plan", ...parts].forEach(n => make("th", n, head));
  found.forEach(p => { const row = make("tr", "", table); make("td", p.plan, row);
    parts.forEach(n => make("td", seconds(p.parts[n] || 0), row)); });
}
draw();
</script></body></html>
"""
