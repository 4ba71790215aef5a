"""apply_stale: wrong answers as people write them, and unusual right ones."""

from tests.lessons.planted import mistake, right


@mistake("apply_stale", "the gradient is applied with the full lr")
def full_step(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at > limit:
        return version
    theta -= lr * gradient
    return version + 1


@mistake("apply_stale", "nothing is dropped")
def drops_nothing(theta, gradient, computed_at, version, lr, limit):
    theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "a gradient exactly as stale as limit is dropped")
def drops_one_too_many(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at >= limit:
        return version
    theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "is applied as if it were limit versions old: it has to be dropped")
def clips_the_staleness(theta, gradient, computed_at, version, lr, limit):
    theta -= lr / (1 + min(version - computed_at, limit)) * gradient
    return version + 1


@mistake("apply_stale", "a dropped gradient makes no new version")
def counts_what_it_dropped(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at <= limit:
        theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "theta is as it was before the call")
def not_in_place(theta, gradient, computed_at, version, lr, limit):
    if version - computed_at > limit:
        return version
    theta = theta - lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "division by zero")
def divides_by_staleness(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    theta -= lr / stale * gradient
    return version + 1


@mistake("apply_stale", "a gradient of staleness 1 gets half a step")
def staleness_one_counts_full(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    theta -= lr / max(stale, 1) * gradient
    return version + 1


@mistake("apply_stale", "it returns nothing (None): the version that theta has now is asked for")
def returns_nothing(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient


@mistake("apply_stale", "`gradient` was changed")
def scales_the_gradient(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    gradient /= 1 + stale
    theta -= lr * gradient
    return version + 1


@mistake("apply_stale", "each gradient applied makes a new version")
def never_counts(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient
    return version


@mistake("apply_stale", "it returns the staleness")
def returns_the_staleness(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient
    return stale


@mistake("apply_stale", "the version that theta has now is asked for")
def returns_theta(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta -= lr / (1 + stale) * gradient
    return theta


@mistake("apply_stale", "limit 0 drops whatever is stale")
def takes_limit_0_for_none(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if limit and stale > limit:
        return version
    theta -= lr / (1 + stale) * gradient
    return version + 1


@mistake("apply_stale", "dropped, though it is not staler than limit: staleness is version - computed_at")
def compares_the_version(theta, gradient, computed_at, version, lr, limit):
    if version > limit:
        return version
    theta -= lr / (1 + version - computed_at) * gradient
    return version + 1


@mistake("apply_stale", "`gradient` was changed")
def scales_the_gradient_and_back(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale > limit:
        return version
    gradient *= lr / (1 + stale)
    theta -= gradient
    gradient /= lr / (1 + stale)
    return version + 1


@right("apply_stale")
def through_numpy(theta, gradient, computed_at, version, lr, limit):
    stale = version - computed_at
    if stale <= limit:
        theta.numpy()[...] -= (lr / (1 + stale) * gradient).numpy()
    return version + (stale <= limit)


@right("apply_stale")
def by_sub(theta, gradient, computed_at, version, lr, limit):
    fresh = version - computed_at <= limit
    if fresh:
        theta.sub_(gradient, alpha=lr / (version - computed_at + 1))
    return version + int(fresh)
