"""Networks in folders: `save` and `load`.

    FOLDER/config.json         format, version, the ViTConfig, and the sha256 of the two files below
           model.safetensors   every parameter by name, fp32
           preprocess.json     how HU become the network's input

Invariant: what `load` returns has exactly the parameters that `save` was given, bit for bit, and the preprocessing that
belongs to them; anything else is a WeightsError. Files of another name in the folder are not looked at (a checkpoint
has more).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinox_model.config import ViTConfig
from dinox_model.folders import replace_file, write_folder
from dinox_model.preprocess import Preprocess
from dinox_model.tensor_files import StoredTensors, WeightsError, write_tensors
from dinox_model.vit import VisionTransformer

FORMAT = "dinox-model"
VERSION = 1
CONFIG, WEIGHTS, PREPROCESS = "config.json", "model.safetensors", "preprocess.json"
WINDOW = {"depth", "step", "step_mm", "edge"}
"""Members of preprocess.json that say what windows were; others' networks have none."""


def save(model: VisionTransformer, folder: str | Path) -> None:
    """Write a network to `folder`.

    A new folder appears whole or not at all. In one that exists each file is replaced atomically, config.json last;
    after a crash in between `load` refuses the mixture. One writer at a time. Raises WeightsError unless all parameters
    are float32.
    """
    folder = Path(folder)
    other = [f"{name} ({tensor.dtype})" for name, tensor in model.state_dict().items() if tensor.dtype != torch.float32]
    if other:
        raise WeightsError(
            f"weights are saved as float32, and {other[0]} of this network is not: call model.float() first"
        )
    if folder.is_dir():
        _write_files(model, folder)
        return
    write_folder(folder, lambda temporary: _write_files(model, temporary))


def load(folder: str | Path) -> VisionTransformer:
    """The network in `folder`, on the CPU, in evaluation mode, with its preprocessing attached.

    Raises WeightsError that says what is wrong: a missing or damaged file, an unknown format, version or key,
    parameters that are missing, too many, or of another shape.
    """
    folder = Path(folder)
    document = read_json(folder / CONFIG)
    if document.get("format") != FORMAT or document.get("version") != VERSION:
        found = f"format {document.get('format')!r}, version {document.get('version')!r}"
        raise WeightsError(f"{folder / CONFIG}: {found}; this dinox_model reads {FORMAT!r}, version {VERSION}")
    try:
        config = ViTConfig.from_dict(_member(document, "config", folder / CONFIG))
    except ValueError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from error
    model = empty_network(config)
    tensors = _read_tensors(folder / WEIGHTS, model.state_dict())
    model.preprocess = read_preprocess(folder / PREPROCESS, config.in_channels)
    _check_digests(folder, _member(document, "sha256", folder / CONFIG))
    model.load_state_dict(tensors)
    return model.eval()


def empty_network(config: ViTConfig) -> VisionTransformer:
    """A network on the CPU whose numbers have no meaning until all of its state is loaded."""
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.to_empty(device="cpu")
    return model


def write_preprocess(preprocess: Preprocess, folder: Path) -> None:
    """preprocess.json, as `load` reads it."""
    document = {"format": f"{FORMAT}-preprocess", "version": VERSION, **preprocess.to_dict()}
    replace_file(folder / PREPROCESS, lambda path: path.write_text(_json(document)))


def _write_files(model: VisionTransformer, folder: Path) -> None:
    replace_file(folder / WEIGHTS, lambda path: write_tensors(model.state_dict(), path))
    write_preprocess(model.preprocess, folder)
    digests = {name: _sha256(folder / name) for name in (WEIGHTS, PREPROCESS)}
    config = {"format": FORMAT, "version": VERSION, "config": model.config.to_dict(), "sha256": digests}
    replace_file(folder / CONFIG, lambda path: path.write_text(_json(config)))


def _read_tensors(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; a network's folder holds {CONFIG}, {WEIGHTS} and {PREPROCESS}")
    stored = StoredTensors([path])
    faults = [f"missing {name}" for name in wanted if name not in stored]
    faults += [f"unknown {name}" for name in stored if name not in wanted]
    for name in stored:
        found = f"{stored.dtype(name)} {stored.shape(name)}"
        expected = f"{wanted[name].dtype} {tuple(wanted[name].shape)}" if name in wanted else found
        faults += [f"{name} is {found}, not {expected}"] if found != expected else []
    if faults:
        raise WeightsError(f"{path}: not the parameters of the network in {CONFIG}: " + "; ".join(faults))
    return dict(stored)


def read_preprocess(path: Path, in_channels: int) -> Preprocess:
    """What `write_preprocess` wrote for a network of so many slices; facts of the window may be missing.

    Raises WeightsError for anything else.
    """
    document = read_json(path)
    expected = {"format": f"{FORMAT}-preprocess", "version": VERSION}
    names = set(Preprocess().to_dict())
    found = set(document) - set(expected)
    if any(document.get(key) != value for key, value in expected.items()) or not names - WINDOW <= found <= names:
        raise WeightsError(
            f"{path}: must hold {expected}, {', '.join(sorted(names - WINDOW))}, perhaps {', '.join(sorted(WINDOW))}, "
            f"nothing else; it holds {document}"
        )
    try:
        preprocess = Preprocess(**{name: document[name] for name in found})
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    if preprocess.depth not in (None, in_channels):
        raise WeightsError(
            f"{path}: depth is {preprocess.depth}, and the network takes windows of {in_channels} slices"
        )
    return preprocess


def _check_digests(folder: Path, digests: Mapping[str, Any]) -> None:
    for name in (WEIGHTS, PREPROCESS):
        if digests.get(name) != _sha256(folder / name):
            raise WeightsError(
                f"{folder / name}: not the file that {CONFIG} was written with (its sha256 differs): damaged, edited, "
                f"or from a save that was interrupted. Take another copy, or save the network again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises WeightsError where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        needed = f"a network's folder holds {CONFIG}, {WEIGHTS} and {PREPROCESS}"
        raise WeightsError(f"{path}: no such file; {needed}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: no JSON ({error})") from error
    if not isinstance(document, dict):
        raise WeightsError(f"{path}: must be a JSON object")
    return document


def _member(document: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(document.get(name), dict):
        raise WeightsError(f"{path}: {name!r} must be an object")
    return document[name]


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
