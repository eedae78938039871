"""What a format of weights is: how its keys map to ours, what a network of it looks like, and what it cannot hold.

Maps hold key names and shapes only.
"""

from __future__ import annotations

import abc
import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.convert.pair import Pair
from dinox_model.positions import formula_periods
from dinox_model.preprocess import Preprocess
from dinox_model.tensor_files import StoredTensors, WeightsError

PERIODS = "rope.periods"
"""Our name of stored periods."""


class Format(abc.ABC):
    """A way in which others lay out a network. Its methods are functions of their arguments."""

    name: str
    """By which `load_pretrained` and the command line know it."""
    title: str
    """For people."""
    model_type: str | None = None
    """`model_type` of its config.json; None: its files have no config."""
    norm_eps: float | None = None
    """Where its files do not say it: epsilon of the norms of the released weights."""

    @abc.abstractmethod
    def config_of(self, settings: Mapping[str, Any], tensors: StoredTensors) -> ViTConfig:
        """The network that config.json (`settings`, empty without one) and tensors under their own names describe.

        Raises WeightsError for a network that ours cannot be.
        """

    @abc.abstractmethod
    def pairs(self, config: ViTConfig) -> list[Pair]:
        """All tensors of ours, by the names of theirs."""

    @abc.abstractmethod
    def cannot_hold(self, config: ViTConfig) -> dict[str, str]:
        """What of `config` this format has no place for: option or tensor, and why. Empty: all of it fits."""

    def own_name(self, name: str) -> str:
        """The name of this format's that a file's `name` is a spelling of."""
        return name

    def ignored(self, name: str) -> str | None:
        """Why a tensor of theirs is no part of a network here; None: it is, or it is unknown."""
        return None

    def check_constants(self, config: ViTConfig, tensors: StoredTensors, spelled: Mapping[str, str]) -> list[str]:
        """Faults of what is ignored but must have certain values. `spelled`: own name to the file's name."""
        return []

    def constants(self, config: ViTConfig) -> dict[str, Tensor]:
        """What their files hold besides, as a function of the shape."""
        return {}

    def settings_of(self, config: ViTConfig) -> dict[str, Any] | None:
        """config.json's members; None: this format has none."""
        return None

    def preprocess(self) -> Preprocess:
        """What its released weights expect: ImageNet's mean and deviation, averaged over the three colours, as all
        slices of a window are scaled alike."""
        return Preprocess(mean=0.449, std=0.226)


def are_formula_periods(periods: Tensor, config: ViTConfig) -> bool:
    """Whether stored periods are the formula's but for rounding in the last places of fp32."""
    formula = formula_periods(config.head_width, config.rope_period)
    return torch.allclose(periods.float(), formula, rtol=1e-6, atol=0.0)


def common_faults(config: ViTConfig) -> dict[str, str]:
    """Options of ours that none of the other formats can hold."""
    faults = {
        "norm": (config.norm != "layer", "its norms are LayerNorms, not RMSNorms"),
        "qk_norm": (config.qk_norm, "it has no norm of queries and keys"),
        "cls_token": (not config.cls_token, "it has a CLS token always"),
        "scale_conditioning": (config.scale_conditioning, "it knows no physical scale"),
    }
    return {option: reason for option, (found, reason) in faults.items() if found}


class Settings:
    """Members of a config.json that must be there and of a type, or are refused by name."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def integer(self, name: str) -> int:
        """A whole number."""
        return self._of(name, int)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self._of(name, (int, float))
        if not math.isfinite(value):
            raise WeightsError(f"config.json: {name} must be finite, not {value}")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false."""
        return self._of(name, bool)

    def side(self, name: str) -> int:
        """A length that both axes share, given once or twice."""
        value = self.values.get(name)
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int:
            raise WeightsError(f"config.json: {name} must be one whole number for both axes, not {value!r}")
        return value

    def must_be(self, name: str, allowed: Any, why: str) -> None:
        """Refuses another value."""
        value = self._of(name, object)
        if value != allowed:
            raise WeightsError(f"config.json: {name} is {value!r}; {why}")

    def choice(self, name: str, known: Mapping[str, str]) -> str:
        """What a word of theirs means here."""
        value = self._of(name, str)
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise WeightsError(f"config.json: {name} {value!r} is none of {', '.join(known)}{hint}")
        return known[value]

    def _of(self, name: str, kind: type | tuple[type, ...]) -> Any:
        if name not in self.values:
            raise WeightsError(f"config.json: {name} is missing: without it the network is not known")
        value = self.values[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            raise WeightsError(f"config.json: {name} is {value!r}, which is of the wrong type")
        return value
