"""The optimizer: AdamW over groups of parameters that share a learning rate and a weight decay; clipped gradients.

Each group keeps what `RULES` say of its parameters, and their `names`; `set_group_values` gives it the values of an
update. Invariant: with `optimizer.found_inf` = 1 a step changes nothing at all, neither parameters nor moments nor step
counts, and the host never reads the flag (torch's fused AdamW reads it on the device).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dinox_train.ranks import AllReduce

Named = Iterable[tuple[str, nn.Parameter]]
"""A network's parameters by name: `backbone.…`, `heads.NAME.…`."""


@dataclass(frozen=True)
class Rule:
    """What holds for the parameters whose whole name fits `pattern`."""

    pattern: str
    depth: Literal["input", "block", "top"]
    """Where in the network: before the blocks, in the block whose number the pattern's first group is, after them."""
    decays: bool
    """Whether its matrices have weight decay. Vectors never have: biases, norms, LayerScale."""
    kind: Literal["", "patch_embed", "prototypes"] = ""


# The first that fits. Tokens, queries and positions are vectors too, in all but shape.
RULES = (
    Rule(r"backbone\.patch_embed\..+", "input", True, "patch_embed"),
    Rule(r"backbone\.(cls_token|register_tokens|mask_token)", "input", False),
    Rule(r"backbone\.positions\..+", "input", False),
    Rule(r"backbone\.scale\..+", "input", True),
    Rule(r"backbone\.blocks\.(\d+)\..+", "block", True),
    Rule(r"backbone\.(norm|cls_norm)\..+", "top", False),
    Rule(r"heads\.\w+\.last_layer\..+", "top", True, "prototypes"),
    Rule(r"heads\.(.+[._])?(tokens?|queries|embedding)", "top", False),
    Rule(r"heads\..+", "top", True),
)


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


class Clipped(NamedTuple):
    """0-dim fp32 tensors on the device."""

    norm: Tensor
    """Of the whole gradient, before it was clipped. Not finite where any gradient is not."""
    clipped: Tensor
    """1.0 where the gradient, or a part of it, was longer than allowed, else 0.0."""


@runtime_checkable
class UpdatesInOnePass(Protocol):
    """An optimizer that also averages the teacher and rounds the copies (dinox_train/kernels/adamw_average.py)."""

    def clip(self, max_norm: float, *, by_part: bool) -> Clipped: ...
    def update(self, momentum: float, applied: Tensor) -> None: ...


def make_optimizer(named_parameters: Named, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Fused AdamW over fp32 parameters (`MasterWeights.named`).

    Learning rate and weight decay are 0 until `set_group_values` gives an update's.
    """
    groups = parameter_groups(named_parameters, settings.layer_decay, settings.patch_embed_scale)
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), weight_decay=0.0, fused=True)


def parameter_groups(
    named_parameters: Named, layer_decay: float = 1.0, patch_embed_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameters of a network in groups for torch's optimizers, each in exactly one.

    lr_scale, for L blocks: block i layer_decay^(L - i); before the blocks layer_decay^(L + 1), the patch embedding x
    patch_embed_scale besides; after them 1 (DINOv3's). wd_scale: 1 for what `RULES` say decays, else 0. prototypes: a
    head's last layer. backbone: all of the backbone but its patch embedding. Frozen parameters are left out.
    Raises ValueError for a name that no rule knows: a new kind of parameter needs one.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    found = [(name, parameter, *_rule(name)) for name, parameter in trained]
    num_blocks = 1 + max((block for *_, block in found if block is not None), default=-1)
    groups: dict[tuple[float, float, bool, bool], dict[str, Any]] = {}
    for name, parameter, rule, block in found:
        lr_scale = _lr_scale(rule, num_blocks, block, layer_decay, patch_embed_scale)
        wd_scale = float(rule.decays and parameter.ndim > 1)
        prototypes = rule.kind == "prototypes"
        backbone = name.startswith("backbone.") and rule.kind != "patch_embed"
        group = groups.setdefault(
            (lr_scale, wd_scale, prototypes, backbone),
            {
                "params": [],
                "names": [],
                "lr_scale": lr_scale,
                "wd_scale": wd_scale,
                "prototypes": prototypes,
                "backbone": backbone,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _rule(name: str) -> tuple[Rule, int | None]:
    """The rule of a parameter, and the number of its block."""
    for rule in RULES:
        if match := re.fullmatch(rule.pattern, name):
            return rule, int(match[1]) if rule.depth == "block" else None
    raise ValueError(f"parameter {name}: no rule says its learning rate. Add one to RULES of dinox_train/optimizer.py.")


def _lr_scale(rule: Rule, num_blocks: int, block: int | None, layer_decay: float, patch_embed_scale: float) -> float:
    if rule.depth == "top":
        return 1.0
    depth = num_blocks + 1 if block is None else num_blocks - block
    return layer_decay**depth * (patch_embed_scale if rule.kind == "patch_embed" else 1.0)


def set_group_values(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    weight_decay: float,
    *,
    last_layer_frozen: bool = False,
    backbone_scale: float = 1.0,
) -> None:
    """Give each group its share of this update's learning rate and weight decay (AdamW multiplies the two).

    last_layer_frozen: the prototypes keep their values in this update. backbone_scale: further factor on the backbone's
    learning rate, but not on its patch embedding's; 0 keeps it as it is. What is kept has moments that go on.
    """
    for group in optimizer.param_groups:
        scale = group["lr_scale"] * (backbone_scale if group["backbone"] else 1.0)
        group["lr"] = 0.0 if last_layer_frozen and group["prototypes"] else learning_rate * scale
        group["weight_decay"] = weight_decay * group["wd_scale"]


def clip_gradients(
    named_parameters: Named, max_norm: float, *, by_part: bool, all_reduce: AllReduce | None = None
) -> Clipped:
    """Scale gradients so that their norm is at most `max_norm`.

    by_part: the backbone and each head for itself, as DINOv3 does, so that the large gradients of fresh heads do not
    shorten the backbone's; else all together. all_reduce: where each rank has rows of its own (fsdp) of the gradients,
    adds up over the ranks; all of them find one norm. The norm is not finite where any gradient is not (nor where
    its square overflows fp32, from 1.8e19): such gradients are worthless afterwards, and the caller must mask the
    update. Nothing here waits for the device.
    """
    parts = gradient_parts(named_parameters, by_part=by_part)
    norms = torch.stack([_norm(parameters) for parameters in parts.values()])
    if all_reduce is not None:
        norms = all_reduce(norms.square(), "sum").sqrt()
    for parameters, norm in zip(parts.values(), norms.unbind(), strict=True):
        if not _short_enough(norm, max_norm):
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return Clipped(torch.linalg.vector_norm(norms), (norms > max_norm).any().float())


def gradient_parts(named_parameters: Named, *, by_part: bool) -> dict[str, list[nn.Parameter]]:
    """Parameters that have a gradient, by what is clipped together: `backbone` and `heads.NAME`, or all under ""."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.grad is not None:  # a head whose term is off has none
            parts.setdefault(_part(name) if by_part else "", []).append(parameter)
    return parts


def gradient_part_names(named_parameters: Named) -> list[str]:
    """The part of each parameter."""
    return [_part(name) for name, _ in named_parameters]


def _part(name: str) -> str:
    """`backbone`, or `heads.NAME`."""
    return "backbone" if name.startswith("backbone.") else ".".join(name.split(".")[:2])


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _short_enough(norm: Tensor, max_norm: float) -> bool:
    """Whether scaling is known to be a multiplication by 1: on the CPU, whose memory the host may read. A GPU would
    have to be waited for, and multiplies. The 1e-6 is that of torch's divisor.
    """
    return norm.device.type == "cpu" and bool(norm + 1e-6 <= max_norm)
