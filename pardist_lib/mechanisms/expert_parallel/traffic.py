"""Who sent how much to whom, and which rank all others wait for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Traffic:
    """What an `ExpertParallel` layer sent in one forward, counted in visits of tokens to experts.

    visits     (n, E) that each rank's tokens make to each expert
    dropped    (n, E) that they would have made, had the expert's capacity been larger
    owned      experts on each rank
    token_bytes, output_bytes  of one token on its way to an expert, and of what comes back (less under autocast)

    A rank's *port* is what it sends to other ranks, or receives from them, whichever is more: both go on at once. An
    all-to-all is over when the busiest port is done, so its time goes with `busiest_port` and not with the mean.
    """

    visits: torch.Tensor
    dropped: torch.Tensor
    owned: tuple[int, ...]
    token_bytes: int
    output_bytes: int

    @property
    def tokens_per_expert(self):
        """(E,) visits that each expert computes."""
        return self.visits.sum(0)

    @property
    def tokens_per_rank(self):
        """(n,) visits that each rank computes, its own tokens' among them."""
        return self.between.sum(0)

    @property
    def between(self):
        """(n, n) visits of row's rank to experts on column's rank; what stays on a rank is on the diagonal."""
        return torch.stack([part.sum(1) for part in self.visits.split(self.owned, 1)], 1)

    @property
    def all_to_all_bytes(self):
        """{which of the four: (n,) bytes that each rank sends to others}. Gradients take the way back."""
        away = self.between - self.between.diag().diag()
        to_experts, back = away.sum(1), away.sum(0)
        return {
            "forward, to the experts": to_experts * self.token_bytes,
            "forward, back": back * self.output_bytes,
            "backward, to the experts": to_experts * self.output_bytes,
            "backward, back": back * self.token_bytes,
        }

    @property
    def split_size_bytes(self):
        """(n,) bytes that each rank sends to others to say how many visits will come: 8 for each expert elsewhere."""
        return 8 * (sum(self.owned) - torch.tensor(self.owned))

    @property
    def ports(self):
        """(n,) bytes of tokens through each rank's port on the way to the experts; as many rows come back."""
        away = self.between - self.between.diag().diag()
        return self.token_bytes * torch.maximum(away.sum(1), away.sum(0))

    @property
    def busiest_port(self):
        """Bytes of the port that all wait for."""
        return int(self.ports.max())

    @property
    def mean_port(self):
        """Bytes that a rank sends on average: what the busiest port would have, were all equally busy."""
        return self.all_to_all_bytes["forward, to the experts"].double().mean().item()
