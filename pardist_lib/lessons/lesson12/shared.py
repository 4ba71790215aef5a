"""What several exercises of this lesson share."""

import torch

from ..exercises.cases import number
from ..exercises.judge import Wrong, same, type_of
from ..exercises.watch import watched


def each(answer, inputs):
    """The answer's value for each input, and whether it changed what it was given."""

    def all_of_them():
        out = []
        for args in inputs:
            given = [list(a) if isinstance(a, list) else a for a in args]
            out.append((answer(*given), given == list(args)))
        return out

    return watched(all_of_them)


def values(run, inputs):
    [seen] = run(each, inputs, n=1)
    if seen.calls:
        raise Wrong(f"it calls {seen.calls[0].op}: this one is plain arithmetic, in one process")
    results = [value for value, _ in seen.result]
    for i, (_, unchanged) in enumerate(seen.result):
        if not unchanged:
            raise Wrong(
                "the lists that were given have changed: work on copies, as sorted(list) makes one", f"case {i}"
            )
    return results


def judge(run, inputs, labels, parts, right, mistakes, tolerance=1e-6):
    """Compare the answers' numbers, part by part. parts: names of what is returned; mistakes: (diagnosis, function that
    gives all parts)."""
    results = values(run, inputs)
    several = len(parts) > 1
    for label, value in zip(labels, results, strict=True):
        if value is None:
            raise Wrong("the result is None: does the function end without a return?", label)
        if several and (not isinstance(value, (tuple, list)) or len(value) != len(parts)):
            raise Wrong(f"it returns {type_of(value)}: {len(parts)} numbers are asked for, ({', '.join(parts)})", label)
    table = [value if several else (value,) for value in results]

    def column(rows, i):
        rows = [row if several else (row,) for row in rows]
        return [torch.tensor(float(row[i]), dtype=torch.float64) for row in rows]

    wanted = [right(*args) for args in inputs]
    wrong = [(why, [formula(*args) for args in inputs]) for why, formula in mistakes]
    for i, part in enumerate(parts):
        expected = column(wanted, i)
        would = [(why, column(rows, i)) for why, rows in wrong]
        would = [
            (why, rows)
            for why, rows in would
            if any(not torch.isclose(a, b) for a, b in zip(rows, expected, strict=True))
        ]
        got = [number(row[i]) for row in table]
        names = [f"{part}, {label}" if several else label for label in labels]
        same(got, expected, "", mistakes=would, labels=names, tolerance=(tolerance, 1e-12))
