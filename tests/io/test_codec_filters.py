"""Both tiers of the filters against slow references, on every shape and value; what the C tier refuses; the choice."""

import os
import subprocess
import sys
import threading
import time
from types import ModuleType

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinox_io import codec, filters
from dinox_io.filters import FILTERS, NUMPY, Scratch, Tier, add_histogram, apply_filter, remove_filter
from tests.io.filter_reference import reference, reference_hilp

NO_C = f"the C tier is not there: {filters.describe()}"
TIERS = [
    pytest.param(NUMPY, id="numpy"),
    pytest.param(filters.C, id="c", marks=pytest.mark.skipif(filters.C is None, reason=NO_C)),
]
EXTREMES = st.sampled_from([-32768, -32767, -8193, -8192, -1024, -1, 0, 1, 127, 128, 255, 256, 8191, 8192, 32767])
ANY = st.integers(-32768, 32767)
SLICES = st.one_of(
    hnp.arrays(np.int16, st.tuples(st.integers(1, 13), st.integers(1, 13)), elements=ANY),
    # Around the 16 values that the C tier takes at once, and the 4 rows that belong together.
    hnp.arrays(np.int16, st.tuples(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33])), elements=EXTREMES),
    hnp.arrays(np.int16, st.tuples(st.integers(1, 9), st.sampled_from([4, 8, 64])), elements=st.integers(-1100, 1100)),
    hnp.arrays(np.int16, st.sampled_from([(1, 40), (40, 1), (2, 20), (20, 2)]), elements=EXTREMES),
)


@pytest.fixture
def extension() -> ModuleType:
    if filters.C is None:
        pytest.skip(NO_C)
    from dinox_io import _filters  # type: ignore[attr-defined]

    return _filters


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", FILTERS)
@given(slice_hu=SLICES, first=st.integers(0, 3), padding=st.integers(0, 3), upside_down=st.booleans())
def test_filter_is_its_definition_and_reversible(
    tier: Tier, name: str, slice_hu: np.ndarray, first: int, padding: int, upside_down: bool
) -> None:
    filtered = apply_filter(slice_hu, name, tier=tier)
    assert filtered.tobytes() == reference(slice_hu, name)
    # Into a slot of a larger slab, whose other values must stay.
    rows, columns = slice_hu.shape
    slab = np.full((rows + 2, first + columns + padding), 77, np.int16)
    slot = slab[1:-1, first : first + columns][:: -1 if upside_down else 1]
    remove_filter(filtered, name, slot, Scratch(), tier)
    np.testing.assert_array_equal(slot, slice_hu)
    slot[:] = 77
    assert (slab == 77).all()
    # Out of such a slot, and from rows in the other byte order.
    slot[:] = slice_hu
    np.testing.assert_array_equal(apply_filter(slot, name, tier=tier), filtered)
    np.testing.assert_array_equal(apply_filter(slice_hu.astype(">i2"), name, tier=tier), filtered)


@pytest.mark.parametrize("tier", TIERS)
@given(
    planes=hnp.arrays(np.uint8, st.tuples(st.just(2), st.integers(1, 9), st.sampled_from([1, 2, 7, 16, 24, 48, 65])))
)
def test_any_bytes_are_the_same_pixels_in_both_tiers(tier: Tier, planes: np.ndarray) -> None:
    """A damaged frame gives bytes that no slice has: what they become must not depend on the tier either."""
    for name in ("planes", "hilp"):
        here, there = np.empty(planes.shape[1:], np.int16), np.empty(planes.shape[1:], np.int16)
        remove_filter(planes.reshape(-1), name, here, Scratch(), tier)
        remove_filter(planes.reshape(-1), name, there, Scratch(), NUMPY)
        np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("low", "high"), [(-128, -128), (127, 127), (-1, -128), (-128, 127)])
def test_sums_wrap(tier: Tier, low: int, high: int) -> None:
    """The largest differences, summed up over a long row: far beyond 2^16, and still exact modulo that."""
    filtered = np.array([[low] * 4000, [high] * 4000], np.int8).view(np.uint8).reshape(-1)
    out = np.empty((4, 1000), np.int16)
    remove_filter(filtered, "hilp", out, Scratch(), tier)
    assert apply_filter(out, "hilp", tier=tier).tobytes() == filtered.tobytes()
    assert reference_hilp(out.tolist()) == filtered.tobytes()


@pytest.mark.parametrize("tier", TIERS)
def test_a_large_slice_and_a_reused_scratch(tier: Tier) -> None:
    scratch = Scratch()
    for shape in ((512, 512), (3, 700), (512, 512), (701, 333)):
        slice_hu = np.random.default_rng(1).normal(0, 9000, shape).clip(-32768, 32767).astype(np.int16)
        for name in FILTERS:
            out, filtered = np.empty(shape, np.int16), np.full(2 * slice_hu.size, 7, np.uint8)
            given = apply_filter(slice_hu, name, filtered, tier)
            np.testing.assert_array_equal(given, apply_filter(slice_hu, name, tier=NUMPY))
            assert given is filtered or name == "none"
            remove_filter(given, name, out, scratch, tier)
            np.testing.assert_array_equal(out, slice_hu)


@pytest.mark.parametrize("tier", TIERS)
@given(values=hnp.arrays(np.int16, hnp.array_shapes(max_dims=3, max_side=7), elements=st.one_of(EXTREMES, ANY)))
def test_histogram(tier: Tier, values: np.ndarray) -> None:
    counts = np.arange(4096)
    expected = list(range(4096))
    for value in values.ravel().tolist():
        expected[(value + 32768) // 16] += 1
    add_histogram(values, counts, tier)
    assert counts.tolist() == expected


@pytest.mark.parametrize("tier", TIERS)
def test_histogram_of_every_value(tier: Tier) -> None:
    every = np.arange(-32768, 32768, dtype=np.int32).astype(np.int16)
    counts = np.zeros(4096, np.int64)
    add_histogram(np.tile(every, 5)[:-1], counts, tier)  # more than one piece of the NumPy tier, no multiple of 4
    assert counts.tolist() == [80] * 4095 + [79]


@pytest.mark.parametrize("tier", TIERS)
def test_columns_apart_are_refused(tier: Tier) -> None:
    for out in (np.empty((4, 8), np.int16)[:, ::2], np.empty((4, 4), np.float16), np.empty((4, 4), ">i2")):
        with pytest.raises(ValueError, match="side by side"):
            remove_filter(np.zeros(32, np.uint8), "hilp", out, Scratch(), tier)


SLICE, FILTERED = np.zeros((3, 5), np.int16), np.zeros(30, np.uint8)
MISALIGNED = np.zeros(31, np.uint8)[1:].view(np.int16).reshape(3, 5)
BAD_SLICES = {
    "none": None,
    "bytes": bytes(30),
    "one dimension": np.zeros(15, np.int16),
    "three dimensions": np.zeros((1, 3, 5), np.int16),
    "another sign": np.zeros((3, 5), np.uint16),
    "another size of item": np.zeros((3, 5), np.int32),
    "another kind": np.zeros((3, 5), np.float16),
    "another byte order": np.zeros((3, 5), ">i2"),
    "columns apart": np.zeros((3, 10), np.int16)[:, ::2],
    "columns mirrored": np.zeros((3, 5), np.int16)[:, ::-1],
    "columns outside": np.zeros((5, 3), np.int16).T,
    "no row": np.zeros((0, 5), np.int16),
    "no column": np.zeros((3, 0), np.int16),
    "odd address": MISALIGNED,
    "odd distance of rows": np.lib.stride_tricks.as_strided(np.zeros(99, np.int16), (3, 5), (11, 2)),
}
BAD_FILTERED = {
    "none": None,
    "text": "0" * 30,
    "a byte short": FILTERED[:-1],
    "a byte long": np.zeros(31, np.uint8),
    "every other byte": np.zeros(60, np.uint8)[::2],
    "signed": np.zeros(30, np.int8),
    "wide": np.zeros(15, np.int16),
}


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


@pytest.mark.parametrize("name", ["hilp", "planes"])
@pytest.mark.parametrize("bad", BAD_SLICES.values(), ids=BAD_SLICES)
def test_the_extension_refuses_what_is_no_slice(extension: ModuleType, name: str, bad: object) -> None:
    with pytest.raises(ValueError, match="slice"):
        getattr(extension, f"filter_{name}")(bad, FILTERED)
    with pytest.raises(ValueError, match="slice"):
        getattr(extension, f"unfilter_{name}")(FILTERED, bad)


@pytest.mark.parametrize("name", ["hilp", "planes"])
@pytest.mark.parametrize("bad", BAD_FILTERED.values(), ids=BAD_FILTERED)
def test_the_extension_refuses_bytes_that_are_not_as_many(extension: ModuleType, name: str, bad: object) -> None:
    with pytest.raises(ValueError, match="filtered"):
        getattr(extension, f"filter_{name}")(SLICE, bad)
    with pytest.raises(ValueError, match="filtered"):
        getattr(extension, f"unfilter_{name}")(bad, SLICE)


@pytest.mark.parametrize("name", ["hilp", "planes"])
def test_the_extension_takes_no_more_than_it_is_given(extension: ModuleType, name: str) -> None:
    apply, remove = getattr(extension, f"filter_{name}"), getattr(extension, f"unfilter_{name}")
    endless = np.lib.stride_tricks.as_strided(SLICE, (1 << 31, 1 << 30), (0, 2), writeable=True)
    with pytest.raises(ValueError, match="filtered"):
        apply(endless, FILTERED)
    with pytest.raises(ValueError, match="filtered"):
        remove(FILTERED, endless)
    with pytest.raises(ValueError, match="writable"):
        apply(SLICE, bytes(30))
    with pytest.raises(ValueError, match="writable"):
        remove(bytes(30), read_only(SLICE))
    for arguments in ((), (SLICE,), (SLICE, FILTERED, FILTERED)):
        with pytest.raises(TypeError, match="2"):
            apply(*arguments)
        with pytest.raises(TypeError, match="2"):
            remove(*arguments)
    # What may be read only is read; all buffers were let go: an array whose buffer is held cannot be resized.
    apply(read_only(SLICE), FILTERED)
    remove(bytes(30), SLICE)
    for held in (bytearray(30), bytearray(31)):
        for call in (lambda held=held: apply(SLICE, held), lambda held=held: remove(held, SLICE)):
            if len(held) == 30:
                call()
            else:
                with pytest.raises(ValueError, match="31"):
                    call()
        held.clear()


def test_the_histogram_of_the_extension_refuses_what_does_not_fit(extension: ModuleType) -> None:
    counts = np.zeros(4096, np.int64)
    for bad in (None, "text", SLICE.astype(np.int32), SLICE[:, ::2], MISALIGNED, SLICE.astype(">i2")):
        with pytest.raises(ValueError, match="values"):
            extension.add_histogram(bad, counts)
    for bad in (None, counts[:-1], np.zeros(4096, np.int32), np.zeros(8192, np.int64)[::2], read_only(counts)):
        with pytest.raises(ValueError, match="counts"):
            extension.add_histogram(SLICE, bad)
    extension.add_histogram(np.zeros(0, np.int16), counts)
    assert not counts.any()


def test_the_extension_lets_other_threads_run(extension: ModuleType) -> None:
    """While one large slice is filtered, this thread goes on counting; it could not if the lock were kept."""
    slice_hu = np.zeros((8192, 8192), np.int16)
    filtered = np.empty(2 * slice_hu.size, np.uint8)
    filtered[:] = 0
    span: list[float] = []

    def work() -> None:
        begin = time.perf_counter()
        for _ in range(3):
            extension.filter_hilp(slice_hu, filtered)
        span.extend((begin, time.perf_counter()))

    # A thread that waits for the lock gets it between two bytecodes at the earliest, so never inside the extension.
    thread = threading.Thread(target=work)
    thread.start()
    ticks = []
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    begin, end = span
    assert sum(begin < tick < end for tick in ticks) > 10


def test_the_choice_and_what_is_said_of_it() -> None:
    c = NUMPY._replace(name="c")
    assert filters._choose(c, "AVX2", None) == (c, "filters: C (AVX2)")
    assert filters._choose(c, "AVX2", "c") == (c, "filters: C (AVX2)")
    assert filters._choose(c, "AVX2", "numpy") == (NUMPY, "filters: NumPy (DINOX_FILTERS=numpy)")
    assert filters._choose(None, "no compiler", "") == (NUMPY, "filters: NumPy (no compiler)")
    with pytest.raises(ImportError, match="no compiler"):
        filters._choose(None, "no compiler", "c")
    with pytest.raises(ImportError, match="c and numpy"):
        filters._choose(c, "AVX2", "C++")


def test_an_extension_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("dinox_io._filters")
    other.INTERFACE = -1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dinox_io._filters", other)
    tier, why = filters._load_c()
    assert tier is None
    assert "another version" in why


@pytest.mark.parametrize("wanted", ["numpy", "c", None])
def test_the_environment_forces_a_tier(wanted: str | None) -> None:
    if wanted == "c" and filters.C is None:
        pytest.skip(NO_C)
    code = "from dinox_io import codec; print(codec.tier(), codec.describe(), sep='|')"
    environment = {name: value for name, value in os.environ.items() if name != "DINOX_FILTERS"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"DINOX_FILTERS": wanted} if wanted else {})
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    tier, described = told.stdout.strip().split("|")
    assert tier == (wanted or ("c" if filters.C else "numpy"))
    assert described.startswith("filters: C" if tier == "c" else "filters: NumPy")


def test_what_runs_here_is_the_tier_that_is_told() -> None:
    assert codec.tier() == filters.TIER.name
    assert codec.describe() == filters.describe()
