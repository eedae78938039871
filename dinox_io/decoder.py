"""What one thread keeps between reads: buffers, one decoder a filter, and counters of what it has done."""

from __future__ import annotations

from dinox_io.codec import FILTERS, SliceDecoder


class ThreadDecoder:
    """Not to be shared between threads. Its counters only grow: read_bytes, read_s, cached_bytes (that came
    from a cache of slices) and the decoders' sums."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(0))
        self._decoders = {name: SliceDecoder(name) for name in FILTERS}
        self.read_bytes, self.read_s, self.cached_bytes = 0, 0.0, 0

    def buffer(self, size: int) -> memoryview:
        """`size` bytes to read into; the same memory as before, where it is large enough."""
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size))
        return self._buffer[:size]

    def of_filter(self, name: str) -> SliceDecoder:
        """The decoder of one filter; ShardError is raised when it decodes."""
        return self._decoders[name]

    @property
    def decoded_bytes(self) -> int:
        return sum(decoder.decoded_bytes for decoder in self._decoders.values())

    @property
    def decode_s(self) -> float:
        return sum(decoder.decode_s for decoder in self._decoders.values())

    @property
    def unfilter_s(self) -> float:
        return sum(decoder.unfilter_s for decoder in self._decoders.values())
