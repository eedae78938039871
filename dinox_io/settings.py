"""What to pack, where to, and how: everything that the result depends on, and what it does not.

Invariant: two packs of the same input whose `options` are equal write the same bytes.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinox_io import codec, privacy, split
from dinox_io.hounsfield import ENCODING
from dinox_io.nifti_patient import PatientPattern
from dinox_io.output import OutputFolder, PackError, check_folder, explained
from dinox_io.part import Part
from dinox_io.ray_pool import check_address
from dinox_io.series import SeriesRules


@dataclass(frozen=True, kw_only=True)
class PackSettings:
    """What to pack, where to, and how. `key_file` None: the set's own random key."""

    inputs: tuple[Path, ...]
    output: Path
    workers: int = 1
    shard_bytes: int = 512 << 20
    rules: SeriesRules = field(default_factory=SeriesRules)
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    split_seed: int = 0
    key_file: Path | None = None
    preset: str = "small"
    """Name of codec.PRESETS: filter and level."""
    part: Part | None = None
    """Pack only this part of the input, into a folder of its own in `output`."""
    nifti_patient: str | None = None
    """Regular expression whose first group, on a NIfTI file's path below its input, names the patient."""
    about: Mapping[str, Any] | None = None
    """What the data set says of itself (about.read_about); None keeps what the set has."""
    ray: str | None = None
    """Address of the Ray cluster that packs the series, see ray_pool.py; None: the workers here, which read the headers
    in any case."""

    def check(self) -> None:
        """Raise PackError for settings that cannot be meant."""
        missing = [path for path in self.inputs if not path.exists()]
        if missing or not self.inputs:
            raise PackError(
                f"there is no {missing[0]}: give files or folders of DICOM" if missing else "nothing to pack"
            )
        for option, value in (
            ("--workers", self.workers), ("--min-slices", self.rules.min_slices), ("--shard-size", self.shard_bytes),
        ):  # fmt: skip
            if value < 1:
                raise PackError(f"{option} must be at least 1, not {value}")
        self._check_output()
        if self.preset not in codec.PRESETS:
            raise PackError(f"there is no preset {self.preset!r}: give one of {', '.join(codec.PRESETS)}")
        if self.part is not None and self.key_file is None:
            raise PackError("--part needs --key-file: the parts of a set must be packed with one key")
        try:
            if self.nifti_patient is not None:
                PatientPattern(self.nifti_patient)
        except ValueError as error:
            raise PackError(f"--nifti-patient: {error}") from None
        try:
            if self.ray is not None:
                check_address(self.ray)
        except ValueError as error:
            raise PackError(f"--ray: {error}") from None
        try:
            split.check_fractions(self.val_fraction, self.test_fraction)
        except ValueError as error:
            raise PackError(str(error)) from None

    def _check_output(self) -> None:
        check_folder(self.output)
        output = self.output.resolve()
        for path in self.inputs:
            source = path.resolve()
            if source == output:
                raise PackError(f"{self.output} is INPUT: give another --output, which holds nothing but the set")
            if output in source.parents:
                raise PackError(f"INPUT {path} lies in --output {self.output}: give another --output, not above INPUT")

    @property
    def folder(self) -> Path:
        """Where the shards go: `output`, or the folder of the part in it."""
        return self.output / self.part.folder if self.part else self.output

    @property
    def encoding(self) -> tuple[str, int]:
        """Filter, and level of zstd."""
        return codec.PRESETS[self.preset]

    def options(self, key_id: str) -> dict[str, Any]:
        """What the manifest records: everything that the result depends on.

        Of `nifti_patient` only that it was given: a pattern may hold names.
        """
        filter_name, level = self.encoding
        return {
            **asdict(self.rules),
            "shard_bytes": self.shard_bytes,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "split_seed": self.split_seed,
            "key_id": key_id,
            "nifti_patient": self.nifti_patient is not None,
            "filter": filter_name,
            "level": level,
            "encoding": ENCODING,
        }

    def key(self, folder: OutputFolder) -> bytes:
        """The key of the pseudonyms: that of --key-file, else the set's own, made on first use. PackError."""
        own = folder.private / "key"
        try:
            if self.key_file is not None:
                return privacy.read_key(self.key_file)
            if folder.previous is not None and not own.exists():
                raise PackError(f"the set in {folder.path} was packed with a key file: give the same --key-file")
            with explained(folder.path):
                return privacy.own_key(folder.private)
        except ValueError as error:
            raise PackError(f"{self.key_file or own}: {error}") from None
        except OSError as error:
            raise PackError(f"the key file {self.key_file} cannot be read: {error.strerror}") from None


def other_options(previous: Mapping[str, Any] | None, options: Mapping[str, Any]) -> list[str]:
    """Options of this run that differ from those of `previous`, a manifest: its volumes stay as they are."""
    before = previous["options"] if previous else {}
    flags = {
        "filter": "--preset", "level": "--preset", "min_slices": "--min-slices", "split_gaps": "--split-gaps",
        "allow_tilt": "--allow-tilt", "allow_burned_in": "--allow-burned-in", "shard_bytes": "--shard-size",
    }  # fmt: skip
    differing = (flag for name, flag in flags.items() if name in before and before[name] != options[name])
    return list(dict.fromkeys(differing))


def check_same_set(path: Path, previous: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
    """A set has one key and one split: another key would make new patients of old ones. PackError.

    Args:
        path: of the set. previous: its manifest, or None.
    """
    before = previous["options"] if previous else {}
    for name, flag in (
        ("key_id", "key (--key-file)"), ("split_seed", "--split-seed"), ("val_fraction", "--val-fraction"),
        ("test_fraction", "--test-fraction"),
    ):  # fmt: skip
        if name in before and before[name] != options[name]:
            was = "" if name == "key_id" else f" ({before[name]}, not {options[name]})"
            raise PackError(
                f"the set in {path} was packed with another {flag}{was}: give the same, or another --output"
            )
