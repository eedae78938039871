"""NIfTI files for tests, written as dcm2niix does: rows bottom to top, axes to right, anterior, superior."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


def dcm2niix_affine(
    shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], origin_mm: tuple[float, float, float],
    directions: Any = AXIAL,
) -> np.ndarray:  # fmt: skip
    """Voxel to RAS (4, 4) of a series (z, y, x) that begins at origin_mm (LPS), once its rows are flipped."""
    row, column, normal = (np.array(axis) for axis in directions)
    z_mm, y_mm, x_mm = spacing_mm
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * x_mm, -column * y_mm, normal * z_mm
    affine[:3, 3] = np.array(origin_mm) + column * y_mm * (shape[1] - 1)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def write_nifti(
    path: Path, stored: np.ndarray, affine: np.ndarray, *, slope: float = 1.0, intercept: float = 0.0, version: int = 1,
    order: str = "<", surplus: bytes = b"", **fields: Any,
) -> Path:  # fmt: skip
    """Write voxels given as (x, y, z, …), x fastest on disk; `fields` replace values of the header."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    header = (Nifti1Header if version == 1 else Nifti2Header)(endianness=order)
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, intercept
    header["vox_offset"] = 352 if version == 1 else 544
    header["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n"
    for name, value in fields.items():
        header[name] = value
    data = header.binaryblock + b"\0" * 4 + stored.astype(stored.dtype.newbyteorder(order)).tobytes(order="F") + surplus
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def as_dcm2niix(hu: np.ndarray) -> np.ndarray:
    """Voxels (x, y, z) as dcm2niix stores slices (z, y, x) that ascend: rows bottom to top."""
    return np.transpose(hu[:, ::-1, :], (2, 1, 0))
