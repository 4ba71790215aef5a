"""Training on data that nobody else may see.

    federated            the data stay with their owners, models travel; robust means against clients that lie
    secure_aggregation   the server learns the sum of the clients' vectors and no single one; secure_sum: on ranks
    dp_sgd               what is learnt hardly depends on any single row, and by how much is known

Each leaves open what another one closes. The first keeps rows at home but sends updates that give rows away; the second
hides the updates, but not their sum nor the model; the third bounds what the model tells of one row, but leaves the
single messages open. In earnest they are used together.
"""

from .checks import TooFewClients
from .dp_sgd import clip_and_sum, epsilon, noise_generator, per_sample_gradients, poisson_rows, private_gradient
from .federated import coordinate_median, draw_clients, federated_round, train_locally, trimmed_mean
from .secure_aggregation import Client, decode, encode, largest, unmask
from .secure_sum import secure_sum

__all__ = [
    "Client",
    "TooFewClients",
    "clip_and_sum",
    "coordinate_median",
    "decode",
    "draw_clients",
    "encode",
    "epsilon",
    "federated_round",
    "largest",
    "noise_generator",
    "per_sample_gradients",
    "poisson_rows",
    "private_gradient",
    "secure_sum",
    "train_locally",
    "trimmed_mean",
    "unmask",
]
