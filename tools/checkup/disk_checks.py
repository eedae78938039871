"""The disk beside --output: what it is, whether checkpoints have room, whether it is fast: facts -> findings."""

from __future__ import annotations

from checkup.finding import Outcome, fail, ok, warn
from checkup.machine import Machine

_GB = 1e9
PASSING = ("tmpfs", "ramfs")
OF_A_CONTAINER = ("overlay", "aufs")
FAR = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone")
SLOW = 50e6
"""Bytes a second that any disk of this century reaches."""
LONG_SAVE_S = 60.0
LITTLE_ROOM = 20e9


def disk(machine: Machine) -> Outcome:
    """The kind of file system."""
    found = machine.disk
    if found is None:
        return None
    if found.trouble is not None:
        return fail(
            "disk",
            f"{found.kind}: {found.trouble}",
            why="a run cannot write there",
            mend="give --output another folder",
        )
    if found.kind in PASSING:
        return fail(
            "disk",
            found.kind,
            why="it lies in memory: checkpoints are gone with the power",
            mend="put run.folder on a disk",
        )
    if found.kind in OF_A_CONTAINER:
        return warn(
            "disk",
            f"{found.kind}, the container's own layer",
            why="it goes when the container goes",
            mend="mount a folder of the host for run.folder",
        )
    if found.kind in FAR:
        return warn(
            "disk",
            f"{found.kind}, another machine's",
            why="a run waits for its checkpoints, and ends when that machine or the network is away for long",
            mend="put run.folder on a local disk, and copy checkpoints from there",
        )
    return ok("disk", found.kind)


def disk_room(machine: Machine) -> Outcome:
    """Free space for the checkpoints that a run keeps."""
    found, wanted = machine.disk, machine.wanted
    if found is None:
        return None
    seen = f"{found.free_bytes / _GB:.1f} GB are free"
    mend = "make room, or keep fewer: checkpoint.keep_last, checkpoint.keep_every"
    if wanted.checkpoint_bytes is None or wanted.checkpoints is None:
        if found.free_bytes < LITTLE_ROOM:
            return warn(
                "disk-room",
                seen,
                why="a checkpoint of vit_l takes 6 GB, and several are kept; --config says what yours takes",
                mend=mend,
            )
        return ok("disk-room", seen)
    each, number = wanted.checkpoint_bytes, wanted.checkpoints
    seen += f"; {number} checkpoints of {each / _GB:.2f} GB are kept at most"
    if found.free_bytes < 2 * each:
        return fail("disk-room", seen, why="the second checkpoint has no room: what is learnt is lost", mend=mend)
    if found.free_bytes < number * each:
        return warn("disk-room", seen, why="the disk will be full before the run ends", mend=mend)
    return ok("disk-room", seen)


def disk_speed(machine: Machine) -> Outcome:
    """Writing and reading."""
    found, wanted = machine.disk, machine.wanted
    if found is None or not found.write_bytes_per_s or not found.read_bytes_per_s:
        return None
    write, read = found.write_bytes_per_s, found.read_bytes_per_s
    seen = f"written and synced at {write / 1e6:.0f} MB/s, read at {read / 1e6:.0f} MB/s"
    seen += " (maybe from the system's cache)" if found.read_is_cached else ""
    if wanted.window_bytes:
        seen += f": {read / wanted.window_bytes:.0f} windows a second, if the shards lie there"
    save_s = wanted.checkpoint_bytes / write if wanted.checkpoint_bytes else 0.0
    if save_s:
        seen += f"; a checkpoint takes {save_s:.1f} s"
    if min(write, read) < SLOW or save_s > LONG_SAVE_S:
        return warn(
            "disk-speed",
            seen,
            why="where a checkpoint takes longer than an update, training waits for it; windows wait for reads",
            mend="a local SSD; or larger checkpoint.every",
        )
    return ok("disk-speed", seen)


CHECKS = (disk, disk_room, disk_speed)
