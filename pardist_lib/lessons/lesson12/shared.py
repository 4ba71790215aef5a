"""How the numbers are judged that the answers of this lesson return."""

from ..exercises.cases import number
from ..exercises.judge import Wrong, same, type_of
from ..exercises.runs import results


def judge(run, inputs, labels, parts, right, mistakes, tolerance=1e-6):
    """Raise Wrong unless the answer gives what `right` gives for each of the inputs, within a relative tolerance.

    parts: a name for each number that it returns. mistakes: (diagnosis, function that takes what `right` does).
    """
    several, changed = (
        len(parts) > 1,
        "the lists that were given have changed: work on copies, as sorted(list) makes one",
    )
    got = results(run, inputs, labels, changed)
    for label, value in zip(labels, got, strict=True):
        if value is None:
            raise Wrong("the result is None: does the function end without a return?", label)
        if several and (not isinstance(value, (tuple, list)) or len(value) != len(parts)):
            raise Wrong(f"it returns {type_of(value)}: {len(parts)} numbers are asked for, ({', '.join(parts)})", label)
    expected = [right(*args) for args in inputs]
    known = [(why, [formula(*args) for args in inputs]) for why, formula in mistakes]
    for i, part in enumerate(parts):

        def column(rows, i=i):
            return [number(row[i] if several else row) for row in rows]

        names = [f"{part}, {label}" if several else label for label in labels]
        would = [(why, column(rows)) for why, rows in known]
        same(column(got), column(expected), "", mistakes=would, labels=names, tolerance=(tolerance, 1e-12))
