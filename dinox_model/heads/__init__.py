"""Heads: what turns a network's features into logits, classes or pictures. Each is one config and one module.

>>> head = head_config({"kind": "linear", "out_features": 2}).build(model.config, seed=0)
>>> logits = head(model(x))

A head is no part of an exported network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dinox_model import fields
from dinox_model.heads.cross_attention import CrossAttention as CrossAttention
from dinox_model.heads.cross_attention import CrossAttentionBlock as CrossAttentionBlock
from dinox_model.heads.cross_attention import CrossAttentionDecoder as CrossAttentionDecoder
from dinox_model.heads.cross_attention import CrossAttentionDecoderConfig as CrossAttentionDecoderConfig
from dinox_model.heads.cross_attention import DecoderBlock as DecoderBlock
from dinox_model.heads.dense import TransposedConvolutionDecoder as TransposedConvolutionDecoder
from dinox_model.heads.dense import TransposedConvolutionDecoderConfig as TransposedConvolutionDecoderConfig
from dinox_model.heads.dense import UpsamplingDecoder as UpsamplingDecoder
from dinox_model.heads.dense import UpsamplingDecoderConfig as UpsamplingDecoderConfig
from dinox_model.heads.head import Head as Head
from dinox_model.heads.head import HeadConfig as HeadConfig
from dinox_model.heads.linear import LinearHead as LinearHead
from dinox_model.heads.linear import LinearHeadConfig as LinearHeadConfig
from dinox_model.heads.pooling import AttentivePoolHead as AttentivePoolHead
from dinox_model.heads.pooling import AttentivePoolHeadConfig as AttentivePoolHeadConfig
from dinox_model.heads.prototype import PrototypeHead as PrototypeHead
from dinox_model.heads.prototype import PrototypeHeadConfig as PrototypeHeadConfig

_KINDS: tuple[type[HeadConfig], ...] = (
    PrototypeHeadConfig,
    LinearHeadConfig,
    AttentivePoolHeadConfig,
    TransposedConvolutionDecoderConfig,
    UpsamplingDecoderConfig,
    CrossAttentionDecoderConfig,
)
HEAD_CONFIGS: dict[str, type[HeadConfig]] = {config.kind: config for config in _KINDS}
"""By the name that `kind` takes in a configuration."""


def head_config(values: Mapping[str, Any]) -> HeadConfig:
    """The head's config from JSON or YAML values: `kind`, and the fields of that kind; the inverse of `to_dict`.

    Raises ValueError for an unknown kind or key (naming the nearest), a missing one, or a value that does not fit.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("kind"), str):
        raise ValueError(f"a head needs kind, one of {', '.join(HEAD_CONFIGS)}, and its fields; it is {values!r}")
    kind = values["kind"]
    if kind not in HEAD_CONFIGS:
        raise ValueError(f"unknown kind of head {kind!r}{fields.nearest(kind, HEAD_CONFIGS)}")
    return fields.from_mapping(HEAD_CONFIGS[kind], {name: value for name, value in values.items() if name != "kind"})
