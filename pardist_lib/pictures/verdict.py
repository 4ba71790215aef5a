"""What was claimed and whether it holds: a line each, as the box of an exercise looks."""

from html import escape

HOLDS, FAILS = ("✓", "#009E73"), ("✗", "#D55E00")


class Verdict:
    """claims: {what equals what: whether it does}, or (whether, a few words more), such as (False, "0.13 apart").

    A claim is a whole sentence that is true where its value is: "four ranks have the losses of one process, to 1e-6".
    `holds` is True where all do.  Raises TypeError for a value that is neither true nor false, ValueError for none.
    """

    def __init__(self, claims):
        self.claims = {str(c): v if isinstance(v, tuple) else (v, "") for c, v in dict(claims).items()}
        if not self.claims:
            raise ValueError("verdict: expected at least one {claim: True or False}")
        for claim, (holds, _) in self.claims.items():
            if type(holds).__name__ not in ("bool", "bool_"):  # numpy's, too
                raise TypeError(f"verdict: {claim!r} is {holds!r}; True or False is expected")

    @property
    def holds(self):
        return all(holds for holds, _ in self.claims.values())

    def _lines(self):
        for claim, (holds, more) in self.claims.items():
            mark, colour = HOLDS if holds else FAILS
            yield mark, colour, claim + (f": {more}" if more else "")

    def __repr__(self):
        return "\n".join(f"{mark} {said}" for mark, _, said in self._lines())

    def _repr_html_(self):
        return "".join(
            f'<div style="border-left:5px solid {colour};padding:2px 0 2px 10px"><b>{mark}</b> {escape(said)}</div>'
            for mark, colour, said in self._lines()
        )
