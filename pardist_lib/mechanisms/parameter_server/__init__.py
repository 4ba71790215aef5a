"""A parameter server: one rank holds the weights, the others push gradients and pull parameters."""

from .server import Applied, ParameterServer

__all__ = ["Applied", "ParameterServer"]
