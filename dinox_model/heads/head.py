"""What all heads are: a frozen config that builds them for a network, and first weights that depend on the seed alone.

Invariant: two heads of equal configs, networks' configs and seeds are equal, bit for bit.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinox_model import fields
from dinox_model.config import ViTConfig
from dinox_model.initialisation import Initialised, initialise_linear


class Head(Initialised):
    """A head of any kind. What its `forward` takes and gives is each kind's own."""

    def initialise(self, generator: torch.Generator) -> None:
        """Truncated normal linears, identity norms, convolutions as He et al. (arXiv 1502.01852) have them before a
        rectifier, zero biases, and what only this kind of head has."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module, generator)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                initialise_convolution(module, generator)
            elif isinstance(module, HasOwnParameters):
                module.initialise_own(generator)


class HasOwnParameters(nn.Module, abc.ABC):
    """A part of a head with parameters that are in none of its submodules."""

    @abc.abstractmethod
    def initialise_own(self, generator: torch.Generator) -> None:
        """Fill those parameters."""


def initialise_convolution(convolution: nn.Conv2d | nn.ConvTranspose2d, generator: torch.Generator) -> None:
    """Normal weights of variance 2 / (input values that reach an output value), no bias."""
    values = convolution.in_channels * math.prod(convolution.kernel_size)
    if isinstance(convolution, nn.ConvTranspose2d):
        values //= math.prod(convolution.stride)
    nn.init.normal_(convolution.weight, std=math.sqrt(2.0 / values), generator=generator)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


@dataclass(frozen=True, kw_only=True)
class HeadConfig(abc.ABC):
    """A head's shape. Raises ValueError, naming the field, for values that make no head."""

    kind = ""
    """The name of this kind in a configuration; no field, since each kind has a class of its own."""

    def __post_init__(self) -> None:
        fields.check(self)

    @abc.abstractmethod
    def build(self, network: ViTConfig, *, seed: int = 0) -> Head:
        """The head for a network of that config, with first weights, on torch's default device. Raises ValueError if
        the two do not fit."""

    def to_dict(self) -> dict[str, Any]:
        """`kind` and all fields as JSON values; `head_config` reads them back."""
        return {"kind": self.kind, **fields.to_mapping(self)}
