"""Secure aggregation by hand, drawn step by step: who adds which mask, what the server sees, who falls silent."""

from pardist_lib import pictures

SHORT = ["values", "pair masks", "own masks", "messages", "silence", "shares", "the sum"]


def steps(values, own, pair, silent, modulus=100):
    """(seven pictures, their captions) for `pictures.stepper`.

    values, own: {client: whole number}; pair: {(lower client, higher client): mask}; silent: the client whose message
    never arrives. A picture has a row for each client and one for the server; what is not known yet is left empty.
    """
    there = [c for c in values if c != silent]
    sum_of_values = " + ".join(str(values[c]) for c in there)
    others = " and ".join(map(str, there))
    lines = [
        "Each client has a number that nobody may see.",
        "Every pair agrees on a mask: one adds it, the other subtracts it.",
        "Each client draws a mask of its own besides.",
        "The messages: numbers like any others. Own masks are still in their sum.",
        f"Client {silent} falls silent. The masks that {others} share with it cancel no more.",
        "The others hand over shares: own masks of those who are there, pair masks of the one who is not.",
        f"Own masks of {others} off, masks shared with {silent} undone: "
        f"{sum_of_values} = {sum(values[c] for c in there)}, and nothing else.",
    ]
    frames = [_frame(values, own, pair, silent, modulus, i, line) for i, line in enumerate(lines, 1)]
    return frames, [f"{i}: {short}" for i, short in enumerate(SHORT, 1)]


def signed(pair, client):
    """{other client: the mask with the sign that `client` adds it with}."""
    added = {high: mask for (low, high), mask in pair.items() if low == client}
    return added | {low: -mask for (low, high), mask in pair.items() if high == client}


def _frame(values, own, pair, silent, modulus, step, line):
    def from_step(first, text, kind):
        return (text, kind) if step >= first else None

    message = {c: (values[c] + own[c] + sum(signed(pair, c).values())) % modulus for c in values}
    restored, rows = step >= 6, {}
    for c in values:
        cells = [
            from_step(1, values[c], "secret"),
            from_step(3, own[c], "restored" if restored and c != silent else "secret"),
        ]
        for other in values:
            kind = "restored" if restored and silent in (c, other) else "secret"
            text = f"{signed(pair, c)[other]:+}".replace("-", "−") if other != c else ""
            cells.append(from_step(2, text, kind) if other != c else None)
        cells.append(from_step(4, message[c], "gone" if c == silent and step >= 5 else "sent"))
        rows[f"client {c}"] = cells
    there = [c for c in values if c != silent or step < 5]
    seen = sum(message[c] for c in there) % modulus, "sent"
    if step == len(SHORT):
        seen = sum(values[c] for c in there) % modulus, "result"
    rows["server"] = [None] * (len(values) + 2) + [from_step(4, *seen)]
    columns = ["value", "own mask", *(f"with {c}" for c in values), "message"]
    return pictures.messages(columns, rows, title="secure aggregation", note=f"modulo {modulus}", line=line)
