"""How a `Ranks` shows itself: a small card, and its process tree as plain data."""

import html

import psutil

from .output import colours_of


def card(ranks):
    """HTML: state, one chip for each rank (process id, device), the torchrun command folded away."""
    chip = "display:inline-block;padding:1px 8px;margin:2px 6px 2px 0;border-radius:9px;border:1px solid currentColor"
    chips = " · ".join(  # the dot for pages that take the style away, as GitHub's
        f'<span style="{chip}"><b style="padding:0 4px;{colours_of(r.number)}">rank {r.number}</b> '
        f'pid {r.pid or "…"} on {html.escape(str(r.device or "…"))}</span>'
        for r in ranks._link.ranks
        if ranks.state != "closed"
    )
    times = ranks._link.generation
    again = f"replaced {times} time{'s' * (times > 1)}, so these are not the first process ids" * bool(times)
    head = " · ".join(filter(None, [f"<b>Ranks({ranks.n})</b>", html.escape(ranks.state), ranks.backend, again]))
    code = f'<code style="background:none">{html.escape(ranks.command)}</code>'
    told = f'<details style="opacity:.75"><summary>the command that started them</summary>{code}</details>'
    end = "They end with the kernel: after its restart, run the cells from the top again."
    end = f'<div style="opacity:.75">{end}</div>' * (ranks.state != "closed")
    return f'<div style="font-size:90%">{head}<br>{chips}{end}{told}</div>'


def process_rows(link):
    """The notebook and everything it started, parents before children."""
    host = psutil.Process(link.host.pid)
    names = {
        psutil.Process().pid: "notebook",
        link.host.pid: "host",
        link.torchrun_pid: "torchrun",
        **{conn.given["pid"]: "worker" for conn in link.workers.values()},
        **{r.pid: "rank" for r in link.ranks},
    }
    numbers = {conn.given["pid"]: r for r, conn in link.workers.items()} | {r.pid: r.number for r in link.ranks}
    return [
        {
            "pid": p.pid,
            "parent": p.ppid() if p.pid != psutil.Process().pid else None,
            "what": names.get(p.pid, p.name()),
            "rank": numbers.get(p.pid),
            "threads": p.num_threads(),
        }
        for p in [psutil.Process(), host, *sorted(host.children(recursive=True), key=lambda p: p.pid)]
    ]
