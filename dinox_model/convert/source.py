"""Where weights lie: files found, format known, and what would have to be unpickled refused.

FOLDER/config.json + *.safetensors   ours, or Hugging Face's by its model_type
FOLDER/*.safetensors, FILE.safetensors   no config: Meta's names
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinox_model.config import nearest
from dinox_model.convert.format import Format
from dinox_model.convert.huggingface_dinov2 import HuggingFaceDinov2
from dinox_model.convert.huggingface_dinov3 import HuggingFaceDINOv3
from dinox_model.convert.meddinov3 import MedDINOv3
from dinox_model.convert.meta_dinov3 import MetaDINOv3
from dinox_model.tensor_files import StoredTensors, WeightsError
from dinox_model.weights import CONFIG, FORMAT, WEIGHTS, read_json

FORMATS: dict[str, Format] = {
    each.name: each for each in (HuggingFaceDINOv3(), HuggingFaceDinov2(), MetaDINOv3(), MedDINOv3())
}
OURS = "dinox"
"""The name of our own format, beside `FORMATS`."""
INDEX = f"{WEIGHTS}.index.json"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
UNPICKLE = """\
python -c "import sys, torch; from safetensors.torch import save_file; d = torch.load(sys.argv[1], weights_only=True, \
map_location='cpu'); d = d.get('teacher', d); save_file({{k: v.clone() for k, v in d.items()}}, sys.argv[2])" \
{source} {target}"""
NO_BIAS_WIDTH = 4096
"""Of the only released network of Meta's without biases in attention's first linear, the 7B."""


@dataclass(frozen=True)
class Source:
    """Weights on disk; `format` None: our own folder."""

    path: Path
    format: Format | None
    settings: Mapping[str, Any]
    """config.json's members; empty without one."""
    files: tuple[Path, ...]


def find_source(path: Path, format_name: str | None) -> Source:
    """The weights at `path`. `format_name`: None where the files are to tell.

    Raises WeightsError: nothing there, an unknown format, a pickle, or files that could be more than one format.
    """
    if format_name is not None and format_name not in (OURS, *FORMATS):
        raise WeightsError(f"unknown format {format_name!r} of weights{nearest(format_name, [OURS, *FORMATS])}")
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    _refuse_pickle(path)
    settings = read_json(path / CONFIG) if path.is_dir() and (path / CONFIG).is_file() else {}
    is_ours = settings.get("format") == FORMAT
    if is_ours != (format_name == OURS) and format_name is not None:
        found = "a network of dinox_model" if is_ours else f"no folder whose {CONFIG} has format {FORMAT!r}"
        raise WeightsError(f"{path}: {found}; format {format_name!r} was expected")
    if is_ours:
        return Source(path, None, settings, (path / WEIGHTS,))
    files = _files(path)
    format = FORMATS[format_name] if format_name else _detected(path, settings, files)
    if format.model_type is not None and settings.get("model_type") != format.model_type:
        found = f"model_type {settings['model_type']!r}" if "model_type" in settings else "no model_type"
        raise WeightsError(f"{path}: {CONFIG} with model_type {format.model_type!r} was expected; it has {found}")
    return Source(path, format, settings, files)


def _refuse_pickle(path: Path) -> None:
    if path.is_dir():
        if any(path.glob("*.safetensors")):
            return
        pickles = [file for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    else:
        pickles = [path] if path.suffix in PICKLES else []
    if pickles:
        command = UNPICKLE.format(source=pickles[0], target=pickles[0].with_suffix(".safetensors"))
        raise WeightsError(
            f"{pickles[0]}: a pickle, which may run code when it is read, is not read here. If you trust where it is "
            f"from, turn it into safetensors once:\n{command}"
        )


def _files(path: Path) -> tuple[Path, ...]:
    """The safetensors files of one network."""
    if path.is_file():
        return (path,)
    if (path / INDEX).is_file():
        places = read_json(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(_is_plain(name) for name in places.values()):
            raise WeightsError(f"{path / INDEX}: 'weight_map' must name files of its folder")
        return tuple(path / name for name in sorted(set(places.values())))
    files = sorted(path.glob("*.safetensors"))
    if (path / WEIGHTS) in files:
        return (path / WEIGHTS,)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise WeightsError(f"{path}: one *.safetensors file, or {INDEX}, was expected; found: {found}")
    return (files[0],)


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _detected(path: Path, settings: Mapping[str, Any], files: tuple[Path, ...]) -> Format:
    kinds = {each.model_type: each for each in FORMATS.values() if each.model_type}
    if "model_type" in settings:
        if settings["model_type"] in kinds:
            return kinds[settings["model_type"]]
        known = ", ".join(repr(kind) for kind in kinds)
        raise WeightsError(f"{path / CONFIG}: model_type {settings['model_type']!r} is none that is read here: {known}")
    meta = FORMATS["meta_dinov3"]
    tensors = StoredTensors(files)
    shapes = {meta.own_name(name): tensors.shape(name) for name in tensors}
    qkv = shapes.get("blocks.0.attn.qkv.weight")
    if qkv is None:
        first = json.dumps(list(tensors)[:3])
        hint = "Hugging Face's networks need their config.json beside them, ours too"
        raise WeightsError(f"{path}: of no format that is known ({hint}); its first names are {first}")
    if "blocks.0.attn.qkv.bias" not in shapes and qkv[-1] != NO_BIAS_WIDTH:
        raise WeightsError(
            f"{path}: Meta's names, without biases in attention's first linear: MedDINOv3's weights (norms with "
            "epsilon 1e-6), or some of Meta's code (1e-5 or 1e-6)? The file does not say. Give format='meddinov3', or "
            "format='meta_dinov3' with norm_eps"
        )
    return meta
