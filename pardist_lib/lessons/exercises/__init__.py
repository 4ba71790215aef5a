"""check(name, answer), hint(name), solution(name), progress(): the reader's side of the exercises."""

from .reader import Verdict, check, hint, progress, solution

__all__ = ["Verdict", "check", "hint", "progress", "solution"]
