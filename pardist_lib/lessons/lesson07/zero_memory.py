"""Bytes a rank holds at each stage of ZeRO. Typical: a stage shards the wrong kind, or its own kind only."""

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
            about = f", {' + '.join(map(str, kinds))} bytes" if kinds else ""
            labels.append(f"{psi:,} parameters, {n} rank{'s' * (n > 1)}, stage {stage}{about}")
    numbers(run, inputs, [held(*args) for args in inputs], labels, MISTAKES)


def held(psi, n, stage, p, g, s, since=(3, 2, 1), n_th=lambda psi, b, n: psi * b / n):
    """Bytes of psi parameters, with p, g and s bytes of each kind, which are sharded since these stages."""
    return sum(n_th(psi, b, n) if stage >= at else psi * b for b, at in zip((p, g, s), since, strict=True))


def mistaken(stages=(0, 1, 2, 3), **other):
    """`held` where stage i is taken for stages[i], and where something else is not what it should be."""
    return lambda psi, n, stage, p, g, s: held(**dict(psi=psi, n=n, stage=stages[stage], p=p, g=g, s=s) | other)


MISTAKES = [
    ("the bytes of each kind are ignored: 4, 4 and 8 are only their defaults", mistaken(p=4, g=4, s=8)),
    ("parameter_bytes is not used: 4 is only its default", mistaken(p=4)),
    ("gradient_bytes is not used: 4 is only its default", mistaken(g=4)),
    ("state_bytes is not used: 8 is only its default", mistaken(s=8)),
    ("stage 2 does no more than stage 1 here: it shards the gradients, too", mistaken((0, 1, 1, 3))),
    ("stage 2 does what stage 3 does here: it leaves the parameters whole", mistaken((0, 1, 3, 3))),
    ("n is not used: this is for 4 ranks", mistaken(n=4)),
    ("at stage 3 the gathered parameters are counted: they are not held all the time",
     lambda psi, n, stage, p, *rest: held(psi, n, stage, p, *rest) + psi * p * (stage == 3)),
    ("the stages are shifted by one: stage 0 shards nothing", mistaken((1, 2, 3, 4))),
    ("the stages are shifted by one: stage 1 shards the optimizer's state", mistaken((-1, 0, 1, 2))),
    ("each stage shards only its own kind here: stage 2 shards the state too, stage 3 all three",
     lambda psi, n, stage, p, g, s: psi * sum(b / n if stage == at else b for at, b in ((3, p), (2, g), (1, s)))),
    ("this is for all ranks together: one rank is asked for", lambda psi, n, *rest: n * held(psi, n, *rest)),
    ("the order is wrong: first the optimizer's state is sharded, the parameters last", mistaken(since=(1, 2, 3))),
    ("at every stage everything is divided by n", mistaken((3, 3, 3, 3))),
    ("nothing is divided by n: what is sharded is held to one n-th", mistaken((0, 0, 0, 0))),
    *((f"this is in {unit}: bytes are asked for", lambda *args, size=size: held(*args) / size)
      for unit, size in (("GB", 1e9), ("MB", 1e6), ("GiB", 2**30), ("MiB", 2**20), ("bits", 1 / 8))),
    ("at stage 1 the gradients are still whole: only stage 2 shards them", mistaken(since=(3, 1, 1))),
    ("the order is wrong: stage 2 shards the gradients, and only stage 3 the parameters", mistaken(since=(2, 3, 1))),
    ("state_bytes is not used: the state need not be two numbers of the parameters' kind",
     lambda psi, n, stage, p, g, s: held(psi, n, stage, p, g, 2 * p)),
    ("n-ths are rounded up here: divide with /, and round nothing", mistaken(n_th=lambda psi, b, n: b * -(-psi // n))),
    ("n-ths are rounded down here: divide with /, not with //", mistaken(n_th=lambda psi, b, n: psi * b // n)),
]  # fmt: skip

why = (
    "Each stage divides one kind more by n, and the rest is on every rank. A framework holds more for the moment: a "
    "gathered layer or two, buckets on their way, and in DeepSpeed whatever its allocator keeps for them."
)
exercise = Exercise(hints, check, minutes=10, level="easy", why=why)
