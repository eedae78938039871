"""What turns windows into features: a network in a folder, or a compiled package; one face for both.

Invariant: pixels are prepared by `dinox_model.encode` (or the package's own), as in training, never here.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import dinox_model
from dinox_model import VisionTransformer, ViTFeatures
from dinox_model.export import autocast
from dinox_model.package import load_package


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network that is ready to run."""

    depth: int
    """Slices in a window."""
    step: int | None
    """How far apart they were in training, in slices, or `step_mm` in millimetres; both None: not known."""
    step_mm: float | None
    edge: str | None
    """What windows saw beyond a volume's ends in training; None: not known, or there were none."""
    device: str
    dtype: str
    """fp32 or bf16, of matrix products and attention."""
    digest: str
    """sha256 of its weights, or of the package's file."""
    weights_bytes: int
    """Of a package on a device: torch's own count of memory leaves them out. Else 0."""
    has_cls: bool
    size: tuple[int, int] | None
    """Pixels along y and x of a package's input; None: any."""
    patch_size: int
    encode: Callable[[np.ndarray, np.ndarray], ViTFeatures]
    """int16 HU (b, depth, y, x) and spacing (b, 3) in mm, to features on the device."""
    notes: tuple[str, ...] = ()
    """For people: what was read."""

    def takes(self, size: tuple[int, int]) -> bool:
        """Whether it takes slices of y, x pixels, rounded up to whole patches."""
        return self.size in (None, tuple(-(-length // self.patch_size) * self.patch_size for length in size))


def open_network(path: Path, device: str | None, dtype: str | None) -> Network:
    """The network in a folder (any that `dinox_model.load_pretrained` reads), or a .pt2 file.

    device: None for cuda where there is one, else cpu; a package has its own. Raises ValueError that says what is
    wrong.
    """
    if path.suffix == ".pt2":
        return _open_package(path, device, dtype)
    device = usable_device(device)
    model, report = dinox_model.load_pretrained(path)
    return network_of(model, device, dtype, tuple(report.lines()))


def usable_device(device: str | None) -> str:
    """None: cuda where there is one, else cpu. ValueError for cuda where there is none."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees none here")
    return device


def network_of(model: VisionTransformer, device: str | None, dtype: str | None, notes: tuple[str, ...] = ()) -> Network:
    """A network on the CPU, moved to the device. Arguments and errors are those of `open_network`."""
    device, dtype, digest = usable_device(device), dtype or "fp32", _digest(model)
    model.to(device)

    def encode(hu: np.ndarray, spacing_mm: np.ndarray) -> ViTFeatures:
        with autocast(torch.device(device).type, dtype):
            return dinox_model.encode(model, hu, spacing_mm)

    return Network(
        depth=model.config.in_channels,
        step=model.preprocess.step,
        step_mm=model.preprocess.step_mm,
        edge=model.preprocess.edge,
        device=device,
        dtype=dtype,
        digest=digest,
        weights_bytes=0,
        has_cls=model.config.cls_token,
        size=None,
        patch_size=model.config.patch_size,
        encode=encode,
        notes=notes,
    )


def _open_package(path: Path, device: str | None, dtype: str | None) -> Network:
    package = load_package(path)
    facts = package.facts
    for name, given, own in (("device", device, facts.device), ("dtype", dtype, facts.dtype)):
        if given not in (None, own):
            raise ValueError(f"--{name} {given}: {path} was compiled for {own}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Network(
        depth=facts.in_channels,
        step=facts.preprocess.step,
        step_mm=facts.preprocess.step_mm,
        edge=facts.preprocess.edge,
        device=facts.device,
        dtype=facts.dtype,
        digest=digest,
        weights_bytes=facts.weights_bytes,
        has_cls="cls" in facts.outputs,
        size=facts.size,
        patch_size=facts.patch_size,
        encode=package.encode,
        notes=(f"{path}: a package for {facts.size[0]} x {facts.size[1]} pixels, compiled by torch {facts.torch}",),
    )


def _digest(model: VisionTransformer) -> str:
    digest = hashlib.sha256(repr((sorted(model.config.to_dict().items()), model.preprocess)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
