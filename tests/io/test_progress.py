"""What long work says: a bar where someone watches, plain lines elsewhere, and notes in both."""

import io

import pytest

from dinox_io.progress import ProgressReport


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
    assert ("merging: 2.0 MB" in said) != stream.isatty()


def test_speed_and_time_left_are_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("dinox_io.progress.time.monotonic", lambda: now_s[0])
    stream = io.StringIO()
    with ProgressReport(stream) as progress:
        progress.stage("packing", 4_000_000)
        for _ in range(3):
            now_s[0] += 6
            progress.advance(1_000_000)
    assert stream.getvalue().splitlines() == ["packing: 4.0 MB", "packing: 50%, 0.2 MB/s, 12 s left"]
