"""Wrong answers to reduce_buckets, as people really write them, and unusual right ones."""

import torch
import torch.distributed as dist

from tests.lessons.planted import mistake, right


@mistake("reduce_buckets", "a bucket is started before its turn")
def as_they_arrive(arriving, group=None):
    works = [(dist.all_reduce(bucket, group=group, async_op=True), bucket) for _, bucket in arriving]
    for work, bucket in works:
        work.wait()
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "nothing is started before the last bucket is here")
def sorted_first(arriving, group=None):
    works = [(dist.all_reduce(bucket, group=group, async_op=True), bucket) for _, bucket in sorted(arriving)]
    for work, bucket in works:
        work.wait()
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "was never reduced: one arrival may set free several buckets")
def one_at_a_time(arriving, group=None):
    full, started = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        if len(started) in full:
            bucket = full[len(started)]
            started.append((dist.all_reduce(bucket, group=group, async_op=True), bucket))
    for work, bucket in started:
        work.wait()
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "the sum was not divided by 4")
def buckets_not_divided(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    for work in works:
        work.wait()


@mistake("reduce_buckets", "it waits for a bucket before the last one is here")
def blocks_in_the_loop(arriving, group=None):
    full, done = {}, 0
    for number, bucket in arriving:
        full[number] = bucket
        while done in full:
            dist.all_reduce(full[done], group=group)
            full[done] /= dist.get_world_size(group)
            done += 1


@mistake("reduce_buckets", "never waited for")
def leaves_them_under_way(arriving, group=None):
    full, started = {}, 0
    for number, bucket in arriving:
        full[number] = bucket
        while started in full:
            full[started] /= dist.get_world_size(group)
            dist.all_reduce(full[started], group=group, async_op=True)
            started += 1


@mistake("reduce_buckets", "a bucket is started later than it could be")
def one_late(arriving, group=None):
    full, works, n = {}, [], dist.get_world_size(group)
    for number, bucket in arriving:
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)].div_(n), group=group, async_op=True))
        full[number] = bucket
    while len(works) < len(full):
        works.append(dist.all_reduce(full[len(works)].div_(n), group=group, async_op=True))
    for work in works:
        work.wait()


@mistake("reduce_buckets", "all_reduce is called 1 times for 3 buckets")
def all_in_one(arriving, group=None):
    buckets = [bucket for _, bucket in sorted(arriving)]
    flat = torch.cat(buckets)
    dist.all_reduce(flat, group=group)
    for bucket, part in zip(buckets, flat.split([len(b) for b in buckets]), strict=True):
        bucket.copy_(part / dist.get_world_size(group))


@mistake("reduce_buckets", "different buckets were added up")
def in_order_of_its_own(arriving, group=None):
    """Starts as many as it may, but in the order in which they came."""
    full, works, numbers, n = [], [], set(), dist.get_world_size(group)
    for number, bucket in arriving:
        full.append(bucket)
        numbers.add(number)
        while len(works) in numbers:
            works.append((dist.all_reduce(full[len(works)], group=group, async_op=True), full[len(works)]))
    for work, bucket in works:
        work.wait()
        bucket /= n


def buckets_of(arriving, group, divide_by):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    for number, work in enumerate(works):
        work.wait()
        full[number] /= divide_by


@mistake("reduce_buckets", "all_reduce goes over all ranks: `group` is missing")
def buckets_of_the_world(arriving, group=None):
    buckets_of(arriving, None, dist.get_world_size())


@mistake("reduce_buckets", "divided by the number of all ranks, 4, where the group has 2")
def divides_by_the_world(arriving, group=None):
    buckets_of(arriving, group, dist.get_world_size())


@right("reduce_buckets")
def divides_before(arriving, group=None):
    n, full, works = dist.get_world_size(group), [], []
    for number, bucket in arriving:
        full += [None] * (number + 1 - len(full))
        full[number] = bucket.div_(n)
        while len(works) < len(full) and full[len(works)] is not None:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    for work in works:
        work.wait()


def started(arriving, group, bucket_of=lambda bucket: bucket):
    """Start each bucket in its turn; returns {number: bucket} and the works."""
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket_of(bucket)
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group, async_op=True))
    return full, works


@mistake("reduce_buckets", "div_ works on a tensor whose all_reduce is still under way")
def divides_under_way(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            bucket = full[len(works)]
            works.append(dist.all_reduce(bucket, group=group, async_op=True))
            bucket /= dist.get_world_size(group)
    for work in works:
        work.wait()


@mistake("reduce_buckets", "div works on a tensor whose all_reduce is still under way")
def reads_under_way(arriving, group=None):
    full, works = started(arriving, group)
    means = [full[i] / dist.get_world_size(group) for i in range(len(works))]
    for i, work in enumerate(works):
        work.wait()
        full[i].copy_(means[i])


@mistake("reduce_buckets", "bucket 0 was never reduced: what was reduced is a copy")
def reduces_copies(arriving, group=None):
    full, works = started(arriving, group, torch.clone)
    for i, work in enumerate(works):
        work.wait()
        full[i] /= dist.get_world_size(group)


@mistake("reduce_buckets", "the sum was divided by 4 into a new tensor that is not the bucket")
def divides_into_new_ones(arriving, group=None):
    full, works = started(arriving, group)
    for i, work in enumerate(works):
        work.wait()
        full[i] = full[i] / dist.get_world_size(group)


@mistake("reduce_buckets", "2 of its 3 calls (isend, irecv or async_op=True) were never waited for")
def waits_for_the_last(arriving, group=None):
    _, works = started(arriving, group, lambda bucket: bucket.div_(dist.get_world_size(group)))
    works[-1].wait()


@mistake("reduce_buckets", "it waits for a bucket before the last one is here")
def waits_by_futures(arriving, group=None):
    full, done, n = {}, 0, dist.get_world_size(group)
    for number, bucket in arriving:
        full[number] = bucket.div_(n)
        while done in full:
            dist.all_reduce(full[done], group=group, async_op=True).get_future().wait()
            done += 1


@right("reduce_buckets")
def then_divides(arriving, group=None):
    full, futures, n = {}, [], dist.get_world_size(group)
    for number, bucket in arriving:
        full[number] = bucket
        while len(futures) in full:
            work = dist.all_reduce(full[len(futures)], group=group, async_op=True)
            futures.append(work.get_future().then(lambda future: future.value()[0].div_(n)))
    torch.futures.wait_all(futures)


@right("reduce_buckets")
def by_avg_in_buckets(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], dist.ReduceOp.AVG, group, True))
    for work in reversed(works):
        work.wait()


@right("reduce_buckets")
def functional_in_place(arriving, group=None):
    full, sums, collectives = {}, [], torch.ops._c10d_functional
    for number, bucket in arriving:
        full[number] = bucket
        while len(sums) in full:
            sums.append(collectives.all_reduce_(full[len(sums)], "sum", (group or dist.group.WORLD).group_name))
    for total in sums:
        collectives.wait_tensor(total).div_(dist.get_world_size(group))


@mistake("reduce_buckets", "does one of its loops never end?")
def never_counts_on(arriving, group=None):
    full, turn, works = {}, 0, []
    for number, bucket in arriving:
        full[number] = bucket
        while turn in full:
            works.append(dist.all_reduce(full[turn], group=group, async_op=True))


@mistake("reduce_buckets", "an all_reduce without async_op=True waits, too")
def one_call_after_the_other(arriving, group=None):
    for _, bucket in arriving:
        dist.all_reduce(bucket, group=group)
        bucket /= dist.get_world_size(group)


@mistake("reduce_buckets", "buckets come while a loop runs")
def asks_how_many(arriving, group=None):
    for number in range(len(arriving)):
        dist.all_reduce(arriving[number][1], group=group, async_op=True).wait()


@mistake("reduce_buckets", "only with async_op=True")
def waits_for_nothing(arriving, group=None):
    full, works = {}, []
    for number, bucket in arriving:
        full[number] = bucket
        while len(works) in full:
            works.append(dist.all_reduce(full[len(works)], group=group))
    for work in works:
        work.wait()
