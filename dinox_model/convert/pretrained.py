"""`load_pretrained`: a network of ours from weights that others wrote, and a report of what became of each tensor.

Invariant: every number of the network comes from the files, or is named in the report.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.convert.channels import adapt_channels
from dinox_model.convert.format import Format
from dinox_model.convert.report import Report
from dinox_model.convert.source import Source, find_source
from dinox_model.tensor_files import StoredTensors, WeightsError
from dinox_model.vit import VisionTransformer, build
from dinox_model.weights import PREPROCESS, empty_network, load, read_preprocess


def load_pretrained(
    path: str | Path,
    *,
    format: str | None = None,
    in_channels: int | None = None,
    norm_eps: float | None = None,
    allow: Sequence[str] = (),
) -> tuple[VisionTransformer, Report]:
    """The network at `path`, on the CPU, fp32, in evaluation mode, and what became of each tensor.

    Args:
        path: a folder (ours, Hugging Face's), or a safetensors file of Meta's names.
        format: `dinox`, `hf_dinov3`, `hf_dinov2`, `meta_dinov3` or `meddinov3`; None: the files tell.
        in_channels: slices in a window; None keeps the source's. Another number adapts the patch embedding
            (`adapt_channels`).
        norm_eps: epsilon of the norms, for files that do not say it; None: that of the format's released weights.
        allow: names of tensors, theirs or ours, that may be missing or unknown; `*` stands for any characters. What is
            missing keeps its first values (seed 0), what is unknown is left out.

    Raises:
        WeightsError: says what is wrong: files that are missing, damaged, pickled or of no known format, a network that
            ours cannot be, or a list of all tensors that are missing, unknown, or of another shape.
    """
    source = find_source(Path(path), format)
    if source.format is None:
        return _load_ours(source, in_channels, norm_eps, allow)
    tensors = StoredTensors(source.files)
    config, notes = _config(source, tensors, norm_eps)
    return _Reading(source, source.format, tensors, config, allow).network(in_channels, notes)


def _load_ours(
    source: Source, in_channels: int | None, norm_eps: float | None, allow: Sequence[str]
) -> tuple[VisionTransformer, Report]:
    if norm_eps is not None or allow:
        raise WeightsError(f"{source.path}: a folder of dinox_model says its norm_eps and lacks nothing; give neither")
    model = load(source.path)
    matched = list(model.state_dict())
    model, adapted = _with_channels(model, in_channels)
    report = Report(
        source=str(source.path),
        format="a network of dinox_model",
        matched=tuple(name for name in matched if name not in adapted),
        adapted=adapted,
    )
    return model, report


def _config(source: Source, tensors: StoredTensors, norm_eps: float | None) -> tuple[ViTConfig, list[str]]:
    assert source.format is not None
    try:
        config = source.format.config_of(source.settings, tensors)
    except ValueError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    if source.format.norm_eps is None:
        if norm_eps is not None:
            raise WeightsError(
                f"{source.path}: norm_eps is {config.norm_eps:g} by its config.json; do not give another"
            )
        return config, []
    if norm_eps is not None:
        return dataclasses.replace(config, norm_eps=norm_eps), [f"norm_eps is {norm_eps:g}, as was given"]
    return config, [f"norm_eps is {config.norm_eps:g}, that of the released weights: the file does not say"]


def _with_channels(model: VisionTransformer, wanted: int | None) -> tuple[VisionTransformer, dict[str, str]]:
    old = model.config.in_channels
    if wanted is None or wanted == old:
        return model, {}
    weights = model.state_dict()
    weights["patch_embed.weight"] = adapt_channels(weights["patch_embed.weight"], old, wanted)
    wider = empty_network(dataclasses.replace(model.config, in_channels=wanted))
    wider.load_state_dict(weights)
    wider.preprocess = dataclasses.replace(model.preprocess, depth=None)
    return wider.eval(), {"patch_embed.weight": f"{old} channels to {wanted} slices"}


def _on_cpu(config: ViTConfig) -> VisionTransformer:
    with torch.device("cpu"):
        return build(config)


class _Reading:
    """One network that is being read."""

    def __init__(
        self, source: Source, format: Format, tensors: StoredTensors, config: ViTConfig, allow: Sequence[str]
    ) -> None:
        self.source, self.format, self.tensors, self.config, self.allow = source, format, tensors, config, allow
        self.spelled = {format.own_name(name): name for name in tensors}
        if len(self.spelled) != len(tensors):
            raise WeightsError(f"{source.path}: some tensors stand in it under two spellings of one name")
        self.pairs = format.pairs(config)

    def network(self, in_channels: int | None, notes: list[str]) -> tuple[VisionTransformer, Report]:
        """The network and the report. Raises WeightsError that lists all that does not fit."""
        with torch.device("meta"):
            first = build(self.config).state_dict()
        ignored, faults = self._left_over()
        missing = self._missing(first, faults)
        self._check_shapes(faults)
        faults += self.format.check_constants(self.config, self.tensors, self.spelled)
        if faults:
            raise WeightsError(
                f"{self.source.path} does not hold the network of its {self.format.title}: " + "; ".join(faults)
            )
        model = _on_cpu(self.config) if missing else empty_network(self.config)
        matched, renamed = self._fill(model, first, missing)
        model.preprocess, said = self._preprocess()
        model, adapted = _with_channels(model, in_channels)
        report = Report(
            source=str(self.source.path),
            format=self.format.title,
            matched=tuple(name for name in matched if name not in adapted),
            renamed={name: theirs for name, theirs in renamed.items() if name not in adapted},
            adapted=adapted,
            missing=missing,
            ignored=ignored,
            notes=(*notes, *said, *self._widened()),
        )
        return model.eval(), report

    def _left_over(self) -> tuple[dict[str, str], list[str]]:
        """Theirs that no pair takes: those that are ignored with the reason, and faults."""
        taken = {name for pair in self.pairs for name in pair.theirs}
        ignored: dict[str, str] = {}
        faults: list[str] = []
        for own, name in self.spelled.items():
            if own in taken:
                continue
            reason = self.format.ignored(own)
            if reason is None and own in self.format.constants(self.config):
                reason = "a function of the network's shape"
            if reason is None and math.prod(self.tensors.shape(name)) == 0:
                reason = "holds no numbers"
            if reason is None and self._is_allowed((own, name)):
                reason = "unknown, and allowed to be"
            if reason is None:
                faults.append(f"unknown {name}")
            else:
                ignored[name] = reason
        return ignored, faults

    def _missing(self, first: Mapping[str, Tensor], faults: list[str]) -> dict[str, str]:
        """Ours that cannot be made and need not be; adds to `faults` what is missing otherwise."""
        missing: dict[str, str] = {}
        for pair in self.pairs:
            lacking = [name for name in pair.theirs if name not in self.spelled]
            if lacking and all(self._is_allowed((*pair.names, name)) for name in lacking):
                missing |= dict.fromkeys(pair.names, f"{', '.join(lacking)} is not there; first values of seed 0")
            else:
                faults += [f"missing {name} (our {', '.join(pair.names)})" for name in lacking]
        covered = {name for pair in self.pairs for name in pair.names}
        strangers = [name for name, tensor in first.items() if name not in covered and tensor.numel()]
        assert not strangers, f"no pair of {self.format.name} makes {strangers}"
        return missing

    def _check_shapes(self, faults: list[str]) -> None:
        for pair in self.pairs:
            for own in pair.theirs:
                name = self.spelled.get(own)
                if name is not None and self.tensors.shape(name) != pair.shape:
                    faults.append(f"{name} is {self.tensors.shape(name)}, not {pair.shape}")
                if name is not None and not self.tensors.dtype(name).is_floating_point:
                    faults.append(f"{name} is {self.tensors.dtype(name)}, not floating point")

    def _fill(
        self, model: VisionTransformer, first: Mapping[str, Tensor], missing: Mapping[str, Any]
    ) -> tuple[list[str], dict[str, tuple[str, ...]]]:
        matched: list[str] = []
        renamed: dict[str, tuple[str, ...]] = {}
        for pair in self.pairs:
            if any(name in missing for name in pair.names):
                continue
            theirs = {own: self.tensors[self.spelled[own]] for own in pair.theirs}
            made = pair.read(theirs, {name: tuple(first[name].shape) for name in pair.names})
            model.load_state_dict(made, strict=False)
            for name in pair.names:
                if pair.theirs == (name,) and pair.shape == tuple(first[name].shape) and self.spelled[name] == name:
                    matched.append(name)
                else:
                    renamed[name] = tuple(self.spelled[own] for own in pair.theirs)
        return matched, renamed

    def _preprocess(self) -> tuple[Any, list[str]]:
        file = self.source.path / PREPROCESS
        if self.source.path.is_dir() and file.is_file():
            return read_preprocess(file, self.config.in_channels), []
        preprocess = self.format.preprocess()
        numbers = f"mean {preprocess.mean:g}, std {preprocess.std:g}"
        return preprocess, [f"no {PREPROCESS} beside the weights: {numbers} (ImageNet's, averaged over colours)"]

    def _widened(self) -> list[str]:
        dtypes = [self.tensors.dtype(name) for name in self.tensors]
        return [
            f"{dtypes.count(dtype)} tensors were {dtype}, and are float32 now"
            for dtype in sorted(set(dtypes), key=str)
            if dtype.is_floating_point and dtype != torch.float32
        ]

    def _is_allowed(self, names: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.allow)
