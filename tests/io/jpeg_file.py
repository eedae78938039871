"""Small DICOM files in the JPEG family, by the encoders that come with the [dicom] extra.

Invariant: `compress` changes how the pixels of a file are stored, and nothing else but its transfer syntax.
"""

import importlib
import struct
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID


def compressible() -> bool:
    """Whether the [dicom] extra is installed."""
    try:
        for name in ("gdcm", "openjpeg", "jpeg_ls"):
            importlib.import_module(name)
    except ImportError:
        return False
    return True


def fragments(dataset: Dataset, syntax: str, frames: list[bytes]) -> None:
    """Give a data set compressed frames as they are."""
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = UID(syntax)


def jpeg_header(rows: int, columns: int) -> bytes:
    """The beginning of a lossy JPEG of 12 bits, and nothing after its size."""
    return b"\xff\xd8\xff\xc1\x00\x0b\x0c" + struct.pack(">HHB", rows, columns, 1) + b"\x01\x11\x00\xff\xd9"


def compress(path: Path, syntax: str) -> None:
    """Rewrite a native file of one frame in a syntax of the JPEG family; lossy ones at a high quality."""
    if syntax.endswith((".90", ".91")):
        dataset = pydicom.dcmread(path)
        psnr = [60.0] if syntax.endswith(".91") else None
        dataset.compress(syntax, generate_instance_uid=False, j2k_psnr=psnr)
        dataset.save_as(path, enforce_file_format=True)
        return
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
    if syntax.endswith(".81"):
        codec = gdcm.JPEGLSCodec()
        codec.SetLossless(False)
        codec.SetLossyError(2)
        change.SetUserCodec(codec)
    elif syntax.endswith((".50", ".51", ".53", ".55")):
        codec = gdcm.JPEGCodec()
        codec.SetLossless(False)
        codec.SetQuality(97)
        change.SetUserCodec(codec)
    writer = gdcm.ImageWriter()
    if not reader.Read():
        raise OSError(f"GDCM does not read {path}")
    change.SetInput(reader.GetImage())
    if not change.Change():
        raise OSError(f"GDCM does not write {syntax}")
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    if not writer.Write():
        raise OSError(f"GDCM does not write {path}")
