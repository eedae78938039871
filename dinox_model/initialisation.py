"""First weights: a function of the seed and the module's shape alone.

A module is made on the meta device (no memory, no draw from torch's global random state), given memory on the CPU,
filled from a generator of its own, and moved to torch's default device: so the device changes no weight. Under `with
torch.device("meta")` it stays there: shapes without memory, for counting and planning.
"""

from __future__ import annotations

import abc

import torch
from torch import nn

LINEAR_STD = 0.02


class Initialised(nn.Module, abc.ABC):
    """A network that can fill all its parameters from one generator."""

    @abc.abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Fill every parameter; what lay in it before has no effect."""


def materialise(network: Initialised, seed: int) -> None:
    """Give memory and first weights to `network`, made on the meta device, in place."""
    device = torch.get_default_device()
    if device.type == "meta":
        return
    network.to_empty(device="cpu")
    network.initialise(torch.Generator(device="cpu").manual_seed(seed))
    network.to(device)


def initialise_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """Truncated normal weights, no bias."""
    nn.init.trunc_normal_(linear.weight, std=LINEAR_STD, generator=generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
