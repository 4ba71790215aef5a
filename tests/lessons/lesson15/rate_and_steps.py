"""Answers to rate_and_steps: wrong ones as people write them, and unusual right ones."""

import math

from tests.lessons.planted import mistake, right


def enough(epochs, rate):
    return math.ceil(round(epochs / rate, 9))


@mistake("rate_and_steps", "divided by one rank's rows")
def rate_on_one_rank(rows, batch, epochs):
    return batch / rows[0], enough(epochs, batch / rows[0])


@mistake("rate_and_steps", "the batch was divided by the ranks")
def shares_the_batch(rows, batch, epochs):
    rate = batch / len(rows) / sum(rows)
    return rate, enough(epochs, rate)


@mistake("rate_and_steps", "divided by the mean of the ranks' rows")
def mean_rows(rows, batch, epochs):
    rate = batch * len(rows) / sum(rows)
    return min(rate, 1), enough(epochs, rate)


@mistake("rate_and_steps", "upside down")
def steps_in_an_epoch(rows, batch, epochs):
    return sum(rows) / batch, enough(epochs, batch / sum(rows))


@mistake("rate_and_steps", "1 over all rows")
def one_row_a_step(rows, batch, epochs):
    return 1 / sum(rows), enough(epochs, batch / sum(rows))


@mistake("rate_and_steps", "rounded down")
def rounds_the_steps_down(rows, batch, epochs):
    return batch / sum(rows), int(epochs * sum(rows) / batch)


@mistake("rate_and_steps", "rounded to the nearest")
def rounds_the_steps(rows, batch, epochs):
    return batch / sum(rows), round(epochs * sum(rows) / batch)


@mistake("rate_and_steps", "rows that the ranks do not divide evenly are lost")
def loses_the_rest(rows, batch, epochs):
    rate = batch / (sum(rows) // len(rows) * len(rows))
    return rate, enough(epochs, rate)


@mistake("rate_and_steps", "the epochs are missing")
def one_epochs_steps(rows, batch, epochs):
    return batch / sum(rows), math.ceil(sum(rows) / batch)


@mistake("rate_and_steps", "these are the epochs")
def counts_epochs(rows, batch, epochs):
    return batch / sum(rows), epochs


@mistake("rate_and_steps", "rounded up for each epoch")
def whole_epochs(rows, batch, epochs):
    return batch / sum(rows), epochs * math.ceil(sum(rows) / batch)


@mistake("rate_and_steps", "rate and steps are swapped")
def the_other_way_round(rows, batch, epochs):
    rate = batch / sum(rows)
    return enough(epochs, rate), rate


@mistake("rate_and_steps", "the pair (rate, steps) is asked for")
def only_the_rate(rows, batch, epochs):
    return batch / sum(rows)


@right("rate_and_steps")
def in_fractions(rows, batch, epochs):
    total = sum(rows)
    steps = -int(-epochs * total // batch)
    return batch / total, steps
