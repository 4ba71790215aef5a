"""Wrong answers to the exercises of lesson 13, as people really write them; and some more right ones."""

import math

from planted import mistake, right

# ---- ring_pays_from -------------------------------------------------------------------------------------------


@mistake("ring_pays_from", "S/β are seconds")
def seconds_times_bandwidth(n, latency, bandwidth):
    saved = math.log2(n) - 2 * (n - 1) / n
    return (2 * (n - 1) - math.log2(n)) * latency / bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "one of the two is off by a factor of two")
def half_a_ring(n, latency, bandwidth):
    steps, rounds = n - 1, math.log2(n)
    saved = rounds - steps / n
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "a ring's messages have S/n bytes")
def a_ring_of_whole_tensors(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), math.log2(n)
    return (steps - rounds) * latency * bandwidth / (rounds - steps) if rounds > steps else math.inf


@mistake("ring_pays_from", "the doubling's messages are not counted")
def only_the_rings_latency(n, latency, bandwidth):
    saved = math.log2(n) - 2 * (n - 1) / n
    return 2 * (n - 1) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "this is the natural logarithm")
def natural(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), math.log(n)
    saved = rounds - steps / n
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "a ring has 2(n - 1) messages, recursive doubling log2(n)")
def a_tree(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), 2 * math.log2(n)
    saved = rounds - steps / n
    return (steps - rounds) * latency * bandwidth / saved if saved > 0 else math.inf


@mistake("ring_pays_from", "ZeroDivisionError")
def divides_by_nothing(n, latency, bandwidth):
    return (2 * (n - 1) - math.log2(n)) * latency * bandwidth / (math.log2(n) - 2 * (n - 1) / n)


@mistake("ring_pays_from", "it pays nowhere, math.inf")
def always_on_two(n, latency, bandwidth):
    if n == 2:
        return 0.0
    return (2 * (n - 1) - math.log2(n)) * latency * bandwidth / (math.log2(n) - 2 * (n - 1) / n)


@mistake("ring_pays_from", "is a 4 written into it?")
def for_four(n, latency, bandwidth):
    return (6 - 2) * latency * bandwidth / (2 - 1.5)


@mistake("ring_pays_from", "these are bits")
def in_bits(n, latency, bandwidth):
    return 8 * by_bisection(n, latency, bandwidth)


@mistake("ring_pays_from", "n.bit_length() - 1 is it")
def one_round_more(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), n.bit_length()
    return (steps - rounds) * latency * bandwidth / (rounds - steps / n)


@mistake("ring_pays_from", "it pays nowhere, math.inf")
def nearly_nothing_saved(n, latency, bandwidth):
    steps, rounds = 2 * (n - 1), math.log2(n)
    return (steps - rounds) * latency * bandwidth / max(rounds - steps / n, 1e-12)


@right("ring_pays_from")
def by_bisection(n, latency, bandwidth):
    def ahead(size):
        ring = 2 * (n - 1) * (latency + size / n / bandwidth)
        return math.log2(n) * (latency + size / bandwidth) - ring

    low, high = 0.0, 1e18
    if ahead(high) <= 0:
        return math.inf
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if ahead(middle) > 0 else (middle, high)
    return high


# ---- bubble_share ---------------------------------------------------------------------------------------------


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


# ---- tensor_parallel_bytes ------------------------------------------------------------------------------------


@mistake("tensor_parallel_bytes", "this is forward alone")
def forward_alone(batch, sequence, hidden, n, element=2, recompute=False):
    return (2 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "this is two in all")
def one_each_way(batch, sequence, hidden, n, element=2, recompute=False):
    return 2 * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "this is what is given to the all-reduces")
def payload(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "this is half of it")
def half_a_ring_of_it(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "for all ranks together")
def the_whole_group(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) * batch * sequence * hidden * element / n * n


@mistake("tensor_parallel_bytes", "is not divided by n")
def split_activations(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden / n * element


@mistake("tensor_parallel_bytes", "element is not used")
def always_two_bytes(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden * 2


@mistake("tensor_parallel_bytes", "these are numbers, not bytes")
def numbers_of_it(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden


@mistake("tensor_parallel_bytes", "recompute is not used")
def forgets_to_recompute(batch, sequence, hidden, n, element=2, recompute=False):
    return 4 * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "not all four")
def everything_again(batch, sequence, hidden, n, element=2, recompute=False):
    return (8 if recompute else 4) * 2 * (n - 1) / n * batch * sequence * hidden * element


@mistake("tensor_parallel_bytes", "rounded to whole numbers")
def whole_parts(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) * (batch * sequence * hidden // n) * element


@mistake("tensor_parallel_bytes", "rounded to whole numbers")
def padded_parts(batch, sequence, hidden, n, element=2, recompute=False):
    return (4 + 2 * recompute) * 2 * (n - 1) * -(-batch * sequence * hidden // n) * element


@mistake("tensor_parallel_bytes", "rounded to whole numbers")
def whole_bytes(batch, sequence, hidden, n, element=2, recompute=False):
    return int((4 + 2 * recompute) * 2 * (n - 1) / n * batch * sequence * hidden * element)


@right("tensor_parallel_bytes")
def call_by_call(batch, sequence, hidden, n, element=2, recompute=False):
    calls = ["attention", "mlp"] * (3 if recompute else 2)
    chunk = batch * sequence * hidden * element / n
    return sum(chunk for _ in calls for _ in range(2 * (n - 1)))


# ---- fewest_ranks ---------------------------------------------------------------------------------------------

SHARED = (0, 12, 14, 16)


@mistake("fewest_ranks", "round up")
def rounds_down_ranks(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return max(1, shared // room) if room > 0 else None


@mistake("fewest_ranks", "one more than is needed")
def adds_one(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return shared // room + 1 if room > 0 else None


@mistake("fewest_ranks", "≤, not <")
def strictly_less(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - 1 - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "only powers of two are tried")
def doubles(parameters, memory, stage):
    for k in range(40):
        if (16 - SHARED[stage]) * parameters * 2**k + SHARED[stage] * parameters <= memory * 2**k:
            return 2**k
    return None


@mistake("fewest_ranks", "only stage 3 does that")
def all_of_it(parameters, memory, stage):
    return -(-16 * parameters // memory)


@mistake("fewest_ranks", "the stages are one too low")
def shifted(parameters, memory, stage):
    shared = (0, 0, 12, 14)[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "18 bytes a parameter")
def eighteen(parameters, memory, stage):
    shared = (0, 12, 16, 18)[stage] * parameters
    room = memory - (18 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "4 + 4 + 8")
def in_float32(parameters, memory, stage):
    shared = (0, 8, 12, 16)[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "are left out")
def shares_alone(parameters, memory, stage):
    if stage == 0:
        return 1 if 16 * parameters <= memory else None
    return math.ceil(SHARED[stage] * parameters / memory)


@mistake("fewest_ranks", "it is 1 or None")
def ranks_for_stage_0(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return math.ceil(16 * parameters / memory)
    return -(-shared // room) if room > 0 else None


@mistake("fewest_ranks", "a whole number of ranks, or None, is asked for")
def a_fraction(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    return shared / room if room > 0 else None


@mistake("fewest_ranks", "no number of ranks is enough here")
def never_none(parameters, memory, stage):
    shared = SHARED[stage] * parameters
    room = memory - (16 * parameters - shared)
    if not shared:
        return 1 if room >= 0 else None
    return -(-shared // room) if room > 0 else 10**9


@mistake("fewest_ranks", "is there a largest number that is tried?")
def up_to_a_thousand(parameters, memory, stage):
    shared = SHARED[stage]
    fits = (n for n in range(1, 1025) if (16 - shared) * parameters * n + shared * parameters <= memory * n)
    return next(fits, None)


@right("fewest_ranks")
def of_whole_parameters(parameters, memory, stage):
    def held(n):
        return (16 - SHARED[stage]) * parameters + SHARED[stage] * -(-parameters // n)

    return next((n for n in range(1, 100_000) if held(n) <= memory), None)


@right("fewest_ranks")
def by_searching(parameters, memory, stage):
    def fits(n):
        return (16 - SHARED[stage]) * parameters * n + SHARED[stage] * parameters <= memory * n

    n = 1
    while not fits(n):
        n *= 2
        if n > 10**15:
            return None
    low = n // 2
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (low, middle) if fits(middle) else (middle, n)
    return n
