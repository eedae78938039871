"""What long work says: a bar where someone watches, plain lines elsewhere, and notes in both."""

import io

import pytest

from dinox_io.progress import ProgressReport, size_text


class Terminal(io.StringIO):
    """A stream that someone watches."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_stages_and_notes_are_said(stream: io.StringIO) -> None:
    with ProgressReport(stream) as progress:
        progress.stage("merging", 2_000_000)
        progress.note("taken over [of 3] shards")
        progress.advance(2_000_000)
    said = stream.getvalue()
    assert "merging" in said
    assert "taken over [of 3] shards" in said
    assert ("merging: 2.0 MB to do" in said) != stream.isatty()
    assert ("merging: 2.0 MB done in 0.0 s" in said) != stream.isatty()


def test_speed_and_time_left_are_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("dinox_io.progress.time.monotonic", lambda: now_s[0])
    stream = io.StringIO()
    with ProgressReport(stream) as progress:
        progress.stage("packing", 4_000_000)
        for _ in range(3):
            now_s[0] += 6
            progress.advance(1_000_000)
            assert "done" not in stream.getvalue()
    said = [
        "packing: 4.0 MB to do",
        "packing: 50%, 166.7 kB/s, 12 s left",
        "packing: 3.0 MB done in 18.0 s, 166.7 kB/s",
    ]
    assert stream.getvalue().splitlines() == said


def test_no_time_left_is_said_from_the_first_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("dinox_io.progress.time.monotonic", lambda: now_s[0])
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), ProgressReport(stream) as progress:  # noqa: PT012 (what is said until then)
        progress.stage("packing", 4_000_000)
        now_s[0] += 60  # until then, workers were started
        progress.advance(1_000)
        now_s[0] += 12
        progress.advance(1_999_000)
        raise KeyboardInterrupt
    said = ["packing: 4.0 MB to do", "packing: 0%", "packing: 50%, 27.8 kB/s, 72 s left"]
    assert stream.getvalue().splitlines() == said


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (12_345, "12.3 kB"), (145_100_000, "145.1 MB"), (3e12, "3.0 TB")],
)
def test_no_size_is_said_to_be_nothing(size: float, text: str) -> None:
    assert size_text(size) == text
