"""A set in a bucket of an S3-compatible store, read as ranges of its objects (obstore, the extra `cloud`).

Invariant: a range is what was asked for, all of it, of the object as it was when the set was opened, or ShardError;
every wait is bounded; nothing is ever written. Endpoint, region and credentials are the environment's (AWS_*).
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dinox_io.errors import ShardError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import S3Store

TRIES = 5
TIMEOUT_S = 30.0
"""Of one try, its answer included. All of them, with the waits between, end within the 300 s of a loader."""
FIRST_WAIT_S = 0.5
"""Before the second try, at most; twice as long before each one after."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_MOST_TOLD = 400
Answer = TypeVar("Answer")


def is_address(path: object) -> bool:
    """Whether `path` is a string like s3://bucket/prefix, of any scheme, and not a place of the file system."""
    return isinstance(path, str) and _ADDRESS.fullmatch(path) is not None


class BucketFolder:
    """What lies under s3://BUCKET/PREFIX; a ShardFolder. Safe to use from many threads at once."""

    in_flight = 16

    def __init__(self, address: str) -> None:
        """ShardError if the address is none of s3://; ImportError without obstore. Nothing is asked of the store."""
        bucket, prefix = _parts(address)
        self._address = f"s3://{bucket}/{prefix}".rstrip("/")
        self.store = _store(bucket, prefix)

    def __str__(self) -> str:
        return self._address

    def address_of(self, name: str) -> str:
        """s3://BUCKET/PREFIX/NAME"""
        return f"{self._address}/{name}"

    def open(self, name: str, size: int | None = None) -> BucketFile:
        """One request, or none where its size is given. ShardError if it is missing or cannot be reached."""
        return BucketFile(self, name, size)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """All bytes of a small object. FileNotFoundError if there is none; ShardError, before it is read, if it has
        more than the limit, or if it cannot be read."""
        import obstore

        def once() -> bytes:
            answer = obstore.get(self.store, name)
            size = answer.meta["size"]
            if size > limit_bytes:
                raise ShardError(f"has more than the {limit_bytes} bytes that it may have", file=_last(name))
            data = bytes(answer.bytes())
            if len(data) != size:
                raise _IncompleteError(f"{len(data)} of its {size} bytes came")
            return data

        return _tried(once, self.address_of(name), "it")

    def has(self, name: str) -> bool:
        """One request."""
        import obstore

        try:
            _tried(lambda: obstore.head(self.store, name), self.address_of(name), "it")
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """FOLDER/NAME of what lies right in a subfolder, sorted; empty if there is none. ShardError."""
        import obstore

        def once() -> list[str]:
            return sorted(one["path"] for one in obstore.list_with_delimiter(self.store, prefix=folder)["objects"])

        return _tried(once, self.address_of(folder), "the list of its objects")


class BucketFile:
    """An object as it is at the first request; a ShardFile. Each read is one range request (tried again where it
    fails)."""

    def __init__(self, folder: BucketFolder, name: str, size: int | None = None) -> None:
        """size: that it is to have; nothing is asked then, and the first answer is compared with it."""
        self.name, self._address, self._store = name, folder.address_of(name), folder.store
        self._known: tuple[str | None, int] | None = None  # its tag, its size
        self._lock = threading.Lock()
        if size is None:
            size = self._look()
        self.size = size

    def _look(self) -> int:
        import obstore

        try:
            meta = _tried(lambda: obstore.head(self._store, self.name), self._address, "it")
        except FileNotFoundError:
            raise _missing(self._address) from None
        self._known = meta["e_tag"], meta["size"]
        return meta["size"]

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See ShardFile. ShardError also where the object is another one than when it was opened."""
        stop = start + len(buffer)
        if stop > self.size:
            raise ShardError(f"ends at byte {self.size}, {stop - self.size} bytes early", file=self.name)
        if start == stop:
            return  # HTTP knows no empty range
        try:
            _tried(lambda: self._fill(start, stop, buffer), self._address, f"bytes {start} to {stop}")
        except FileNotFoundError:
            raise _missing(self._address) from None

    def _fill(self, start: int, stop: int, buffer: memoryview) -> None:
        import obstore

        options: GetOptions = {"range": (start, stop)}
        known = self._known
        if known is not None and known[0] is not None:
            options["if_match"] = known[0]
        answer = obstore.get(self._store, self.name, options=options)
        self._compare(answer.meta["e_tag"], answer.meta["size"])
        if answer.range != (start, stop):
            raise _IncompleteError(f"bytes {answer.range[0]} to {answer.range[1]} came")
        out, done = np.frombuffer(buffer, np.uint8), 0
        # All at once as a rule; but no more is held in memory than was asked for, whatever comes.
        for data in answer.stream(min_chunk_size=stop - start):
            if done + len(data) > len(out):
                raise _IncompleteError(f"more than {len(out)} bytes came")
            np.copyto(out[done : done + len(data)], np.frombuffer(data, np.uint8))  # lets other threads run
            done += len(data)
        if done < len(out):
            raise _IncompleteError(f"only {done} bytes came")

    def _compare(self, e_tag: str | None, size: int) -> None:
        with self._lock:
            if self._known is None:
                if size != self.size:
                    raise ShardError(f"has {size} bytes where the manifest says {self.size}", file=self.name)
                self._known = e_tag, size
            elif (e_tag, size) != self._known:  # not every store heeds If-Match
                raise _changed(self._address)

    def close(self) -> None:
        """Nothing to close: connections belong to the store, which shares them."""


def _parts(address: str) -> tuple[str, str]:
    """Bucket and prefix, which may be empty. ShardError."""
    found = _ADDRESS.fullmatch(address)
    scheme, rest = found.groups() if found else ("", "")
    if scheme != "s3":
        raise ShardError(f"{address}: shards are read from a folder, or from s3://BUCKET/PREFIX")
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if not _BUCKET.fullmatch(bucket) or any(part in ("", ".", "..") for part in prefix.split("/") if prefix):
        raise ShardError(f"{address}: is not s3://BUCKET/PREFIX")
    return bucket, prefix


def _store(bucket: str, prefix: str) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise ImportError(
            "reading shards from a bucket needs the package obstore: pip install 'dinox[cloud]'"
        ) from error
    # A setting of the client that is given among the store's, as client_options would hide those of the environment.
    of_client: dict[str, Any] = {"timeout": f"{round(TIMEOUT_S * 1e3)}ms"}
    # Trying again is ours: obstore does not where an answer breaks off.
    return S3Store(bucket, prefix=prefix or None, retry_config={"max_retries": 0}, **of_client)


class _IncompleteError(Exception):
    """An answer that is not all that was asked for."""


def _tried(request: Callable[[], Answer], address: str, what: str) -> Answer:
    """The answer, at the latest of the last try. FileNotFoundError; ShardError with the address, `what`, and why."""
    from obstore.exceptions import BaseError, GenericError, PreconditionError

    tries = 0
    while True:
        tries += 1
        try:
            return request()
        except ShardError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from None
        except PreconditionError:
            raise _changed(address) from None
        except (GenericError, _IncompleteError) as error:  # the store is busy or ill, or the way to it
            if tries == TRIES:
                raise ShardError(f"{what} cannot be read, in {tries} tries ({_reason(error)})", file=address) from None
        except (BaseError, OSError, ValueError) as error:  # it refuses: the rights, the address
            raise ShardError(f"{what} cannot be read ({_reason(error)})", file=address) from None
        # Random, so that threads that failed together do not come back together.
        time.sleep(FIRST_WAIT_S * 2 ** (tries - 1) * random.SystemRandom().uniform(0.5, 1))


def _reason(error: Exception) -> str:
    """What obstore says before it lists its internals, on one line."""
    reason = " ".join(str(error).partition("\n\nDebug source")[0].split())
    if "builder error" in reason:
        reason += "; an endpoint without TLS, http://, must be allowed: AWS_ALLOW_HTTP=true"
    return reason if len(reason) <= _MOST_TOLD else reason[:_MOST_TOLD] + "…"


def _missing(address: str) -> ShardError:
    return ShardError("there is no such object", file=address)


def _changed(address: str) -> ShardError:
    return ShardError("the object changed since the set was opened; open it again", file=address)


def _last(name: str) -> str:
    return name.rpartition("/")[2]
