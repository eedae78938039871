"""`export_package`: a network compiled ahead of time into one `.pt2`, which runs without our Python (`package.py`).

    network ─▶ torch.export, any number of images ─▶ AOTInductor: C++ (and Triton) ─▶ shared library ─▶ FOLDER/model.pt2

Invariant: what is written computes what the network computes, in fp32 up to the order of sums.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinox_model.execution import Execution, prepare
from dinox_model.folders import replace_file, sync, write_folder
from dinox_model.model_card import model_card
from dinox_model.package import FACTS, IMAGE_INPUT, MM_INPUT, PackageError, PackageFacts, quiet_torch
from dinox_model.vit import VisionTransformer
from dinox_model.weights import write_preprocess

PACKAGE = "model.pt2"
DTYPES = ("fp32", "bf16")
DEVICES = ("cpu", "cuda")
_EXAMPLE_IMAGES = 2
"""Of the input that is traced: 1 would be taken for a number that never changes."""


def export_package(
    model: VisionTransformer,
    folder: str | Path,
    *,
    size: tuple[int, int] = (224, 224),
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["fp32", "bf16"] = "fp32",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Compile `model` into a new `folder`, whole or not at all; returns the path of its `.pt2`.

        FOLDER/model.pt2         the package: weights, code, facts (`PackageFacts`); all that is needed to run it
               preprocess.json   how HU become its input, for people and programs that do not ask the package
               README.md         the model card

    Takes half a minute to some minutes, and a C++ compiler. The library is for processors with this one's instruction
    sets; for `cuda`, for GPUs of this one's architecture.

    Args:
        size: pixels of the input along y and x, fixed from then on; the number of images, 1 or more, is free.
        dtype: of products (matrix products and attention), whose weights are stored so; all else stays float32, as
            input and output do.
        provenance: see `model_card`.

    Raises:
        PackageError: the folder exists, a size that is no multiple of the patch size, no such device or compiler.
    """
    folder = Path(folder)
    if folder.exists():
        raise PackageError(f"{folder}: exists already; an export makes a new folder")
    _check(model, size, device, dtype)
    check_compiler()
    exported, facts = exported_program(model, size=size, device=device, dtype=dtype)
    card = model_card(model, provenance, use=_use(facts))

    def write(temporary: Path) -> None:
        _compile(exported, facts, temporary / PACKAGE)
        write_preprocess(model.preprocess, temporary)
        replace_file(temporary / "README.md", lambda path: path.write_text(card, encoding="utf-8"))

    write_folder(folder, write)
    return folder / PACKAGE


def exported_program(
    model: VisionTransformer, *, size: tuple[int, int], device: str, dtype: str
) -> tuple[torch.export.ExportedProgram, PackageFacts]:
    """The network as a graph of torch's operators, and what it takes and gives. Raises PackageError."""
    _check(model, size, device, dtype)
    config = model.config
    network = _Tensors(_copied(model, device, dtype), dtype)
    shape = (_EXAMPLE_IMAGES, config.in_channels, *size)
    example: dict[str, Tensor] = {IMAGE_INPUT: torch.zeros(shape, device=device)}
    if config.uses_mm_per_pixel:
        example[MM_INPUT] = torch.ones(_EXAMPLE_IMAGES, 2, device=device)
    images = torch.export.Dim("b", min=1)
    with torch.no_grad(), quiet_torch():
        exported = torch.export.export(
            network, tuple(example.values()), dynamic_shapes=tuple({0: images} for _ in example)
        )
    facts = PackageFacts(
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        size=size,
        inputs=tuple(example),
        outputs=(*(["cls"] if config.cls_token else []), "registers", "patches"),
        device=device,
        dtype=dtype,
        weights_bytes=sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
        torch=torch.__version__,
        preprocess=model.preprocess,
    )
    return exported, facts


def check_compiler() -> None:
    """Raises PackageError, saying what to install, where there is no C++ compiler that torch would use."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        raise PackageError(
            "a .pt2 is made by a C++ compiler, and torch finds none: install one (g++; the package is named g++ on "
            "Debian and Ubuntu, gcc-c++ on Fedora, gxx in conda), or name yours in the environment variable CXX"
        ) from error


class _Tensors(nn.Module):
    """The network with tensors in and a tuple of float32 tensors out: what a graph can hold."""

    def __init__(self, network: VisionTransformer, dtype: str) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, x: Tensor, mm_per_pixel: Tensor | None = None) -> tuple[Tensor, ...]:
        with autocast(x.device.type, self.dtype):
            features = self.network(x, mm_per_pixel=mm_per_pixel)
        parts = (features.cls, features.registers, features.patches)
        return tuple(part.float() for part in parts if part is not None)


def autocast(device: str, dtype: str) -> torch.autocast:
    """What `dtype`, one of `DTYPES`, means when a network runs: bf16 as in training, by torch's autocast."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bf16")


def _check(model: VisionTransformer, size: tuple[int, int], device: str, dtype: str) -> None:
    side = model.config.patch_size
    if any(length < side or length % side for length in size):
        raise PackageError(f"size must be multiples of the patch size, {side}, not {size[0]} x {size[1]}")
    if device not in DEVICES:
        raise PackageError(f"device must be one of {', '.join(DEVICES)}, not {device!r}")
    if dtype not in DTYPES:
        raise PackageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise PackageError("device cuda: torch sees none here, and a package is compiled where its device is")


def _copied(model: VisionTransformer, device: str, dtype: str) -> VisionTransformer:
    """As it is to be compiled: no gradients, nothing that `prepare` put on it, weights of products in `dtype`."""
    model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
    prepare(model, Execution())
    if dtype == "bf16":
        # Rounded once here instead of in each forward: autocast would round them to the same numbers.
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return model


def _compile(exported: torch.export.ExportedProgram, facts: PackageFacts, path: Path) -> None:
    from torch._inductor.exc import CppCompileError

    configs = {"aot_inductor.metadata": {FACTS: facts.to_json()}}
    try:
        with quiet_torch():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=configs)
    except CppCompileError as error:
        raise PackageError(f"the C++ compiler failed: {error}") from error
    sync(path)


def _use(facts: PackageFacts) -> str:
    height, width = facts.size
    given = f"x: float32 (b, {facts.in_channels}, {height}, {width}), b >= 1"
    if MM_INPUT in facts.inputs:
        given += "; mm_per_pixel: float32 (b, 2), millimetres of a pixel along y and x"
    return f"""\
```python
import torch

run = torch._inductor.aoti_load_package("{PACKAGE}")  # torch {facts.torch} compiled it, for {facts.device}
# {given}
{", ".join(facts.outputs)} = run({", ".join(facts.inputs)})
```
"""
