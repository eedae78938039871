"""Tensors of a run of several ranks on disk: torch.distributed.checkpoint over its safetensors storage, no pickle.

    train/shards/shard-RRRRR-model-KKKKK-of-NNNNN.safetensors    what rank R wrote of file K (rank and K from 1)
    train/shards/INDEX.json                                      which file K is called what ("student"), and of each
                                                                 tensor dtype, shape, and which rows lie in which file

Each rank writes its rows, and a share of what is the same on all. Reading needs no other process: whole tensors, or
the rows that a rank of another number of ranks holds, from the files that have them. A checkpoint of one process
(train/NAME.safetensors) is read in the same way. Invariant: what a reader is given, the index vouches for in full:
a row that no file holds is damage, and never left as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor, Shard

from dinox_train.checkpoint import CheckpointError, DamagedCheckpoint
from dinox_train.part import Held, Part, part_of_rank

SHARDS = "train/shards"
INDEX = f"{SHARDS}/INDEX.json"
FORMAT, VERSION = "dinox-shards", 1


class _Location(NamedTuple):
    """Where torch's reader finds a chunk."""

    relative_path: str


# --- writing ---------------------------------------------------------------------------------------------------------


def write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor | Part]], group: dist.ProcessGroup | None) -> None:
    """Write `tensors`, by file and name, under `folder` (a checkpoint's); every rank of `group` calls it.

    tensors: the same names on all ranks. A `Part` (or a DTensor of rows): each rank writes its rows; another tensor is
    the same on all ranks, and one of them writes it. They lie on the host. group: gloo's, its own where a thread calls.
    All bytes are on the disk when this returns. Raises OSError on all ranks where one could not write, saying which.
    """
    held = {f"{file}/{name}": _held(value) for file, named in tensors.items() for name, value in named.items()}
    numbers = {file: number for number, file in enumerate(tensors, 1)}
    writer = _Writer(folder / SHARDS, {key: numbers[key.partition("/")[0]] for key in held}, list(tensors))
    try:
        dcp.save(held, storage_writer=writer, planner=_SavePlanner(), process_group=group)  # type: ignore[arg-type]
    except CheckpointException as error:
        raise _of_all_ranks(error, folder) from error


def _of_all_ranks(error: CheckpointException, folder: Path) -> Exception:
    """What the ranks met, as one error: of the disk where all of them are."""
    met = {rank: failure[0] for rank, failure in sorted(error.failures.items())}
    words = "; ".join(f"rank {rank}: {_in_words(one)}" for rank, one in met.items())
    if not all(isinstance(one, OSError | SafetensorError) for one in met.values()):
        return RuntimeError(f"{folder}: {words}")
    numbers = [one.errno for one in met.values() if isinstance(one, OSError) and one.errno]
    return OSError(numbers[0] if numbers else errno.EIO, words, str(folder))


def _in_words(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


class _Writer(dcp.HuggingFaceStorageWriter):
    """torch's, with an index beside its files, since those say of no tensor how large it is as a whole."""

    def __init__(self, path: Path, file_of: dict[str, int], names: list[str]) -> None:
        super().__init__(str(path), fqn_to_index_mapping=file_of, save_distributed=True)
        self._names = names

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Called on one rank once all have written."""
        lies_in = {
            (one.index.fqn, one.index.offset): one.storage_data.relative_path for rank in results for one in rank
        }
        shards = sorted(set(lies_in.values()))
        number_of = {file: number for number, file in enumerate(shards)}
        files: dict[str, dict[str, Any]] = {name: {} for name in self._names}
        for key, stored in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(stored, TensorStorageMetadata)
            file, _, name = key.partition("/")
            files[file][name] = {
                "dtype": str(stored.properties.dtype).removeprefix("torch."),
                "shape": list(stored.size),
                # First row, rows, and the number of the file that has them. A number has one row.
                "parts": sorted(
                    [*_rows(chunk), number_of[lies_in[key, torch.Size(chunk.offsets)]]] for chunk in stored.chunks
                ),
            }
        index = {"format": FORMAT, "version": VERSION, "shards": shards, "files": files}
        with (Path(self.path) / "INDEX.json").open("w") as stream:
            json.dump(index, stream, sort_keys=True, separators=(",", ":"))
            stream.flush()
            os.fsync(stream.fileno())


def _rows(chunk: ChunkStorageMetadata) -> tuple[int, int]:
    return (chunk.offsets[0], chunk.sizes[0]) if len(chunk.sizes) else (0, 1)


class _SavePlanner(dcp.DefaultSavePlanner):
    """torch's, of `Held` tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(key, held) for key, held in self.state_dict.items() if _is_written(held)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        values = _whole_if_empty(held)
        return (values.values if isinstance(values, Part) else values).contiguous()


def _is_written(held: Held) -> bool:
    """Of rows that a rank has none of, nothing is; a tensor without elements is whole on each."""
    return isinstance(_whole_if_empty(held), Tensor) or held.values.numel() > 0  # type: ignore[union-attr]


def _whole_if_empty(held: Held) -> Held:
    if isinstance(held, Part) and not math.prod(held.shape):
        return held.values.new_empty(held.shape)
    return held


def _write_item(key: str, held: Held) -> WriteItem:
    held = _whole_if_empty(held)
    values, offsets = (held.values, held.offsets) if isinstance(held, Part) else (held, (0,) * held.ndim)
    chunk = ChunkStorageMetadata(torch.Size(offsets), values.shape)
    return WriteItem(
        index=MetadataIndex(key, torch.Size(offsets)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(dtype=values.dtype), held.shape),
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def has(folder: Path, name: str) -> bool:
    """Whether the checkpoint has a file `name` in shards. Raises DamagedCheckpoint where the index cannot be read."""
    return (folder / INDEX).is_file() and name in _index(folder)["files"]


def shards_of(folder: Path, name: str) -> list[str]:
    """The files, from `folder`, that hold `name`; none where it is not in shards."""
    if not has(folder, name):
        return []
    index = _index(folder)
    numbers = {part[-1] for entry in index["files"][name].values() for part in entry["parts"]}
    return [f"{SHARDS}/{index['shards'][number]}" for number in sorted(numbers)]


def shapes(folder: Path, name: str) -> dict[str, torch.Size]:
    """The tensors of file `name`, of either version, by name; their whole shapes. Raises DamagedCheckpoint."""
    if has(folder, name):
        return {key: torch.Size(entry["shape"]) for key, entry in _index(folder)["files"][name].items()}
    with _opened(folder, f"train/{name}.safetensors") as file:
        return {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 # no mapping


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The whole tensors of the shards of file `name`, on the host; no other process is needed.

    Raises DamagedCheckpoint where they are not all there.
    """
    entries = _index(folder)["files"]
    if name not in entries:
        raise DamagedCheckpoint(f"{folder}: {INDEX} knows no {name}.")
    tensors: dict[str, Held] = {
        key: torch.empty(entry["shape"], dtype=_dtype(entry["dtype"])) for key, entry in entries[name].items()
    }
    _read_shards(folder, name, tensors)
    return tensors  # type: ignore[return-value] # none is a Part


def read_into(folder: Path, name: str, tensors: Mapping[str, Tensor | Part]) -> None:
    """Fill `tensors` in place with what file `name` of the checkpoint, of either version, has of their names.

    Of a `Part` (or a DTensor of rows) only its rows are read. Tensors of the file that are not asked for are left out.
    No rank waits for another. Raises DamagedCheckpoint where the file is not whole; CheckpointError where it has no
    such tensor, or one of another shape or dtype.
    """
    held = {key: _held(value) for key, value in tensors.items()}
    if has(folder, name):
        _read_shards(folder, name, held)
    else:
        _read_slices(folder, f"train/{name}.safetensors", held)


def read_file_into(folder: Path, file: str, tensors: Mapping[str, Tensor | Part]) -> None:
    """`read_into`, of one whole safetensors file of the checkpoint: model.safetensors, the teacher's backbone."""
    _read_slices(folder, file, {key: _held(value) for key, value in tensors.items()})


def _read_slices(folder: Path, name: str, tensors: Mapping[str, Held]) -> None:
    with _opened(folder, name) as file:
        there = set(file.keys())
        for key, held in tensors.items():
            if key not in there:
                raise CheckpointError(f"{folder}: {name} has no {key}.")
            part = file.get_slice(key)
            target = held.values if isinstance(held, Part) else held
            _check(f"{folder}: {name}", key, held, torch.Size(part.get_shape()), None)
            if isinstance(held, Part):
                source = part[held.first : held.first + len(target)]
            else:
                source = file.get_tensor(key)
            if source.dtype != target.dtype:
                raise CheckpointError(f"{folder}: {name}: {key} is {source.dtype}, expected {target.dtype}.")
            with torch.no_grad():
                target.copy_(source.reshape(target.shape))


def _read_shards(folder: Path, name: str, tensors: Mapping[str, Held]) -> None:
    index = _index(folder)
    entries = index["files"].get(name, {})
    wanted: dict[str, Held] = {}
    for key, held in tensors.items():
        if key not in entries:
            raise CheckpointError(f"{folder}: {SHARDS}: {name} has no {key}.")
        _check(f"{folder}: {SHARDS}: {name}", key, held, torch.Size(entries[key]["shape"]), entries[key]["dtype"])
        if (held.values if isinstance(held, Part) else held).numel():
            wanted[f"{name}/{key}"] = held
    reader = _Reader(folder, name, index)
    metadata = reader.read_metadata()
    planner = _LoadPlanner(str(folder))
    planner.set_up_planner(wanted, metadata, is_coordinator=True)  # type: ignore[arg-type]
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    needed = {reader.storage_data[item.storage_index].relative_path for item in plan.items}
    for path in sorted(needed):
        with _opened(folder, str(Path(path).relative_to(folder))):
            pass  # torch's reader would not say which file it is
    try:
        reader.read_data(plan, planner).wait()
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{folder}: {SHARDS}: {name} is not what {INDEX} says ({error}).") from error


class _Reader(dcp.HuggingFaceStorageReader):
    """torch's, told by the index where all is: it would open every file of every rank to find out."""

    def __init__(self, folder: Path, name: str, index: Mapping[str, Any]) -> None:
        super().__init__(str(folder / SHARDS))
        self._folder, self._name, self._index = folder, name, index

    def read_metadata(self, *_arguments: Any, **_named: Any) -> Metadata:
        described: dict[str, Any] = {}
        locations: dict[MetadataIndex, _Location] = {}
        for name, entry in self._index["files"][self._name].items():
            key, shape = f"{self._name}/{name}", entry["shape"]
            chunks = []
            for first, rows, shard in entry["parts"]:
                offsets = torch.Size([first, *(0 for _ in shape[1:])] if shape else [])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size([rows, *shape[1:]] if shape else [])))
                path = self._folder / SHARDS / self._index["shards"][shard]
                locations[MetadataIndex(key, offsets)] = _Location(str(path))
            properties = TensorProperties(dtype=_dtype(entry["dtype"]))
            described[key] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
        return Metadata(described, storage_data=locations)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """torch's, of `Held` tensors; sees to it that every row is read."""

    def __init__(self, where: str) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._where = where

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, held in self.state_dict.items():
            values, offsets = (held.values, held.offsets) if isinstance(held, Part) else (held, (0,) * held.ndim)
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            found = create_read_items_for_chunk_list(
                key, stored, [ChunkStorageMetadata(torch.Size(offsets), values.shape)]
            )
            if sum(math.prod(item.lengths) for item in found) != values.numel():
                raise DamagedCheckpoint(f"{self._where}: {INDEX} does not say where all of {key} is.")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        return held.values if isinstance(held, Part) else held


def _held(value: Tensor | Part) -> Held:
    """A DTensor of rows as a Part. Raises ValueError for another."""
    if not isinstance(value, DTensor):
        return value
    if value.device_mesh.ndim != 1 or value.placements != (Shard(0),):
        raise ValueError(f"a tensor is shared out as {value.placements}; checkpoints know rows (Shard(0)) alone")
    mesh = value.device_mesh
    with torch.no_grad():
        return part_of_rank(value.to_local(), value.shape, mesh.get_local_rank(), mesh.size())


def _check(where: str, key: str, held: Held, shape: torch.Size, dtype: str | None) -> None:
    if held.shape != shape:
        raise CheckpointError(f"{where}: {key} has shape {tuple(shape)}, expected {tuple(held.shape)}.")
    own = (held.values if isinstance(held, Part) else held).dtype
    if dtype is not None and _dtype(dtype) != own:
        raise CheckpointError(f"{where}: {key} is {dtype}, expected {str(own).removeprefix('torch.')}.")


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def _index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_bytes())
        known = (index["format"], index["version"]) == (FORMAT, VERSION)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder}: {INDEX} is missing.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder}: {INDEX} is not what was written ({error}).") from error
    if not known:
        raise CheckpointError(f"{folder}: {INDEX} is of another version. Use the release of DINOX that wrote it.")
    return index


def _opened(folder: Path, name: str) -> Any:
    """A safetensors file. Raises DamagedCheckpoint that names it."""
    try:
        return safe_open(folder / name, framework="pt")
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{folder}: {name} is missing.") from None
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{folder}: {name} is not what was written ({error}).") from error


# --- replicas --------------------------------------------------------------------------------------------------------


def digest_over_ranks(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> str | None:
    """Compare what is to be the same on all ranks of `group`, byte by byte; every rank calls it.

    None: it is. Else words, the same on all ranks, that name the first rank that differs from rank 0, and in what.
    """
    own = {name: _digest(value) for name, value in tensors.items()}
    of_all: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_all, own, group=group)
    first = of_all[0]
    for rank, theirs in enumerate(of_all):
        other = sorted(name for name in first.keys() | theirs.keys() if first.get(name) != theirs.get(name))
        if other:
            more = f" and {len(other) - 1} more" if other[1:] else ""
            return f"rank {rank} has another {other[0]}{more} than rank 0"
    return None


def _digest(value: Tensor) -> str:
    found = hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode())
    found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
