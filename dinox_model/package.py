"""Compiled networks: `load_package` opens a `.pt2` that `export_package` wrote, `Package` runs it.

A `.pt2` is a zip archive with a shared library, the weights inside, and a JSON document of facts (`PackageFacts`), the
preprocessing among them. torch alone runs it, from Python (`torch._inductor.aoti_load_package(path)(x)`) or C++;
this file adds names, checks and HU.

A package is a program: loading one runs what its author compiled. The facts are read before anything of it is run.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinox_model.features import ViTFeatures
from dinox_model.preprocess import Preprocess, check_spacing

FORMAT = "dinox-package"
VERSION = 1
FACTS = "dinox"
"""The key of the facts in the package's metadata."""
IMAGE_INPUT, MM_INPUT = "x", "mm_per_pixel"
_METADATA = "_metadata.json"
_METADATA_BYTES_MAX = 1 << 20


class PackageError(ValueError):
    """A file that is no package of ours, input that a package cannot take, or a package that cannot be made."""


@dataclass(frozen=True, kw_only=True)
class PackageFacts:
    """What a package takes and gives."""

    in_channels: int
    """Slices in a window."""
    patch_size: int
    size: tuple[int, int]
    """Pixels of the input along y and x; the number of images is free."""
    inputs: tuple[str, ...]
    """By place: `x`, float32 (b, in_channels, y, x); for networks that look at it `mm_per_pixel`, float32 (b, 2)."""
    outputs: tuple[str, ...]
    """By place, all float32: `cls` (b, d), where the network has one; `registers` (b, r, d); `patches` (b, n, d)."""
    device: str
    """`cpu` or `cuda`: it runs on no other."""
    dtype: str
    """`fp32`, or `bf16`: products are computed in bfloat16, all else in float32, as in training."""
    weights_bytes: int
    torch: str
    """The version that compiled it."""
    preprocess: Preprocess

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    def to_json(self) -> str:
        """The document that travels in the package."""
        return json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> PackageFacts:
        """The inverse. Raises ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        found = (values.pop("format"), values.pop("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(f"format {found[0]!r}, version {found[1]!r}; this dinox_model reads {FORMAT!r}, {VERSION}")
        values["preprocess"] = Preprocess(**values["preprocess"])
        for name in ("size", "inputs", "outputs"):
            values[name] = tuple(values[name])
        return cls(**values)


def read_facts(path: str | Path) -> PackageFacts:
    """The facts of a package, without running any of it. Raises PackageError where it is none of ours."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            documents = [_metadata(archive, name) for name in archive.namelist() if name.endswith(_METADATA)]
        text = next((one[FACTS] for one in documents if FACTS in one), None)
        if text is None:
            raise PackageError(f"{path}: no package of dinox_model export --format pt2: it holds no facts of ours")
        return PackageFacts.from_json(text)
    except FileNotFoundError as error:
        raise PackageError(f"{path}: no such file") from error
    except PackageError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path}: damaged, or no package of dinox_model ({error})") from error


def _metadata(archive: zipfile.ZipFile, name: str) -> Mapping[str, Any]:
    if archive.getinfo(name).file_size > _METADATA_BYTES_MAX:
        raise ValueError(f"{name} is too large for metadata")
    document = json.loads(archive.read(name))
    return document if isinstance(document, dict) else {}


class Package:
    """A compiled network. Made by `load_package`."""

    def __init__(self, facts: PackageFacts, run: Any) -> None:
        self.facts = facts
        self._run = run

    def __call__(self, x: Tensor, mm_per_pixel: Tensor | None = None) -> ViTFeatures:
        """Features of float32 images (b, c, y, x) of the package's size, on its device; no gradients.

        `mm_per_pixel`: float32 (b, 2), for networks that look at it only. Raises PackageError for other input.
        """
        inputs = self._checked(x, mm_per_pixel)
        with quiet_torch():
            named = dict(zip(self.facts.outputs, self._run(*inputs), strict=True))
        return ViTFeatures(named.get("cls"), named["registers"], named["patches"], self.facts.grid)

    def encode(
        self, hu: Tensor | np.ndarray, spacing_mm: Tensor | np.ndarray | Sequence[Sequence[float]]
    ) -> ViTFeatures:
        """`dinox_model.encode` with this package: int16 HU (b, k, y, x) and spacing (b, 3), z, y, x in mm.

        Padded with air to multiples of the patch size, the windows must have the package's size.
        """
        hu = torch.tensor(hu) if isinstance(hu, np.ndarray) else hu
        spacing = check_spacing(spacing_mm, num_images=hu.shape[0] if hu.ndim else 0)
        x = self.facts.preprocess.apply(hu.to(self.facts.device), self.facts.patch_size)
        mm_per_pixel = spacing[:, 1:].float().to(self.facts.device) if MM_INPUT in self.facts.inputs else None
        return self(x, mm_per_pixel)

    def _checked(self, x: Tensor, mm_per_pixel: Tensor | None) -> list[Tensor]:
        facts = self.facts
        wanted = (facts.in_channels, *facts.size)
        if x.ndim != 4 or x.shape[0] < 1 or tuple(x.shape[1:]) != wanted:
            height, width = facts.size
            raise PackageError(
                f"this package takes (b, {facts.in_channels}, {height}, {width}), not {tuple(x.shape)}: "
                "its size is fixed when it is compiled (export --format pt2 --size)"
            )
        if MM_INPUT not in facts.inputs:
            if mm_per_pixel is not None:
                raise PackageError("this package does not look at mm_per_pixel: leave it out")
            given = {IMAGE_INPUT: x}
        else:
            if mm_per_pixel is None or tuple(mm_per_pixel.shape) != (x.shape[0], 2):
                raise PackageError(f"this package needs mm_per_pixel, float32 ({x.shape[0]}, 2), along y and x")
            given = {IMAGE_INPUT: x, MM_INPUT: mm_per_pixel}
        for name, tensor in given.items():
            if tensor.dtype != torch.float32 or tensor.device.type != facts.device:
                found = f"{tensor.dtype} on {tensor.device.type}"
                raise PackageError(f"this package takes {name} as float32 on {facts.device}, not {found}")
        return [tensor.contiguous() for tensor in given.values()]


def load_package(path: str | Path) -> Package:
    """Open a package on the device that it was compiled for.

    Raises PackageError: no package of ours, its device is not here, or torch cannot load it (compiled for another
    processor or by another version, mostly).
    """
    path = Path(path)
    facts = read_facts(path)
    if facts.device == "cuda" and not torch.cuda.is_available():
        raise PackageError(f"{path}: compiled for cuda, and torch sees no such device here: export it for the cpu")
    try:
        with quiet_torch():
            return Package(facts, torch._inductor.aoti_load_package(str(path)))
    except (RuntimeError, OSError) as error:
        compiled = f"compiled by torch {facts.torch}, here is {torch.__version__}"
        raise PackageError(f"{path}: torch cannot load it ({compiled}): {error}") from error


@contextmanager
def quiet_torch() -> Iterator[None]:
    """torch deprecates what it uses itself when it loads, runs and writes packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
