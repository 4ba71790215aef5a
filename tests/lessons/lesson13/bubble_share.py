"""Answers to bubble_share: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("bubble_share", "this is waiting by work, as the papers give it")
def the_papers(stages, micro_batches, chunks=1):
    return (stages - 1) / (chunks * micro_batches)


@mistake("bubble_share", "the chunks are not used")
def without_chunks(stages, micro_batches, chunks=1):
    return (stages - 1) / (micro_batches + stages - 1)


@mistake("bubble_share", "chunks make the bubble smaller, not larger")
def chunks_as_stages(stages, micro_batches, chunks=1):
    return (stages * chunks - 1) / (micro_batches + stages * chunks - 1)


@mistake("bubble_share", "chunks make the bubble smaller, not larger")
def chunks_above_the_line(stages, micro_batches, chunks=1):
    waiting = chunks * (stages - 1)
    return waiting / (micro_batches + waiting)


@mistake("bubble_share", "not for itself too")
def waits_for_itself(stages, micro_batches, chunks=1):
    return stages / (micro_batches * chunks + stages)


@mistake("bubble_share", "stages and micro-batches are exchanged")
def exchanged(stages, micro_batches, chunks=1):
    return (micro_batches - 1) / (stages * chunks + micro_batches - 1)


@mistake("bubble_share", "the share in which it works")
def efficiency(stages, micro_batches, chunks=1):
    return micro_batches * chunks / (micro_batches * chunks + stages - 1)


@mistake("bubble_share", "waiting is counted twice")
def there_and_back(stages, micro_batches, chunks=1):
    return 2 * (stages - 1) / (micro_batches * chunks + 2 * (stages - 1))


@mistake("bubble_share", "only the waiting gets shorter, not the work")
def divides_at_the_end(stages, micro_batches, chunks=1):
    return (stages - 1) / (micro_batches + stages - 1) / chunks


@mistake("bubble_share", "per cent")
def per_cent(stages, micro_batches, chunks=1):
    return 100 * (stages - 1) / (micro_batches * chunks + stages - 1)


@right("bubble_share")
def slot_by_slot(stages, micro_batches, chunks=1):
    slots = micro_batches * chunks + stages - 1
    return sum(1 for slot in range(slots) if slot >= micro_batches * chunks) / slots
