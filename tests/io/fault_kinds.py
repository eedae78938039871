"""Kinds of faults in the files, pixels and positions of a series, on random scans.

Invariant: a kind writes files into an empty folder and says what packing them must give; it uses nothing of dinox_io.
"""

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage, RLELossless

from tests.io.dicom_factory import write
from tests.io.fault_kind import Expected, accepted, kind, one_item, refused, setting
from tests.io.random_scan import FORMATS, PixelFormat, Scan, encode, hounsfield, with_format

# ---------------------------------------------------------------------------------------------- nothing is wrong


@kind(
    "derived/01", "derived/36", "derived/37", "derived/38", "derived/39", "LIDC-IDRI-0001", "LIDC-IDRI-0002",
    "dcmqi_23x38x3_single", "dcmqi_ct3slice",
)  # fmt: skip
def plain(scan: Scan, folder: Path) -> Expected:
    scan.write(folder)
    return accepted(scan, spacing_mm=[scan.step_mm, *scan.spacing_mm])


@kind("derived/02", "LIDC-IDRI-0314")
def numbers_reversed(scan: Scan, folder: Path) -> Expected:
    def change(index: int, dataset: Dataset) -> None:
        dataset.InstanceNumber = scan.count - index
        dataset.SliceLocation = str(-index)
        dataset.FrameOfReferenceUID = f"{scan.uid}.9.{index}"

    scan.write(folder, change)
    return accepted(scan)


@kind("derived/18")
def no_instance_number(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(InstanceNumber=None))
    return accepted(scan)


@kind("derived/19")
def jitter_of_positions(scan: Scan, folder: Path) -> Expected:
    def change(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = scan.position(index * scan.step_mm + scan.random.uniform(-4e-4, 4e-4))

    scan.write(folder, change)
    return accepted(scan)


@kind("derived/22", "pyd_explicit_VR-UN")
def rows_bottom_to_top(scan: Scan, folder: Path) -> Expected:
    scan = replace(scan, orientation=(1, 0, 0, 0, -1, 0))
    scan.write(folder, setting(SliceThickness=None))
    return accepted(scan, direction=[1, 0, 0, 0, -1, 0, 0, 0, 1], thickness_mm=None)


@kind("derived/23")
def anisotropic_pixels(scan: Scan, folder: Path) -> Expected:
    scan = replace(scan, spacing_mm=(0.7, 0.9))
    scan.write(folder)
    return accepted(scan, spacing_mm=[scan.step_mm, 0.7, 0.9])


@kind("derived/24")
def monochrome1(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(PhotometricInterpretation="MONOCHROME1"))
    return accepted(scan, monochrome1=True)


@kind("derived/33")
def long_decimal_strings(scan: Scan, folder: Path) -> Expected:
    def change(index: int, dataset: Dataset) -> None:
        height = f"{scan.origin_mm[2] + index * scan.step_mm:.3f}000000000049"
        # As bytes: pydicom would not write so long a number.
        dataset.add_new(0x00200032, "DS", ["-10.5000000000000000000", "-20.25", height])
        dataset["PixelSpacing"].value = ["0.70000000000000001", "0.90000000000000002"]

    scan = replace(scan, orientation=(1, 0, 0, 0, 1, 0))
    scan.write(folder, change)
    return accepted(scan, spacing_mm=[scan.step_mm, 0.7, 0.9])


@kind("derived/25")
def identifiers_everywhere(scan: Scan, folder: Path) -> Expected:
    def change(_: int, dataset: Dataset) -> None:
        setting(PatientName="ZZPHI^A", PatientComments="ZZPHI", StationName="ZZPHI", PatientBirthDate="19420228")(
            0, dataset
        )
        dataset.OtherPatientIDsSequence = one_item(PatientID="ZZPHI 19420228")
        dataset.private_block(0x0011, "ZZPHI", create=True).add_new(1, "LO", "ZZPHI")

    scan.write(folder / "ZZPHI 19420228", change)
    return accepted(scan)


@kind("derived/26")
def junk_files(scan: Scan, folder: Path) -> Expected:
    scan.write(folder)
    for name, data in {"empty.dcm": b"", "text.dcm": b"no scan", "Thumbs.db": bytes(9000)}.items():
        (folder / name).write_bytes(data)
    (folder / "random.dcm").write_bytes(scan.random.bytes(3000))
    expected = accepted(scan)
    return replace(expected, rows={(None, "NOT_DICOM"): 4})


@kind("derived/30")
def over_two_folders(scan: Scan, folder: Path) -> Expected:
    for number, path in enumerate(scan.write(folder / "a")):
        if number % 3 == 0:
            (folder / "b").mkdir(exist_ok=True)
            path.rename(folder / "b" / path.name)
    return accepted(scan)


@kind("derived/32")
def odd_names(scan: Scan, folder: Path) -> Expected:
    names = (
        "a b",
        "#1",
        "Ä ü",
        "x.DCM",
        "noextension",
        "-rf",
        "'quoted\"",
        "new\nline",
        "a.txt",
        "b.zip",
        "c.tar",
        "~",
    )
    for path, name in zip(scan.write(folder), names, strict=False):
        path.rename(folder / name)
    return accepted(scan)


@kind("derived/07")
def two_series_in_one_folder(scan: Scan, folder: Path) -> Expected:
    other = replace(scan, uid=f"{scan.uid}.7", stored=np.stack([scan.other_pixels() for _ in range(scan.count)]))
    scan.write(folder)
    other.write(folder)
    return Expected([scan.hu, other.hu])


@kind("totalsegmentator_j2k")
def no_uids(scan: Scan, folder: Path) -> Expected:
    def change(index: int, dataset: Dataset) -> None:
        meta = dataset.file_meta
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID("1.2.3"), UID(f"1.{index}")
        setting(SeriesInstanceUID="", SOPInstanceUID="", SOPClassUID="", SliceThickness="7.5")(0, dataset)

    scan.write(folder, change)
    return Expected([scan.hu])


@kind("pyd_bad_sequence")
def illegal_uids_and_sequences(scan: Scan, folder: Path) -> Expected:
    def change(index: int, dataset: Dataset) -> None:
        dataset.SOPInstanceUID = f"{index:064x}"
        # An item that claims to be longer than the sequence it lies in, as UN: nobody may walk into it.
        dataset.add_new(0x00091010, "UN", b"\xfe\xff\x00\xe0\xff\x00\x00\x00abcd")

    scan.write(folder, change)
    return accepted(scan)


# ---------------------------------------------------------------------------------------------- pixels and their scale


@kind("derived/12")
def rescale_of_each_slice(scan: Scan, folder: Path) -> Expected:
    scales = [(str(1 + index % 3), str(-1000 - index)) for index in range(scan.count)]

    def change(index: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = scales[index]

    scan.write(folder, change)
    return Expected([np.stack([hounsfield(one, *scale) for one, scale in zip(scan.stored, scales, strict=True)])])


@kind("derived/13")
def fractional_rescale(scan: Scan, folder: Path) -> Expected:
    # No product of these ends in .5, where binary fractions and exact ones may part.
    scan = replace(scan, slope=str(scan.random.choice(["0.3", "0.7", "1.1"])), intercept="-3100.25")
    scan.write(folder)
    return accepted(scan, rounded=True)


@kind("derived/14")
def beyond_int16(scan: Scan, folder: Path) -> Expected:
    scan = replace(scan, slope=str(scan.random.choice(["300", "-300", "299.3"])), intercept="20000.25")
    scan.write(folder)
    exact = [round(int(value) * Fraction(scan.slope) + Fraction(scan.intercept)) for value in scan.stored.flat]
    return accepted(scan, saturated_voxels=sum(not -32768 <= value <= 32767 for value in exact))


@kind("derived/15")
def rubbish_above_the_stored_bits(scan: Scan, folder: Path) -> Expected:
    scan = with_format(scan, PixelFormat(16, int(scan.random.integers(9, 16)), bool(scan.random.integers(2))))

    def change(index: int, dataset: Dataset) -> None:
        unused = scan.random.integers(0, 1 << 16, scan.stored.shape[1:]) & ~((1 << scan.format.stored) - 1)
        stored = scan.stored[index] & ((1 << scan.format.stored) - 1)
        encode(dataset, stored | unused, scan.format, scan.syntax)

    scan.write(folder, change)
    return accepted(scan)


@kind("derived/16")
def signed_without_sign_extension(scan: Scan, folder: Path) -> Expected:
    scan = with_format(scan, PixelFormat(16, int(scan.random.integers(9, 16)), True))
    below = (1 << scan.format.stored) - 1
    scan.write(folder, lambda index, dataset: encode(dataset, scan.stored[index] & below, scan.format, scan.syntax))
    return accepted(scan)


@kind("ts_original", "LIDC-IDRI-0001")
def padding_of_the_other_sign(scan: Scan, folder: Path) -> Expected:
    scan = with_format(scan, FORMATS["s16"])
    scan.stored[:, 0] = -2000
    scan.write(folder, lambda _, dataset: dataset.add_new(0x00280120, "US", 65536 - 2000) if dataset else None)
    return accepted(scan, padding_stored=-2000)


@kind("derived/34")
def surplus_after_the_pixels(scan: Scan, folder: Path) -> Expected:
    # Few against a frame: else they are refused. Fragments of RLE have no place for them.
    native = ImplicitVRLittleEndian if scan.syntax == RLELossless else scan.syntax
    scan = with_format(replace(scan, syntax=native, stored=np.zeros((scan.count, 9, 14))), FORMATS["u12"])
    scan.write(folder, lambda i, dataset: encode(dataset, scan.stored[i], scan.format, scan.syntax, surplus=62))
    return accepted(scan, surplus_bytes=62 * scan.count)


@kind("derived/31")
def no_rescale(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(**{str(scan.random.choice(["RescaleSlope", "RescaleIntercept"])): None}))
    return refused(scan, "NO_RESCALE")


@kind("derived/10")
def a_cut_file(scan: Scan, folder: Path) -> Expected:
    path = scan.write(folder)[int(scan.random.integers(scan.count))]
    data = path.read_bytes()
    path.write_bytes(data[: -int(scan.random.integers(9, 60))])
    return refused(scan, "PIXELS_TRUNCATED")


# ---------------------------------------------------------------------------------------------- positions


@kind("derived/03", "d2n_sliceincrement_001")
def a_missing_slice(scan: Scan, folder: Path) -> Expected:
    gone = int(scan.random.integers(1, scan.count - 1))
    scan.write(folder, slices=[index for index in range(scan.count) if index != gone])
    return refused(scan, "SLICE_GAP", scan.count - 1)


@kind("derived/03", "d2n_sliceincrement_001", split_gaps=True)
def a_missing_slice_split(scan: Scan, folder: Path) -> Expected:
    gone = int(scan.random.integers(3, scan.count - 3))
    scan.write(folder, slices=[index for index in range(scan.count) if index != gone])
    return Expected([scan.hu[:gone], scan.hu[gone + 1 :]], {(scan.uid, "SPLIT_AT_GAPS"): 0})


@kind("derived/20")
def another_step_half_way(scan: Scan, folder: Path) -> Expected:
    half = scan.count // 2

    def change(index: int, dataset: Dataset) -> None:
        height = min(index, half) + 2.5 * max(index - half, 0)
        dataset.ImagePositionPatient = scan.position(height * scan.step_mm)

    scan.write(folder, change)
    return refused(scan, "VARIABLE_SPACING")


@kind("derived/17")
def no_position(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(ImagePositionPatient=None, ImageOrientationPatient=None, SliceLocation="1"))
    return refused(scan, "NO_POSITION")


@kind("derived/35")
def no_pixel_spacing(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(PixelSpacing=None, ImagerPixelSpacing=["0.7", "0.7"]))
    return refused(scan, "NO_PIXEL_SPACING")


@kind("derived/28")
def two_slices(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, slices=[3, 4])
    return refused(scan, "TOO_FEW_SLICES", 2)


def tilted(scan: Scan, folder: Path) -> Scan:
    """Slices that lean by 2 to 25 degrees, stacked along the patient's axis."""
    lean = float(np.deg2rad(scan.random.uniform(2, 25) * scan.random.choice([-1, 1])))
    scan = replace(scan, orientation=(1, 0, 0, 0, float(np.cos(lean)), float(np.sin(lean))))

    def change(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [-10, -20, index * scan.step_mm]
        if scan.random.integers(2):
            dataset.GantryDetectorTilt = f"{np.rad2deg(lean):.2f}"

    scan.write(folder, change)
    return scan


@kind("derived/21", "d2n_gantrytilting_001")
def gantry_tilt(scan: Scan, folder: Path) -> Expected:
    return refused(tilted(scan, folder), "GANTRY_TILT")


@kind("derived/21", "d2n_gantrytilting_001", allow_tilt=True)
def gantry_tilt_allowed(scan: Scan, folder: Path) -> Expected:
    scan = tilted(scan, folder)
    return accepted(scan, tilt_degrees=round(abs(float(np.rad2deg(np.arcsin(scan.orientation[5])))), 2))


@kind("nysbu_coronal", "nysbu_sagittal")
def reformats(scan: Scan, folder: Path) -> Expected:
    along = [(1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0.8, -0.6)][scan.random.integers(3)]
    scan = replace(scan, orientation=along)
    scan.write(folder, setting(ImageType=["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]))
    return refused(scan, "NOT_AXIAL")


# ---------------------------------------------------------------------------------------------- copies and strangers


@kind("derived/04")
def the_same_pixels_again(scan: Scan, folder: Path) -> Expected:
    scan.write(folder)
    scan.write(folder, setting(SOPInstanceUID=f"{scan.uid}.99"), slices=[2])
    return accepted(scan, dropped={"DUPLICATE_DROPPED": 1})


@kind("derived/06")
def the_same_file_again(scan: Scan, folder: Path) -> Expected:
    (folder / "copies").mkdir(parents=True)
    shutil.copy(scan.write(folder)[4], folder / "copies")
    return accepted(scan, dropped={"DUPLICATE_DROPPED": 1})


@kind("derived/05")
def other_pixels_at_one_position(scan: Scan, folder: Path) -> Expected:
    scan.write(folder)
    write(scan.dataset(int(scan.random.integers(scan.count)), scan.other_pixels()), folder / "one more")
    return refused(scan, "DUPLICATE_POSITION", scan.count + 1)


@kind("derived/29")
def two_phases(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(AcquisitionNumber=1))
    other = replace(scan, stored=np.stack([scan.other_pixels() for _ in range(scan.count)]))
    other.write(folder, setting(AcquisitionNumber=2))
    return refused(scan, "DUPLICATE_POSITION", 2 * scan.count)


@kind()
def two_phases_between_each_other(scan: Scan, folder: Path) -> Expected:
    between = replace(scan, stored=np.stack([scan.other_pixels() for _ in range(scan.count)]))
    keyword, values = [("AcquisitionNumber", (1, 2)), ("ConvolutionKernel", ("B30f", "B70f"))][scan.random.integers(2)]
    scan.write(folder, setting(**{keyword: values[0]}))

    def change(index: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = scan.position((index + 0.5) * scan.step_mm)
        setattr(dataset, keyword, values[1])

    between.write(folder, change)
    return refused(scan, "INTERLEAVED", 2 * scan.count)


@kind()
def an_acquisition_for_each_slab(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, lambda index, dataset: setattr(dataset, "AcquisitionNumber", 1 + index // 3))
    return accepted(scan)


@kind()
def a_screen_save_inside(scan: Scan, folder: Path) -> Expected:
    scan.write(folder)
    saved = scan.dataset(0, scan.other_pixels())
    setting(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"], ImagePositionPatient=None)(0, saved)
    write(saved, folder / "dose report")
    return refused(scan, "MIXED_SERIES", scan.count + 1)


@kind()
def modality_in_lower_case(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(Modality=" ct "))
    return accepted(scan)


@kind("derived/08")
def another_matrix_inside(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, slices=range(1, scan.count))
    write(scan.dataset(0, scan.stored[0][:, :-1]), folder / "smaller")
    return refused(scan, "MIXED_MATRIX")


@kind("derived/11")
def a_localizer_inside(scan: Scan, folder: Path) -> Expected:
    scan.write(folder)
    scout = scan.dataset(0, scan.other_pixels()[:5])
    setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])(0, scout)
    write(scout, folder / "scout")
    return accepted(scan, dropped={"LOCALIZER_DROPPED": 1})


@kind("derived/27")
def another_modality(scan: Scan, folder: Path) -> Expected:
    scan.write(folder, setting(Modality=str(scan.random.choice(["MR", "PT", "CR", "SEG"]))))
    return refused(scan, "NOT_CT")


@kind("pyd_dicomdir")
def a_tree_with_its_index(scan: Scan, folder: Path) -> Expected:
    scan.write(folder / "DICOM/PAT0/CT")
    scout, film = replace(scan, uid=f"{scan.uid}.7"), replace(scan, uid=f"{scan.uid}.8")
    scout.write(folder / "DICOM/PAT0/SC", setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), slices=[0, 1])
    film.write(folder / "DICOM/PAT0/CR", setting(Modality="CR"), slices=[0])
    index = scan.dataset(0)
    index.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    index.SOPClassUID = index.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    index.DirectoryRecordSequence = one_item(DirectoryRecordType="IMAGE", ReferencedFileID=["DICOM", "PAT0", "CT"])
    del index.PixelData
    write(index, folder / "DICOMDIR")
    rows = {(None, "DICOMDIR"): 1, (scout.uid, "LOCALIZER"): 2, (film.uid, "NOT_CT"): 1}
    return Expected([scan.hu], rows)
