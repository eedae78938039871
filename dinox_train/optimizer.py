"""The optimizer: AdamW over groups of parameters that share a learning rate and a weight decay; clipped gradients.

Each group keeps `lr_scale`, `wd_scale`, `last_layer` and the `names` of its parameters; `set_group_values` gives it the
values of an update. Invariant: with `optimizer.found_inf` = 1 a step changes nothing at all, neither
parameters nor moments nor step counts, and the host never reads the flag (torch's fused AdamW reads it on the device).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

TOKENS = ("cls_token", "register_tokens", "mask_token")
LAST_LAYER = "last_layer"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class OptimizerSettings(Protocol):
    """What `make_optimizer` needs of the configuration's `optimizer` section, which says what each means."""

    @property
    def beta1(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def layer_decay(self) -> float: ...
    @property
    def patch_embed_scale(self) -> float: ...


def make_optimizer(network: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW over the parameters of `network`, whose children are `backbone` and `head`.

    Learning rate and weight decay are 0 until `set_group_values` gives an update's.
    """
    groups = parameter_groups(network.named_parameters(), settings.layer_decay, settings.patch_embed_scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), weight_decay=0.0, fused=True)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], layer_decay: float = 1.0, patch_embed_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters of a network, named `backbone.…` and `head.…`, in groups for torch's optimizers.

    lr_scale, for L blocks: block i layer_decay^(L - i); patch embedding and tokens layer_decay^(L + 1), the patch
    embedding x patch_embed_scale besides; final norm and head 1. wd_scale: 0 for vectors (biases, norms, LayerScale)
    and for tokens, which are vectors too in all but shape; else 1. last_layer: the head's prototypes.
    Frozen parameters are left out. Raises ValueError for a name that no rule knows: a new kind of parameter needs one.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    num_blocks = 1 + max((int(found[1]) for name, _ in trained if (found := _BLOCK.search(name))), default=-1)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in trained:
        lr_scale = _lr_scale(name, num_blocks, layer_decay, patch_embed_scale)
        wd_scale = 0.0 if parameter.ndim <= 1 or name.endswith(TOKENS) else 1.0
        last_layer = name.startswith(f"head.{LAST_LAYER}.")
        group = groups.setdefault(
            (lr_scale, wd_scale, last_layer),
            {"params": [], "names": [], "lr_scale": lr_scale, "wd_scale": wd_scale, "last_layer": last_layer},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _lr_scale(name: str, num_blocks: int, layer_decay: float, patch_embed_scale: float) -> float:
    part, _, rest = name.partition(".")
    block = _BLOCK.match(rest)
    if part == "head" or (part == "backbone" and rest.startswith("norm.")):
        return 1.0
    if part == "backbone" and block:
        return layer_decay ** (num_blocks - int(block[1]))
    if part == "backbone" and rest.startswith("patch_embed."):
        return layer_decay ** (num_blocks + 1) * patch_embed_scale
    if part == "backbone" and rest in TOKENS:
        return layer_decay ** (num_blocks + 1)
    raise ValueError(f"parameter {name}: no rule says its learning rate. Add one to dinox_train/optimizer.py.")


def set_group_values(
    optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float, *, last_layer_frozen: bool = False
) -> None:
    """Give each group its share of this update's learning rate and weight decay (AdamW multiplies the two).

    last_layer_frozen: the prototypes keep their values in this update; their moments go on.
    """
    for group in optimizer.param_groups:
        frozen = last_layer_frozen and group["last_layer"]
        group["lr"] = 0.0 if frozen else learning_rate * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["wd_scale"]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together so that their norm is at most `max_norm`; the norm before, a 0-dim fp32 tensor.

    The norm is not finite where any gradient is not (nor where its square overflows fp32, from 1.8e19): such gradients
    are worthless afterwards, and the caller must mask the update. Nothing here waits for the device.
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False, foreach=True)
