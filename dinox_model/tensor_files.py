"""Tensors in safetensors files: read one by one, written at once. The only file that imports safetensors.

Invariant: nothing is read that could run code, and what is damaged is a WeightsError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


class WeightsError(ValueError):
    """Files that do not hold a whole network that this version can read, or a network that cannot be saved so."""


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files, by name; each is read when it is asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Reads the files' headers. Raises WeightsError for a damaged file, or a name that stands in two of them."""
        self.files = tuple(files)
        self._file_of: dict[str, Path] = {}
        self._facts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for file in self.files:
            self._read_header(file)

    def __getitem__(self, name: str) -> Tensor:
        """On the CPU. Raises KeyError for an unknown name."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return self._facts[name][1]

    def dtype(self, name: str) -> torch.dtype:
        """Without reading the tensor."""
        return self._facts[name][0]

    def _read_header(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                    if name in self._file_of:
                        raise WeightsError(f"{file}: {name} stands in {self._file_of[name].name} too")
                    part = opened.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise WeightsError(f"{file}: {name} has dtype {part.get_dtype()}, which is not read here")
                    self._file_of[name] = file
                    self._facts[name] = _DTYPES[part.get_dtype()], tuple(part.get_shape())
        except SafetensorError as error:
            raise WeightsError(f"{file}: damaged, or no safetensors file ({error})") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """All of `tensors`, from any device, into one file. Tensors may share memory; the file holds each in full."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        whole[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    save_file(whole, path, metadata={"format": "pt"})
