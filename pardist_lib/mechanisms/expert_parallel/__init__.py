"""Mixture of experts, in one process and over ranks: each token visits a few of many MLPs, which the ranks share out.

    routing.py     which experts a token visits, which of its visits are dropped, and the order to compute them in
    balance.py     what keeps experts equally busy: a loss, or a bias of the choice
    experts.py     the MLPs, and tokens going through them
    moe.py         the layer in one process
    layer.py       the layer over ranks: route, sort, send, compute, send back, combine
    dealing.py     experts from one module to the ranks that own them, and back
    gradients.py   what data-parallel ranks do with the gradients of what they share and what they do not
    traffic.py     who sent how much to whom
    checks.py      what is refused

E: experts of a layer; k: experts that a token visits; T: a rank's own tokens. As everywhere in this library experts
are dealt out as torch.tensor_split cuts, so ranks need not divide them; each rank has at least one.
"""

from .balance import load_balancing_loss, update_expert_bias
from .experts import GatedMLP
from .gradients import average_gradients, clip_grad_norm_
from .layer import ExpertParallel
from .moe import MoE
from .routing import Router, Routing
from .traffic import Traffic

__all__ = [
    "ExpertParallel", "GatedMLP", "MoE", "Router", "Routing", "Traffic", "average_gradients", "clip_grad_norm_",
    "load_balancing_loss", "update_expert_bias",
]  # fmt: skip
