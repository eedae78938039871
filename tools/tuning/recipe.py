"""How a network is fine-tuned: which parameters learn, at which rates, and for how long.

    full    every parameter; the learning rate falls from block to block towards the input (layer-wise decay)
    lora    adapters of rank r on every linear of the blocks (peft; Hu et al., arXiv 2106.09685), the rest frozen

The head is one linear on the frozen probe's feature, and begins as that probe (Kumar et al., arXiv 2202.10054: a head
that begins anywhere else distorts the features before it fits them). So after no step the scores are the probe's.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from probing.logistic import LogisticProbe
from torch import Tensor, nn

from dinox_model import VisionTransformer, ViTFeatures
from dinox_train.optimizer import parameter_groups

METHODS = ("lora", "full")
TARGETS = ("qkv", "projection", "gate", "up", "down")
"""Names of the linears of a block (docs/lora.md)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of a fine-tuning; the defaults are for some hundred windows and one or two minutes on two cores."""

    method: str
    steps: int = 40
    batch_size: int = 8
    learning_rate: float
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    """Of `full`: each block learns at this times the rate of the next."""
    rank: int = 8
    """Of `lora`; alpha is twice as much."""
    warmup_share: float = 0.1
    clip_norm: float = 1.0

    def json(self) -> dict[str, Any]:
        """What was in use."""
        left_out = {"rank"} if self.method == "full" else {"layer_decay"}
        return {name: value for name, value in vars(self).items() if name not in left_out}


class Tuned(nn.Module):
    """A network with a head of one logit."""

    def __init__(self, backbone: nn.Module, model: VisionTransformer, head: nn.Linear) -> None:
        """backbone: `model`, or what wraps it."""
        super().__init__()
        self.backbone, self.head = backbone, head
        self._preprocess, self._config = model.preprocess, model.config

    def forward(self, hu: Tensor, spacing_mm: Tensor, shares: Tensor | None) -> Tensor:
        """(b,): log-odds. hu: int16 (b, k, y, x); spacing_mm: float32 (b, 3); shares: see `feature`."""
        return self.head(self.feature(hu, spacing_mm, shares)).squeeze(1)

    def feature(self, hu: Tensor, spacing_mm: Tensor, shares: Tensor | None) -> Tensor:
        """(b, d): CLS (or the mean patch); where there are shares (b, n), which sum to 1, patches weighed by them."""
        x = self._preprocess.apply(hu, self._config.patch_size)
        mm_per_pixel = spacing_mm[:, 1:] if self._config.uses_mm_per_pixel else None
        features: ViTFeatures = self.backbone(x, mm_per_pixel=mm_per_pixel)
        return features.pooled if shares is None else torch.einsum("bn,bnd->bd", shares, features.patches)


def tuned(model: VisionTransformer, probe: LogisticProbe | None, recipe: Recipe) -> Tuned:
    """`model` itself, made ready to learn. probe: where the head begins; None: at zero.

    Raises ImportError for `lora` without peft.
    """
    head = nn.Linear(model.config.width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if probe is not None:
        weights = probe.coefficients / probe.std
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weights)[None])
            head.bias.fill_(float(probe.intercept - weights @ probe.mean))
    if recipe.method == "full":
        return Tuned(model, model, head)
    peft = importlib.import_module("peft")
    names = {name.rpartition(".")[2] for name, one in model.blocks.named_modules() if isinstance(one, nn.Linear)}
    targets = [name for name in TARGETS if name in names]
    config = peft.LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=targets)
    return Tuned(peft.get_peft_model(model, config), model, head)


def optimizer_of(network: Tuned, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over groups with an `lr_scale` and a `wd_scale` each."""
    if recipe.method == "full":
        named = [(f"backbone.{name}", one) for name, one in network.backbone.named_parameters()]
        named += [(f"heads.task.{name}", one) for name, one in network.head.named_parameters()]
        groups = parameter_groups(named, recipe.layer_decay)
    else:
        learning = [one for one in network.parameters() if one.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [one for one in learning if one.ndim > 1], "lr_scale": 1.0, "wd_scale": 1.0, "backbone": False},
            {"params": [one for one in learning if one.ndim < 2], "lr_scale": 1.0, "wd_scale": 0.0, "backbone": False},
        ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
