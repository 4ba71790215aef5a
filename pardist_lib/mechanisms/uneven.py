"""Ranks of unequal speed: shares of the batch in proportion to it, gradients that count by rows, backup workers.

With equal shares all wait for the slowest: n ranks reach n times its speed. Shares in proportion to the speeds v_r end
at the same moment, and the ranks reach Σ v_r, which nothing can beat. Where one of four ranks is three times slower
that is 4/3 against 10/3: equal shares reach 0.4 of what is possible.

Unequal shares need weights. With n_r rows on rank r, N together and g_r the gradient of rank r's mean loss, the batch's
gradient is Σ n_r/N · g_r: whatever the split, that of one process. The mean of the g_r is something else.

Sources: Chen et al., "Revisiting Distributed Synchronous SGD" (2016), section 3, for backup workers; Chen et al.,
"Fast Distributed Deep Learning via Worker-adaptive Batch Sizing" (2020), for shares that follow the speed.
"""

import math
import secrets
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .collectives.agreement import sum_over_ranks
from .group import rank_and_size


def shares_of(rows, speeds, least=0):
    """How many of `rows` rows each rank gets, as a list of whole numbers that sum to `rows`.

    speeds: rows per second, or anything in proportion to it, one number a rank; 0 for a rank that is to have none. Of
    all splits, this is one that ends soonest: max n_r / v_r is as small as whole numbers allow. least: rows that each
    rank gets at least, so that its speed goes on being measured (needs all speeds above 0).

    Raises ValueError for speeds that are negative, not finite or all 0, and for fewer than n · least rows.
    """
    speeds = [float(v) for v in speeds]
    _check_shares(rows, speeds, least)
    shares = [max(least, int(rows * v / sum(speeds))) for v in speeds]
    while sum(shares) < rows:  # to whoever would be done first with one more
        r = min((r for r, v in enumerate(speeds) if v), key=lambda r: ((shares[r] + 1) / speeds[r], r))
        shares[r] += 1
    while sum(shares) > rows:  # `least` gave too many: from whoever is done last
        r = max((r for r, s in enumerate(shares) if s > least), key=lambda r: (shares[r] / speeds[r], r))
        shares[r] -= 1
    return shares


@torch.no_grad()
def average_by_rows(parameters, rows, group=None, *, summed=False, total=None):
    """Replace every trainable parameter's gradient by Σ n_r/N · g_r over the ranks; returns N, the rows of all.

    rows     this rank's, 0 where it has none: its gradients then count as zeros, whatever they are
    summed   False: p.grad is of the *mean* loss over `rows` rows. True: of the *sum* over them, as it is after adding
             up micro-batches of unequal size, each with its summed loss; Σ g_r / N then.
    total    N, where all ranks know it (from `shares_of`); None: all-reduce it, 8 bytes

    Equal to one process with all rows, for any split. A gradient that only some ranks have counts as zeros on the
    others; one that no rank with rows has becomes None. All-reduces the bytes of the gradients that are averaged, in
    one call for each dtype and device, and before them 1 byte a parameter: which gradients there are.

    Raises ValueError for rows < 0, for sparse gradients, and on every rank where no rank has any rows.
    """
    rank_and_size(group)
    parameters = [p for p in parameters if p.requires_grad]
    _check_gradients(parameters, rows)
    device = parameters[0].device
    used = torch.tensor([p.grad is not None and rows > 0 for p in parameters], dtype=torch.uint8, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
    if total is None:
        many = torch.tensor(int(rows), device=device)
        dist.all_reduce(many, group=group)
        total = many.item()
    if not total:
        raise ValueError("no rank has any rows: there is nothing to average")
    share = (rows > 0) / total if summed else rows / total
    averaged = [p for p, anyone in zip(parameters, used.tolist(), strict=True) if anyone]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in averaged]
    means = dict(zip(averaged, sum_over_ranks(gradients, group, scale=share), strict=True))
    for p in parameters:
        p.grad = torch.empty_like(p).copy_(means[p]) if p in means else None  # strides as p's, for fused optimizers
    return total


class Balancer:
    """Shares of every batch that follow the ranks' measured speeds.

        balancer = Balancer(batch=64)
        for x, y in batches:                                   # 64 rows, the same on every rank
            with balancer.timed():
                mine = balancer.mine
                loss(model(x[mine]), y[mine]).backward()       # the mean over this rank's rows
            balancer.finish(model.parameters())                # Σ n_r/N · g_r; the next shares
            optimizer.step()

    batch     rows of all ranks together, in every step: leave a smaller last batch out (drop_last=True)
    least     rows that each rank keeps at least, so that its speed goes on being measured
    memory    how much of a rank's old seconds per row stays in the new estimate, 0 (none) to below 1. More is calmer,
              and notices a change later.

    `shares` is every rank's number of rows, `mine` this rank's slice of the batch; both change in `finish`. A rank may
    also lose time that does not depend on its rows: the shares still settle where all ranks take equally long.
    Sends in a step what `average_by_rows` sends, and all-gathers 8 bytes.
    Raises ValueError for memory outside [0, 1), for fewer than n · least rows, and for least < 1.
    """

    def __init__(self, batch, group=None, *, least=1, memory=0.3):
        self.rank, self.n = rank_and_size(group)
        if not 0 <= memory < 1:
            raise ValueError(f"memory is the part of the old estimate that stays, 0 to below 1, not {memory}")
        if least < 1:
            raise ValueError(f"least is 1 or more, not {least}: a rank without rows would never be measured again")
        self.batch, self.group, self.least, self.memory = batch, group, least, memory
        self.shares = shares_of(batch, [1.0] * self.n, least)
        self.costs = None  # seconds per row of each rank, as estimated
        self._seconds = 0.0

    @property
    def mine(self):
        start = sum(self.shares[: self.rank])
        return slice(start, start + self.shares[self.rank])

    @contextmanager
    def timed(self):
        """What is inside counts as this rank's work; several add up in a step. Waiting for others belongs outside."""
        start = self._now()
        yield
        self._seconds += self._now() - start

    def _now(self):
        wait_for_device()
        return time.perf_counter()

    def finish(self, parameters, *, summed=False):
        """Average the gradients by rows, and share the next batch out by what was measured in this step."""
        parameters = list(parameters)
        average_by_rows(parameters, self.shares[self.rank], self.group, summed=summed, total=self.batch)
        self.rebalance(parameters[0].device if parameters else "cpu")

    def rebalance(self, device="cpu"):
        """New shares from this step's times, the same on all ranks; `finish` calls it. ValueError for no time."""
        mine = torch.tensor([self._seconds / self.shares[self.rank]], dtype=torch.float64, device=device)
        each = [torch.empty_like(mine) for _ in range(self.n)]
        dist.all_gather(each, mine, group=self.group)
        each, self._seconds = [t.item() for t in each], 0.0
        if not all(each):
            raise ValueError(
                f"rank {each.index(0.0)} has measured no time: do its work inside `with balancer.timed():`"
            )
        keep = self.memory if self.costs else 0.0
        self.costs = [keep * old + (1 - keep) * new for old, new in zip(self.costs or each, each, strict=True)]
        self.shares = shares_of(self.batch, [1 / c for c in self.costs], self.least)


class Race:
    """Backup workers: a step is over when all but the slowest `drop` ranks have finished; these do not count.

        race = Race(drop=1)
        for x, y in race.run(micro_batches):               # on a late rank it ends early
            loss_sum(model(x), y).backward()               # the sum over the micro-batch's rows
        rows, dropped = race.finish(model.parameters(), len(my_rows))
        optimizer.step()

    Chen et al. (2016) drop gradients that reach a server late. Here all ranks meet in the all-reduce as ever, so that
    they stay equal, but a late rank leaves its work unfinished: between two micro-batches it looks whether enough
    others have finished. So these wait for one micro-batch of the slowest rank at most. After each micro-batch a rank
    waits for its device, where that works asynchronously.

    A rank that finishes takes the next number from a store that all ranks share. The first n − drop are in; of all
    others neither gradients nor rows count, so that the mean is over the rows of those who are in. What a late rank
    has worked on is lost to this step: where it is always the same rank, the model sees less of that rank's data. Then
    use a `Balancer` instead.

    store: a torch.distributed.Store of all ranks in the group, by default the process group's own.
    Broadcasts a short name at the start. In a step: a few bytes to the store for each micro-batch, what
    `average_by_rows` sends, and an all-gather of 8 bytes. Raises ValueError where drop is not from 0 to n − 1.
    """

    def __init__(self, drop, group=None, store=None):
        self.rank, self.n = rank_and_size(group)
        if not isinstance(drop, int) or not 0 <= drop < self.n:
            raise ValueError(f"drop is how many of {self.n} ranks may be late, 0 to {self.n - 1}, not {drop!r}")
        name = [secrets.token_hex(8)]  # the first rank's counts: no other race in this store has it
        dist.broadcast_object_list(name, group_src=0, group=group)
        store = dist.distributed_c10d._get_default_store() if store is None else store
        self.store = dist.PrefixStore(f"race {name[0]}", store)
        self.drop, self.group, self.steps, self.place = drop, group, 0, None

    def run(self, micro_batches):
        """Yield the micro-batches, while this rank can still be in; see `finish`."""
        self.place, most = None, self.n - self.drop
        for micro_batch in micro_batches:
            if self.store.add(f"{self.steps}", 0) >= most:
                return
            yield micro_batch
            wait_for_device()  # or all would be ordered at once, and the fastest to order would win
        self.place = self.store.add(f"{self.steps}", 1)  # the store counts: no two ranks get the same

    def finish(self, parameters, rows):
        """(rows that count, ranks that were dropped), the same on every rank; gradients as `average_by_rows` leaves
        them, of the sum over this rank's `rows` rows."""
        parameters = list(parameters)
        inside = self.place is not None and self.place <= self.n - self.drop
        device = parameters[0].device if parameters else "cpu"
        mine = torch.tensor([rows if inside else -1], device=device)
        each = [torch.empty_like(mine) for _ in range(self.n)]
        dist.all_gather(each, mine, group=self.group)
        self.steps += 1
        counted = [t.item() for t in each]
        total = sum(c for c in counted if c > 0)
        average_by_rows(parameters, max(counted[self.rank], 0), self.group, summed=True, total=total)
        return total, [r for r, c in enumerate(counted) if c < 0]


def wait_for_device():
    """Until a GPU has done what it was told: its work has only been ordered so far."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


# ---- refused --------------------------------------------------------------------------------------------------


def _check_shares(rows, speeds, least):
    if not speeds or any(not 0 <= v < math.inf for v in speeds) or not any(speeds):
        raise ValueError(f"speeds are rows per second, 0 or more and not all 0, not {speeds}")
    if least and 0 in speeds:
        raise ValueError(f"rank {speeds.index(0)} has the speed 0, and is to have {least} rows at least")
    if rows < least * len(speeds) or rows != int(rows):
        raise ValueError(f"{rows} rows are not enough for {len(speeds)} ranks with {least} rows each")


def _check_gradients(parameters, rows):
    if rows < 0 or rows != int(rows):
        raise ValueError(f"rows is how many rows this rank has worked on, 0 or more, not {rows}")
    if not parameters:
        raise ValueError("there is no parameter that requires a gradient")
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise ValueError("a gradient is sparse, and has no place beside the others: use sparse=False")
