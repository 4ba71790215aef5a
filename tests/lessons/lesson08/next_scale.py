"""Answers to next_scale: wrong ones as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("next_scale", "the scale never falls")
def never_backs_off(scale, good_steps, overflow, interval):
    if overflow:
        return scale, 0
    return (scale * 2, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "it grows one good step too late")
def grows_too_late(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if good_steps == interval else (scale, good_steps + 1)


@mistake("next_scale", "it grows one good step too early")
def grows_too_early(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    good_steps += 1
    return (scale * 2, 0) if good_steps == interval - 1 else (scale, good_steps)


@mistake("next_scale", "an overflow does not start the count anew")
def counts_on_after_an_overflow(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, good_steps
    return (scale * 2, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "an overflow counts as a good step")
def counts_overflows(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, good_steps + 1
    return (scale * 2, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "the count goes on after the scale has doubled")
def does_not_restart(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    good_steps += 1
    return (scale * 2 if good_steps == interval else scale), good_steps


@mistake("next_scale", "once there have been `interval` good steps the scale doubles in every step")
def grows_for_ever(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    good_steps += 1
    return (scale * 2 if good_steps >= interval else scale), good_steps


@mistake("next_scale", "the scale never grows")
def never_grows(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "it grows after an overflow")
def the_wrong_way_round(scale, good_steps, overflow, interval):
    return (scale * 2, 0) if overflow or good_steps + 1 == interval else (scale, good_steps + 1)


@mistake("next_scale", "the pair (scale, good_steps) is asked for")
def returns_the_scale_only(scale, good_steps, overflow, interval):
    return scale / 2 if overflow else scale


@mistake("next_scale", "doubles the scale before it is halved")
def grows_before_it_falls(scale, good_steps, overflow, interval):
    good_steps += 1
    if good_steps == interval:
        scale, good_steps = scale * 2, 0
    return (scale / 2, 0) if overflow else (scale, good_steps)


@mistake("next_scale", "`interval` is ignored")
def always_two_thousand(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (scale * 2, 0) if good_steps + 1 == 2000 else (scale, good_steps + 1)


@mistake("next_scale", "the scale is held at")
def bounds_the_scale(scale, good_steps, overflow, interval):
    if overflow:
        return scale / 2, 0
    return (min(scale * 2, 2.0**32), 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@right("next_scale")
def by_remainder(scale, good_steps, overflow, interval):
    good_steps = 0 if overflow else (good_steps + 1) % interval
    return (scale * 0.5 if overflow else scale * 2.0 if not good_steps else scale), good_steps
