"""Hugging Face's `DINOv3ViTModel`, as transformers writes it to disk (`layer.i.*`); `model.layer.i.*` is read too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.convert.format import PERIODS, Format, Settings, common_faults
from dinox_model.convert.pair import Pair, same_linear, same_norm
from dinox_model.tensor_files import StoredTensors, WeightsError

ACTIVATIONS = {"gelu": (False, "gelu"), "relu2": (False, "relu2"), "swiglu": (True, "silu"), "geglu": (True, "gelu")}
"""Our MLP: use_gated_mlp and hidden_act."""
BIASES = {"none": (False, False, False), "full": (True, True, True), "k_masked": (True, False, True)}
"""Our qkv_bias: query_bias, key_bias, value_bias."""


class HuggingFaceDINOv3(Format):
    name = "hf_dinov3"
    title = "Hugging Face DINOv3ViTModel"
    model_type = "dinov3_vit"

    def config_of(self, settings: Mapping[str, Any], tensors: StoredTensors) -> ViTConfig:
        of = Settings(settings)
        for name in ("mlp_bias", "proj_bias"):
            of.must_be(name, True, "linears of our MLP and projection have biases")
        mlp = {value: key for key, value in ACTIVATIONS.items()}.get(
            (of.flag("use_gated_mlp"), of.choice("hidden_act", {"gelu": "gelu", "silu": "silu", "relu2": "relu2"}))
        )
        bias = {value: key for key, value in BIASES.items()}.get(
            (of.flag("query_bias"), of.flag("key_bias"), of.flag("value_bias"))
        )
        if mlp is None or bias is None:
            what = "use_gated_mlp with hidden_act" if mlp is None else "query_bias, key_bias, value_bias"
            raise WeightsError(f"config.json: {what} is a combination that our networks do not have")
        values = {
            "width": of.integer("hidden_size"),
            "num_layers": of.integer("num_hidden_layers"),
            "num_heads": of.integer("num_attention_heads"),
            "mlp_hidden": of.integer("intermediate_size"),
            "mlp": mlp,
            "qkv_bias": bias,
            "norm_eps": of.number("layer_norm_eps"),
            "layer_scale": of.number("layerscale_value"),
            "drop_path": of.number("drop_path_rate"),
            "in_channels": of.integer("num_channels"),
            "patch_size": of.side("patch_size"),
            "num_registers": of.integer("num_register_tokens"),
            "rope_period": of.number("rope_theta"),
            "rope_shift": _drawn(settings, "pos_embed_shift", off=0.0),
            "rope_jitter": _drawn(settings, "pos_embed_jitter", off=1.0),
            "rope_rescale": _drawn(settings, "pos_embed_rescale", off=1.0),
        }
        return ViTConfig.from_dict(values)

    def settings_of(self, config: ViTConfig) -> dict[str, Any]:
        gated, activation = ACTIVATIONS[config.mlp]
        query, key, value = BIASES[config.qkv_bias]
        return {
            "architectures": ["DINOv3ViTModel"],
            "model_type": self.model_type,
            "dtype": "float32",
            "hidden_size": config.width,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": config.mlp_hidden,
            "use_gated_mlp": gated,
            "hidden_act": activation,
            "query_bias": query,
            "key_bias": key,
            "value_bias": value,
            "proj_bias": True,
            "mlp_bias": True,
            "layer_norm_eps": config.norm_eps,
            "layerscale_value": 1.0 if config.layer_scale is None else config.layer_scale,
            "drop_path_rate": config.drop_path,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "num_channels": config.in_channels,
            "patch_size": config.patch_size,
            "image_size": 14 * config.patch_size,
            "num_register_tokens": config.num_registers,
            "rope_theta": config.rope_period,
            "pos_embed_shift": config.rope_shift,
            "pos_embed_jitter": config.rope_jitter,
            "pos_embed_rescale": config.rope_rescale,
        }

    def cannot_hold(self, config: ViTConfig) -> dict[str, str]:
        faults = common_faults(config)
        if config.positions != "rope":
            faults["positions"] = f"it has axial rotary positions only, not {config.positions}"
        if config.untied_cls_norm:
            faults["cls_norm"] = "it has one final norm; that of local crops serves training only"
        if config.rope_stored_periods:
            faults[PERIODS] = "it computes periods by the formula, and these are others"
        return faults

    def own_name(self, name: str) -> str:
        return name.removeprefix("model.") if name.startswith("model.layer.") else name

    def pairs(self, config: ViTConfig) -> list[Pair]:
        width, patch = config.width, config.patch_size
        shapes = {"cls_token": (1, 1, width), "mask_token": (1, 1, width)}
        if config.num_registers:
            shapes["register_tokens"] = (1, config.num_registers, width)
        pairs = [Pair((name,), (f"embeddings.{name}",), shape) for name, shape in shapes.items()]
        their_patches, shape = "embeddings.patch_embeddings", (width, config.in_channels, patch, patch)
        pairs += [
            Pair(("patch_embed.weight",), (f"{their_patches}.weight",), shape),
            Pair(("patch_embed.bias",), (f"{their_patches}.bias",), (width,)),
        ]
        for number in range(config.num_layers):
            pairs += _block(config, f"blocks.{number}", f"layer.{number}")
        return pairs + same_norm("norm", "norm", width)

    def constants(self, config: ViTConfig) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if not config.num_registers:
            made["embeddings.register_tokens"] = torch.empty(1, 0, config.width)
        if config.layer_scale is None:
            names = [f"layer.{number}.layer_scale{i}.lambda1" for number in range(config.num_layers) for i in (1, 2)]
            made |= {name: torch.ones(config.width) for name in names}
        return made


def _block(config: ViTConfig, ours: str, theirs: str) -> list[Pair]:
    width, hidden = config.width, config.mlp_hidden
    attention = [f"{theirs}.attention.{part}_proj" for part in "qkv"]
    pairs = [
        *same_norm(f"{ours}.norm1", f"{theirs}.norm1", width),
        *same_norm(f"{ours}.norm2", f"{theirs}.norm2", width),
        Pair((f"{ours}.attention.qkv.weight",), tuple(f"{name}.weight" for name in attention), (width, width)),
        *same_linear(f"{ours}.attention.projection", f"{theirs}.attention.o_proj", width, width),
        *same_linear(f"{ours}.mlp.up", f"{theirs}.mlp.up_proj", hidden, width),
        *same_linear(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", width, hidden),
    ]
    if ACTIVATIONS[config.mlp][0]:
        pairs += same_linear(f"{ours}.mlp.gate", f"{theirs}.mlp.gate_proj", hidden, width)
    if config.qkv_bias == "full":
        pairs += [Pair((f"{ours}.attention.qkv.bias",), tuple(f"{name}.bias" for name in attention), (width,))]
    if config.qkv_bias == "k_masked":
        for part, name in (("q", attention[0]), ("v", attention[2])):
            pairs += [Pair((f"{ours}.attention.{part}_bias",), (f"{name}.bias",), (width,))]
    if config.layer_scale is not None:
        pairs += [Pair((f"{ours}.gamma{i}",), (f"{theirs}.layer_scale{i}.lambda1",), (width,)) for i in (1, 2)]
    return pairs


def _drawn(settings: Mapping[str, Any], name: str, off: float) -> float | None:
    """A range that training draws from; None where it is absent, or where it has one value only."""
    value = settings.get(name)
    return None if value is None or value == off else Settings(settings).number(name)
