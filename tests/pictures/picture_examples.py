"""One of each picture, with data whose numbers the tests know."""

from types import SimpleNamespace

import numpy as np

from pardist_lib import pictures


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def ring_states(world):
    """Contributor sets of a ring all-reduce after every step, [step][rank][chunk]."""
    state = [[{rank} for _ in range(world)] for rank in range(world)]
    states = [state]
    for step in range(2 * (world - 1)):
        new = [list(row) for row in state]
        for rank in range(world):
            gather = step >= world - 1
            chunk = (rank - step + gather * world) % world if not gather else (rank + 1 - (step - world + 1)) % world
            there = set() if gather else state[(rank + 1) % world][chunk]
            new[(rank + 1) % world][chunk] = state[rank][chunk] | there
        state = new
        states.append(state)
    return states


def event(rank, kind, name, start, end, size=0, peer=None):
    return {"rank": rank, "kind": kind, "name": name, "start": start, "end": end, "bytes": size, "peer": peer}


def held_over_time():
    """Memory of two ranks, as a trace has it."""
    times = np.linspace(0, 0.05, 400)
    wave = np.clip(np.sin(times * 60 * np.pi), 0, 1)
    held = np.stack([np.full(400, 2e6), wave * 2e6, np.where(times > 0.03, 4e6, 0), wave[::-1] * 1e6, wave * 3e5], 1)
    return {rank: SimpleNamespace(times=times, bytes=held * (1 + rank / 4)) for rank in (0, 1)}


PIPELINE = [  # two ranks, two micro-batches; seconds
    [("0F0", 0.0, 0.01), ("0F1", 0.01, 0.02), ("0B0", 0.04, 0.06), ("0B1", 0.07, 0.09)],
    [("1F0", 0.01, 0.02), ("1B0", 0.02, 0.04), ("1F1", 0.04, 0.05), ("1B1", 0.05, 0.07)],
]


def step_events(world=4):
    """A backward pass of 9 ms with three all-reduces of 1,572,864 bytes that overlap it, in seconds from 5.0."""
    events = []
    for rank in range(world):
        events.append(event(rank, "compute", "backward", 5.0, 5.009))
        events += [
            event(rank, "communication", "all_reduce", 5.002 + 0.002 * i, 5.006 + 0.002 * i, 1_572_864)
            for i in range(3)
        ]
    return events


def ring_events(world=4):
    return [
        e
        for rank in range(world)
        for e in (
            event(rank, "communication", "send", 0.001, 0.002, 400, (rank + 1) % world),
            event(rank, "communication", "recv", 0.001, 0.003, 400, (rank - 1) % world),
        )
    ]


def processes(world=4):
    rows = [
        {"pid": 100, "parent": 1, "what": "kernel", "threads": 9},
        {"pid": 200, "parent": 100, "what": "torchrun agent", "threads": 3},
        {"pid": 300, "parent": 100, "what": "host", "threads": 1},
    ]
    for rank in range(world):
        rows.append({"pid": 210 + rank, "parent": 200, "what": "worker", "rank": rank, "threads": 1})
        rows.append({"pid": 310 + rank, "parent": 300, "what": "rank", "rank": rank, "threads": 2})
    return rows


LOSS = [2.5, 1.25, 0.75, 0.5]
OWN = [[f"{letter}{rank}" for letter in "abcd"] for rank in range(4)]
SUMS = ["+".join(f"{letter}{rank}" for rank in range(4)) for letter in "abcd"]

ROWS = np.repeat(np.arange(4), [3, 2, 2, 2])[:, None]
GRID = [[0, 1], [2, 3]]

EXAMPLES = {
    "shards in rows": lambda: pictures.shards(np.split(np.arange(32).reshape(8, 4), 4), title="weight"),
    "shards in columns": lambda: pictures.shards(np.split(np.arange(32).reshape(8, 4), 4, axis=1), dim=1),
    "uneven shards": lambda: pictures.shards([np.arange(3) / 3, np.arange(0), np.arange(2)], title="uneven"),
    "big shards": lambda: pictures.shards(np.array_split(random(1797, 64), 8), title="digits"),
    "owners": lambda: pictures.shards((6, 4), [[0], [0], [1], [1], [2], [11]], title="owners"),
    "owners of values": lambda: pictures.shards(np.arange(24).reshape(6, 4), np.arange(24).reshape(6, 4) % 9),
    "mesh": lambda: pictures.shards((1024, 512), np.kron([[0, 1], [2, 3]], np.ones((512, 256), int))),
    "held": lambda: pictures.held(
        {"weight": [random(128, 64)] * 4, "bias": [[0.5, 1.5, 2]] * 4, "rest": [[[1, 2], [3, 4]], None, None, None]},
        came_from={"bias": [0] * 4},
    ),
    "activations": lambda: pictures.activations(
        {
            "tensor parallel": [
                ("x", "whole"),
                ("heads", "features"),
                ("out", "summands"),
                ("all-reduce", "sent"),
                ("x + …", "whole"),
            ],
            "and sequence parallel": [("x", "positions"), ("all-gather", "sent"), ("x", "whole")],
        },
        title="attention",
    ),
    "all-reduce": lambda: pictures.collective("all_reduce", OWN, [SUMS] * 4),
    "all-gather of eight": lambda: pictures.collective(
        "all_gather", [[f"a{r}"] for r in range(8)], [[f"a{r}" for r in range(8)]] * 8
    ),
    "scatter": lambda: pictures.collective("scatter", [OWN[0], None, None, None], [[c] for c in OWN[0]]),
    "ring": lambda: pictures.ring_steps(ring_states(4)[2:4])[1],
    "gradients": lambda: pictures.gradients(
        [random(10, 64, seed=s) for s in range(4)], [np.ones((10, 64))] * 4, title="gradient of 2.weight"
    ),
    "bias gradients": lambda: pictures.gradients([random(4, seed=s) for s in range(8)]),
    "curves": lambda: pictures.curves({"one process": LOSS, "four ranks": [*LOSS[:3], 0.5 + 3e-8]}, difference=True),
    "curves of ranks": lambda: pictures.curves({f"rank {r}": np.add(LOSS, r) for r in range(8)}, ticks=list("abcd")),
    "promised": lambda: pictures.curves({"one": LOSS, "four": np.add(LOSS, [2e-8, 0, 3e-7, 5e-8])}, difference=1e-6),
    "ring of values": lambda: pictures.ring_steps([[[1, 2], [10, 20]], [[1, 22], [11, 20]], [[11, 22], [11, 22]]])[1],
    "many curves": lambda: pictures.curves({f"a fairly long label {i}": np.add(LOSS, i) for i in range(6)}, log=True),
    "bars": lambda: pictures.bars(
        {"all_reduce": [3_000_000] * 4, "broadcast": [1_000_000, 0, 0, 0]},
        {"all_reduce": 3_000_000, "broadcast": [1_000_000, 0, 0, 0]},
        title="sent",
    ),
    "stale gradients": lambda: pictures.stale_gradients(
        [(1, 0, 0), (2, 0, 1), (1, 1, 2), (3, 0, 3), (1, 3, 4), (2, 2, 5)], title="three workers"
    ),
    "many stale gradients": lambda: pictures.stale_gradients([(1 + i % 2, max(i - 1, 0), i) for i in range(60)]),
    "memory": lambda: pictures.memory(
        {
            "plain": {"parameters": [4e6] * 4, "gradients": [4e6] * 4, "optimizer state": [8e6] * 4},
            "stage 3": {"parameters": [1e6] * 4, "gradients": [1e6] * 4, "optimizer state": [2e6, 2e6, 2e6, 1.9e6]},
        },
        {"plain": 16e6, "stage 3": 4.5e6},
        title="float32 and AdamW",
    ),
    "memory over time": lambda: pictures.memory_over_time(held_over_time(), marks={1: 9e6}),
    "timeline": lambda: pictures.timeline(step_events()),
    "ring timeline": lambda: pictures.timeline(ring_events()),
    "timeline of six calls at once": lambda: pictures.timeline(
        [event(0, "communication", "send", 0.01 * i, 1 + 0.01 * i, 590_000) for i in range(6)]
    ),
    "schedule": lambda: pictures.schedule(
        {"computed": PIPELINE, "measured": [[(a, 1.1 * s, 1.1 * e) for a, s, e in row] for row in PIPELINE]},
        title="two ranks",
        note="Bubble: 1/3. " * 12,
    ),
    "schedule in numbers": lambda: pictures.schedule(
        [[(f"{rank + 2 * (i % 2)}{'FIW'[i % 3]}{i}", i, i + 1) for i in range(60)] for rank in range(2)], unit=""
    ),
    "process tree": lambda: pictures.process_tree(processes(8)),
    "matmul in rows": lambda: pictures.matmul(random(9, 5), random(5, 7), random(9, 7), (ROWS, -1, ROWS), title="rows"),
    "matmul summed": lambda: pictures.matmul(
        np.ones((3, 4)),
        np.ones((4, 5)),
        np.full((3, 5), 4),
        (np.arange(4), np.arange(4)[:, None], -1),
        summands=[np.ones((3, 5))] * 4,
        title="inner",
        note="summed",
        lines=["an all-reduce of A"],
    ),
    "summa": lambda: pictures.matmul(
        np.ones((4, 6)),
        np.ones((6, 2)),
        np.ones((4, 2)),
        [np.kron(GRID, np.ones(block, int)) for block in ((2, 3), (3, 1), (2, 1))],
        panel=(0, 3),
        title="SUMMA",
        lines=["rank 0 → rank 1", "rank 2 → rank 3"],
    ),
    "split gradients": lambda: pictures.split_gradients(
        {
            "fc1.weight": (random(20, 10), np.split(random(20, 10), 4), 0),
            "fc2.weight": (random(3, 8), np.split(random(3, 8) + 0.1, 4, 1), 1),
            "fc2.bias": (random(10), [random(10)] * 4, None),
        },
        title="over 4 ranks",
    ),
    "images": lambda: pictures.images(
        {"digits": random(7, 8, 8), "what the server\nmade of them": random(12, 8, 8)},
        title="digits",
        note="black is ink",
    ),
    "messages": lambda: pictures.messages(
        ["vector", "own mask", "with 1", "message"],
        {
            "client 0": [(7, "secret"), (55, "restored"), ("+31", "secret"), (93, "sent")],
            "client 1": [(12, "secret"), (8, "secret"), None, (12, "gone")],
            "sum": [None, None, None, (7, "result")],
        },
        title="secure aggregation",
        note="modulo 100",
        line="The server adds up what it has.",
    ),
    "float bits": lambda: pictures.float_bits(2.3e-8, 65536.0),
    "float bits lost": lambda: pictures.float_bits(-1.7e-9, title="a small gradient"),
    "magnitudes": lambda: pictures.magnitudes(
        {"as they are": random(5000) * 1e-7, "times 65,536": random(5000) * 65536e-7}, title="gradients"
    ),
    "plans": lambda: pictures.plans(
        [
            {
                "plan": "tp4 × dp128 sp zero2 micro 1",
                "parts": {"compute": 7.1, "bubble": 0.2, "tensor": 1.9},
                "memory": 61e9,
                "why": "",
            },
            {
                "plan": "dp512 zero3 micro 2",
                "parts": {"compute": 7.1, "data": 3.2},
                "memory": 7.7e10,
                "why": "12.0% slower, most of it data: +3.2 s, though tensor is 1.9 s less",
            },
        ],
        title="70 B on 512 GPUs",
        note="computed",
        limit=80e9,
    ),
    "contact sheet": lambda: pictures.contact_sheet(pictures.ring_steps(ring_states(3))),
}
