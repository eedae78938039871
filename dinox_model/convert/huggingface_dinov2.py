"""Hugging Face's `Dinov2WithRegistersModel`, as transformers writes it to disk: learned positions, patches of 14."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.convert.format import Format, Settings, common_faults
from dinox_model.convert.pair import Pair, same_linear, same_norm
from dinox_model.tensor_files import StoredTensors, WeightsError

RATIOS = range(1, 65)
"""Whole MLP ratios that are tried: their config has no other measure of the MLP."""


class HuggingFaceDinov2(Format):
    name = "hf_dinov2"
    title = "Hugging Face Dinov2WithRegistersModel"
    model_type = "dinov2_with_registers"

    def config_of(self, settings: Mapping[str, Any], tensors: StoredTensors) -> ViTConfig:
        of = Settings(settings)
        swiglu, width, patch = of.flag("use_swiglu_ffn"), of.integer("hidden_size"), of.side("patch_size")
        activation = of.choice("hidden_act", {"gelu": "gelu", "relu2": "relu2"})
        rows, rest = divmod(of.side("image_size"), patch)
        if rest:
            raise WeightsError("config.json: image_size must be a multiple of patch_size")
        values = {
            "width": width,
            "num_layers": of.integer("num_hidden_layers"),
            "num_heads": of.integer("num_attention_heads"),
            "mlp_hidden": _hidden(width, of.integer("mlp_ratio"), swiglu),
            "mlp": "swiglu" if swiglu else activation,
            "qkv_bias": "full" if of.flag("qkv_bias") else "none",
            "norm_eps": of.number("layer_norm_eps"),
            "layer_scale": of.number("layerscale_value"),
            "drop_path": of.number("drop_path_rate"),
            "in_channels": of.integer("num_channels"),
            "patch_size": patch,
            "num_registers": of.integer("num_register_tokens"),
            "positions": "learned",
            "learned_grid": (rows, rows),
        }
        return ViTConfig.from_dict(values)

    def settings_of(self, config: ViTConfig) -> dict[str, Any]:
        assert config.learned_grid is not None
        return {
            "architectures": ["Dinov2WithRegistersModel"],
            "model_type": self.model_type,
            "dtype": "float32",
            "hidden_size": config.width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "mlp_ratio": _ratio(config),
            "use_swiglu_ffn": config.mlp == "swiglu",
            "hidden_act": "gelu" if config.mlp == "swiglu" else config.mlp,
            "qkv_bias": config.qkv_bias == "full",
            "layer_norm_eps": config.norm_eps,
            "layerscale_value": config.layer_scale,
            "drop_path_rate": config.drop_path,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "initializer_range": 0.02,
            "num_channels": config.in_channels,
            "patch_size": config.patch_size,
            "image_size": config.learned_grid[0] * config.patch_size,
            "num_register_tokens": config.num_registers,
        }

    def cannot_hold(self, config: ViTConfig) -> dict[str, str]:
        faults = common_faults(config)
        grid = config.learned_grid
        if grid is None:
            faults["positions"] = f"it has learned positions only, not {config.positions}"
        elif grid[0] != grid[1]:
            faults["learned_grid"] = f"its positions are of a square grid, not {grid[0]} x {grid[1]}"
        if config.untied_cls_norm:
            faults["cls_norm"] = "it has one final norm; that of local crops serves training only"
        if config.qkv_bias == "k_masked":
            faults["qkv_bias"] = "its queries, keys and values all have biases, or none has"
        if config.layer_scale is None:
            faults["layer_scale"] = "it has LayerScale always"
        if config.mlp == "geglu":
            faults["mlp"] = "its gated MLP is SwiGLU"
        elif _ratio(config) is None:
            faults["mlp_hidden"] = "its MLP is a whole multiple of the width (for SwiGLU, two thirds of one)"
        return faults

    def constants(self, config: ViTConfig) -> dict[str, Tensor]:
        return {} if config.num_registers else {"embeddings.register_tokens": torch.empty(1, 0, config.width)}

    def pairs(self, config: ViTConfig) -> list[Pair]:
        width, patch = config.width, config.patch_size
        rows, columns = config.learned_grid or (0, 0)
        shapes = {"cls_token": (1, 1, width), "mask_token": (1, width)}
        if config.num_registers:
            shapes["register_tokens"] = (1, config.num_registers, width)
        their_patches, shape = "embeddings.patch_embeddings.projection", (width, config.in_channels, patch, patch)
        pairs = [
            *(Pair((name,), (f"embeddings.{name}",), shape) for name, shape in shapes.items()),
            Pair(("positions.embedding",), ("embeddings.position_embeddings",), (1, 1 + rows * columns, width)),
            Pair(("patch_embed.weight",), (f"{their_patches}.weight",), shape),
            Pair(("patch_embed.bias",), (f"{their_patches}.bias",), (width,)),
        ]
        for number in range(config.num_layers):
            pairs += _block(config, f"blocks.{number}", f"encoder.layer.{number}")
        return pairs + same_norm("norm", "layernorm", width)


def _block(config: ViTConfig, ours: str, theirs: str) -> list[Pair]:
    width, hidden = config.width, config.mlp_hidden
    attention = [f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value")]
    pairs = [
        *same_norm(f"{ours}.norm1", f"{theirs}.norm1", width),
        *same_norm(f"{ours}.norm2", f"{theirs}.norm2", width),
        Pair((f"{ours}.attention.qkv.weight",), tuple(f"{name}.weight" for name in attention), (width, width)),
        *same_linear(f"{ours}.attention.projection", f"{theirs}.attention.output.dense", width, width),
        *(Pair((f"{ours}.gamma{i}",), (f"{theirs}.layer_scale{i}.lambda1",), (width,)) for i in (1, 2)),
    ]
    if config.qkv_bias == "full":
        pairs += [Pair((f"{ours}.attention.qkv.bias",), tuple(f"{name}.bias" for name in attention), (width,))]
    if config.mlp == "swiglu":
        gate_and_up = (f"{ours}.mlp.gate", f"{ours}.mlp.up")
        for part, shape in (("weight", (2 * hidden, width)), ("bias", (2 * hidden,))):
            joined = tuple(f"{name}.{part}" for name in gate_and_up)
            pairs += [Pair(joined, (f"{theirs}.mlp.weights_in.{part}",), shape)]
        return pairs + same_linear(f"{ours}.mlp.down", f"{theirs}.mlp.weights_out", width, hidden)
    pairs += same_linear(f"{ours}.mlp.up", f"{theirs}.mlp.fc1", hidden, width)
    return pairs + same_linear(f"{ours}.mlp.down", f"{theirs}.mlp.fc2", width, hidden)


def _hidden(width: int, ratio: int, swiglu: bool) -> int:
    """Features of the MLP; for SwiGLU two thirds of them, up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8 if swiglu else width * ratio


def _ratio(config: ViTConfig) -> int | None:
    """Their whole ratio that gives this MLP; None where none does."""
    fits = (ratio for ratio in RATIOS if _hidden(config.width, ratio, config.mlp == "swiglu") == config.mlp_hidden)
    return next(fits, None)
