"""What an exercise is: hints, and how an answer is checked."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    """`exercise = Exercise(hints, check)` in lessonNN/<name>.py, which lessonNN/__init__.py lists in EXERCISES.

    hints   two to four texts, from a nudge to nearly the code
    check   check(run) raises `Wrong` where the answer is not right, `Blocked` where that cannot be told. run is the
            `Bench`: run(fn, *args, n=4) calls fn(answer, *args) on n ranks and gives what each returned.
    minutes how long it takes somebody who meets it first; level: "easy", "medium" or "hard"
    why     for whoever has passed: a sentence on why it is right, and where a real framework does it otherwise

    The blank is the signature and docstring of the function of the same name in lessonNN/solutions.py.
    """

    hints: tuple[str, ...]
    check: Callable
    minutes: int = 0
    level: str = ""
    why: str = ""
