"""Meta's dinov3 `DinoVisionTransformer`: a state dict (in safetensors), without a config; its shapes tell the network.

One thing the shapes do not tell: the norms' epsilon (released weights have 1e-5). The number of heads follows from the
stored periods of the rotations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.convert.format import PERIODS, Format, common_faults
from dinox_model.convert.pair import ZEROS, Pair, same_linear, same_norm
from dinox_model.positions import formula_periods
from dinox_model.tensor_files import StoredTensors, WeightsError

THEIR_PERIODS = "rope_embed.periods"
PREFIXES = ("teacher.", "backbone.")
"""Of names in a training checkpoint of theirs; the network lies in its backbone."""
HEADS = ("dino_head.", "ibot_head.", "gram_head.")
EPSILONS = {1e-5: 'norm_layer="layernormbf16"', 1e-6: 'norm_layer="layernorm"'}
"""Of the norms that their code can build, and how it is told."""


class MetaDINOv3(Format):
    name = "meta_dinov3"
    title = "Meta's dinov3 state dict"
    norm_eps = 1e-5

    def own_name(self, name: str) -> str:
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        return name

    def ignored(self, name: str) -> str | None:
        if name.startswith(HEADS):
            return "a head of training"
        if name.endswith(".attn.qkv.bias_mask"):
            return "says that keys have no bias: our k_masked"
        return None

    def config_of(self, settings: Mapping[str, Any], tensors: StoredTensors) -> ViTConfig:
        shapes = {self.own_name(name): tensors.shape(name) for name in tensors}
        needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight", THEIR_PERIODS)
        missing = [name for name in needed if name not in shapes]
        if missing:
            raise WeightsError(f"{', '.join(missing)}: missing; a network of {self.title} has them")
        width, channels, patch, _ = _dimensions(shapes["patch_embed.proj.weight"], 4, "patch_embed.proj.weight")
        (num_periods,) = _dimensions(shapes[THEIR_PERIODS], 1, THEIR_PERIODS)
        swiglu = "blocks.0.mlp.w1.weight" in shapes
        hidden = shapes.get("blocks.0.mlp.w1.weight" if swiglu else "blocks.0.mlp.fc1.weight", (0,))
        biased, masked = "blocks.0.attn.qkv.bias" in shapes, "blocks.0.attn.qkv.bias_mask" in shapes
        config = ViTConfig(
            width=width,
            num_layers=1 + max(int(found.group(1)) for name in shapes if (found := _BLOCK.match(name))),
            num_heads=width // (4 * num_periods) if num_periods else 0,
            mlp_hidden=hidden[0],
            mlp="swiglu" if swiglu else "gelu",
            qkv_bias="none" if not biased else "k_masked" if masked else "full",
            norm_eps=self.norm_eps or 1e-5,
            layer_scale=1e-5 if "blocks.0.ls1.gamma" in shapes else None,
            in_channels=channels,
            patch_size=patch,
            num_registers=shapes.get("storage_tokens", (1, 0, width))[1],
            untied_cls_norm="local_cls_norm.weight" in shapes,
            rope_stored_periods=True,
        )
        spelled = {self.own_name(name): name for name in tensors}
        stored = tensors[spelled[THEIR_PERIODS]].float()
        if torch.equal(stored, formula_periods(config.head_width, config.rope_period)):
            config = dataclasses.replace(config, rope_stored_periods=False)
        return config

    def cannot_hold(self, config: ViTConfig) -> dict[str, str]:
        faults = common_faults(config)
        if config.positions != "rope":
            faults["positions"] = f"it has axial rotary positions only, not {config.positions}"
        if config.mlp not in ("gelu", "swiglu"):
            faults["mlp"] = f"its MLPs are gelu and swiglu, not {config.mlp}"
        if config.norm_eps not in EPSILONS:
            known = ", ".join(f"{eps:g}" for eps in EPSILONS)
            faults["norm_eps"] = f"its norms have an epsilon of {known}, not {config.norm_eps:g}"
        return faults

    def pairs(self, config: ViTConfig) -> list[Pair]:
        width, patch = config.width, config.patch_size
        pairs = [
            Pair(("cls_token",), ("cls_token",), (1, 1, width)),
            Pair(("mask_token",), ("mask_token",), (1, width)),
            Pair(("patch_embed.weight",), ("patch_embed.proj.weight",), (width, config.in_channels, patch, patch)),
            Pair(("patch_embed.bias",), ("patch_embed.proj.bias",), (width,)),
            *same_norm("norm", "norm", width),
        ]
        if config.num_registers:
            pairs += [Pair(("register_tokens",), ("storage_tokens",), (1, config.num_registers, width))]
        if config.untied_cls_norm:
            pairs += same_norm("cls_norm", "local_cls_norm", width)
        if config.rope_stored_periods:
            pairs += [Pair((PERIODS,), (THEIR_PERIODS,), (config.head_width // 4,))]
        for number in range(config.num_layers):
            pairs += _block(config, f"blocks.{number}")
        return pairs

    def constants(self, config: ViTConfig) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if not config.rope_stored_periods:
            made[THEIR_PERIODS] = formula_periods(config.head_width, config.rope_period)
        if config.qkv_bias == "k_masked":
            made |= {f"blocks.{number}.attn.qkv.bias_mask": _mask(config.width) for number in range(config.num_layers)}
        return made

    def check_constants(self, config: ViTConfig, tensors: StoredTensors, spelled: Mapping[str, str]) -> list[str]:
        if config.qkv_bias != "k_masked":
            return []
        names = [f"blocks.{number}.attn.qkv.bias_mask" for number in range(config.num_layers)]
        wrong = [n for n in names if n in spelled and not torch.equal(tensors[spelled[n]].float(), _mask(config.width))]
        return [f"{name} must be 1 for queries and values and 0 for keys" for name in wrong]


_BLOCK = re.compile(r"blocks\.(\d+)\.")


def _block(config: ViTConfig, block: str) -> list[Pair]:
    width, hidden = config.width, config.mlp_hidden
    ours, theirs = f"{block}.attention", f"{block}.attn"
    pairs = [
        *same_norm(f"{block}.norm1", f"{block}.norm1", width),
        *same_norm(f"{block}.norm2", f"{block}.norm2", width),
        Pair((f"{ours}.qkv.weight",), (f"{theirs}.qkv.weight",), (3 * width, width)),
        *same_linear(f"{ours}.projection", f"{theirs}.proj", width, width),
    ]
    if config.qkv_bias == "full":
        pairs += [Pair((f"{ours}.qkv.bias",), (f"{theirs}.qkv.bias",), (3 * width,))]
    if config.qkv_bias == "k_masked":
        pairs += [Pair((f"{ours}.q_bias", ZEROS, f"{ours}.v_bias"), (f"{theirs}.qkv.bias",), (3 * width,))]
    if config.layer_scale is not None:
        pairs += [Pair((f"{block}.gamma{i}",), (f"{block}.ls{i}.gamma",), (width,)) for i in (1, 2)]
    if config.mlp == "swiglu":
        pairs += same_linear(f"{block}.mlp.gate", f"{block}.mlp.w1", hidden, width)
        pairs += same_linear(f"{block}.mlp.up", f"{block}.mlp.w2", hidden, width)
        return pairs + same_linear(f"{block}.mlp.down", f"{block}.mlp.w3", width, hidden)
    pairs += same_linear(f"{block}.mlp.up", f"{block}.mlp.fc1", hidden, width)
    return pairs + same_linear(f"{block}.mlp.down", f"{block}.mlp.fc2", width, hidden)


def _mask(width: int) -> Tensor:
    return torch.cat((torch.ones(width), torch.zeros(width), torch.ones(width)))


def _dimensions(shape: tuple[int, ...], wanted: int, name: str) -> tuple[int, ...]:
    if len(shape) != wanted:
        raise WeightsError(f"{name} is {shape}: {wanted} dimensions were expected")
    return shape
