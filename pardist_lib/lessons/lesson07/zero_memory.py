"""The exercise zero_memory."""

from ..exercises.cases import numbers
from ..exercises.exercise import Exercise

hints = (
    "Three kinds, each with its own bytes a parameter: parameters, gradients, optimizer state. Each is either "
    "held whole by every rank, or one n-th of it.",
    "Stage 1 shards the state, stage 2 the gradients as well, stage 3 the parameters as well.",
    "held = parameter_bytes / (n if stage >= 3 else 1), and so on for the two others; times parameters.",
)


def check(run):
    inputs, labels = [], []
    for stage in range(4):
        for psi, n, *kinds in ((1_000_000, 4), (7_500_000_000, 64, 2, 2, 12), (1000, 3, 4, 2, 1), (100, 1)):
            inputs.append((psi, n, stage, *(kinds or (4, 4, 8))))
            about = "" if not kinds else f", {kinds[0]} + {kinds[1]} + {kinds[2]} bytes"
            labels.append(f"{psi:,} parameters, {n} rank{'s' * (n > 1)}, stage {stage}{about}")

    def held(psi, n, stage, p=4, g=4, s=8):
        return psi * (p / (n if stage > 2 else 1) + g / (n if stage > 1 else 1) + s / (n if stage > 0 else 1))

    mistakes = [
        ("the bytes of each kind are ignored: 4, 4 and 8 are only their defaults",
         lambda psi, n, stage, *kinds: held(psi, n, stage)),
        ("parameter_bytes is not used: 4 is only its default",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, 4, g, s)),
        ("gradient_bytes is not used: 4 is only its default",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, p, 4, s)),
        ("state_bytes is not used: 8 is only its default",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, 8)),
        ("stage 2 does no more than stage 1 here: it shards the gradients, too",
         lambda psi, n, stage, *kinds: held(psi, n, 1 if stage == 2 else stage, *kinds)),
        ("stage 2 does what stage 3 does here: it leaves the parameters whole",
         lambda psi, n, stage, *kinds: held(psi, n, 3 if stage == 2 else stage, *kinds)),
        ("n is not used: this is for 4 ranks", lambda psi, n, stage, *kinds: held(psi, 4, stage, *kinds)),
        ("at stage 3 the gathered parameters are counted: they are not held all the time",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, s) + psi * p * (stage == 3)),
        ("the stages are shifted by one: stage 0 shards nothing",
         lambda psi, n, stage, *kinds: held(psi, n, stage + 1, *kinds)),
        ("the stages are shifted by one: stage 1 shards the optimizer's state",
         lambda psi, n, stage, *kinds: held(psi, n, stage - 1, *kinds)),
        ("each stage shards only its own kind here: stage 2 shards the state too, stage 3 all three",
         lambda psi, n, stage, p, g, s: psi * (p / (n if stage == 3 else 1) + g / (n if stage == 2 else 1)
                                               + s / (n if stage == 1 else 1))),
        ("this is for all ranks together: one rank is asked for",
         lambda psi, n, stage, *kinds: n * held(psi, n, stage, *kinds)),
        ("the order is wrong: first the optimizer's state is sharded, the parameters last",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, s, g, p)),
        ("at every stage everything is divided by n", lambda psi, n, stage, *kinds: psi * sum(kinds) / n),
        ("nothing is divided by n: what is sharded is held to one n-th", lambda psi, n, stage, *kinds:
         psi * sum(kinds)),
        *((f"this is in {unit}: bytes are asked for", lambda *args, unit=unit, size=size: held(*args) / size)
          for unit, size in (("GB", 1e9), ("MB", 1e6), ("GiB", 2**30), ("MiB", 2**20), ("bits", 1 / 8))),
        ("at stage 1 the gradients are still whole: only stage 2 shards them",
         lambda psi, n, stage, p, g, s: psi * (p / (n if stage > 2 else 1) + (g + s) / (n if stage > 0 else 1))),
        ("the order is wrong: stage 2 shards the gradients, and only stage 3 the parameters",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, g, p, s)),
        ("state_bytes is not used: the state need not be two numbers of the parameters' kind",
         lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, 2 * p)),
        ("n-ths are rounded up here: divide with /, and round nothing", lambda psi, n, stage, p, g, s: sum(
            b * (-(-psi // n) if stage > level else psi) for b, level in ((p, 2), (g, 1), (s, 0)))),
        ("n-ths are rounded down here: divide with /, not with //",
         lambda psi, n, stage, p, g, s: psi * p // (n if stage > 2 else 1) + psi * g // (n if stage > 1 else 1)
         + psi * s // (n if stage > 0 else 1)),
    ]  # fmt: skip
    numbers(run, inputs, [held(*args) for args in inputs], labels, mistakes)


exercise = Exercise(hints, check)
