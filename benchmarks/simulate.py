"""Sets and clusters beyond this machine: where the loader's knee moves, and what breaks first.

    rate of a rank = min(compute, cores / (slices a window x seconds a slice), bytes / s, requests / s)

What depends on the code (manifest, index, order, slices that a rank decodes for a window) is measured with the code;
what depends on a machine (cores, disk, store, compute) is given on the command line, and printed.
Invariant: a figure that was not measured here is marked with ~, and its assumption stands above the table.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scale_sizes import (
    FRAME_BYTES,
    SHARD_BYTES,
    SLICES,
    Opening,
    OrderCost,
    Reading,
    SetSizes,
    extrapolated,
    measured_set,
    memory_of_index,
    opening_s,
    order_cost,
    reading_of,
    reopening_s,
)

from dinox_io.cloud import BucketFolder
from dinox_io.descriptors import most_descriptors
from dinox_io.manifest import MAX_MANIFEST_BYTES

_EPILOG = """\
examples:
  python benchmarks/simulate.py                         both tables, as in docs/scale.md
  python benchmarks/simulate.py --images-per-s 40 --cores 16 --largest 1000

exit code: 0 simulated; 2 the assumptions are impossible
"""
VOLUMES = (10**2, 10**3, 10**4, 10**5, 10**6)
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
GIB = 1 << 30
OPENED = (50, 150)
"""Volumes of the sets that are really written and opened, to know what a volume costs."""


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Where shards lie, as the ranks meet it."""

    name: str
    node_bytes_per_s: float
    """That a node can read."""
    all_bytes_per_s: float
    """That all nodes together can."""
    reads_per_s: float
    """Of all together."""
    wait_s: float
    """From asking to the first byte."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed of machines."""

    images_per_s: float
    """That a rank's device takes."""
    slice_s: float
    """Of a core, to unpack a slice."""
    cores: int
    """Of a rank, for loading."""
    ranks_per_node: int
    node_memory_bytes: float
    batch_size: int
    open_files: int
    """That a process may have: its hard limit, to which the soft one is raised."""

    @property
    def open_shards(self) -> int:
        """Shards that a rank has open at once; others are opened again when they are read."""
        return most_descriptors(self.open_files)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A rank's part in training on a storage."""

    images_per_s: float
    """That it reaches."""
    bound: str
    threads: int
    """At the knee: the fewest that do not hold the device up, or all that help."""
    bytes_per_s: float
    """Of all ranks."""
    reads_per_s: float
    """Of all ranks."""


def load_of(cluster: Cluster, storage: Storage, reading: Reading, ranks: int) -> Load:
    """The least of what compute, decoding and storage allow, and the threads that reach it."""
    nodes = -(-ranks // cluster.ranks_per_node)
    bytes_per_window = reading.slices * FRAME_BYTES
    of_storage = min(storage.all_bytes_per_s, nodes * storage.node_bytes_per_s) / ranks / bytes_per_window
    limits = {
        "compute": cluster.images_per_s,
        "decode": cluster.cores / (reading.slices * cluster.slice_s),
        "storage, bytes/s": of_storage,
        "storage, requests/s": storage.reads_per_s / ranks / reading.reads,
    }
    bound = min(limits, key=lambda name: limits[name])
    rate = limits[bound]
    # A thread waits for its read, then decodes it: so many are under way at a time (Little's law).
    of_read_s = storage.wait_s + bytes_per_window / reading.reads / storage.node_bytes_per_s
    busy = rate * (reading.reads * of_read_s + reading.slices * cluster.slice_s)
    return Load(
        images_per_s=rate, bound=bound, threads=max(math.ceil(busy), 1), bytes_per_s=ranks * rate * bytes_per_window,
        reads_per_s=ranks * rate * reading.reads,
    )  # fmt: skip


def breaks(cluster: Cluster, sizes: SetSizes, order: OrderCost, opening: dict[str, float]) -> list[str]:
    """What of a set of this size does not work with one rank a device, the worst first."""
    found = []
    if sizes.manifest_bytes > MAX_MANIFEST_BYTES:
        found.append(f"the manifest is beyond {MAX_MANIFEST_BYTES >> 20} MiB: it is not read")
    memory = memory_of_node(cluster, sizes, order)
    if memory > 0.1 * cluster.node_memory_bytes:
        found.append(f"{memory / GIB:.0f} GiB of a node's memory for the index of {cluster.ranks_per_node} ranks")
    found += [f"opening takes {seconds / 60:.0f} min ({name})" for name, seconds in opening.items() if seconds > 600]
    return found


def memory_of_node(cluster: Cluster, sizes: SetSizes, order: OrderCost) -> float:
    """Bytes of the index, the manifest and the order of all ranks of a node: each has its own."""
    return cluster.ranks_per_node * (sizes.open_bytes + order.peak_bytes)


def opening_of(sizes: SetSizes, of_volume: Opening, storages: Sequence[Storage], ranks: int) -> dict[str, float]:
    """Seconds until so many ranks have opened a set: the code's own, and the waits for small reads, of which a store
    answers each rank 16 at once."""
    return {
        one.name: sizes.parse_s
        + sizes.volumes * (of_volume.known_s + of_volume.checked_s / ranks)
        + sizes.opening_reads(ranks) * one.wait_s / (BucketFolder.in_flight if one.wait_s > 1e-3 else 1)
        for one in storages
    }


def table_of_sets(cluster: Cluster, storages: Sequence[Storage], largest: int, of_volume: Opening) -> list[str]:
    """A line for each number of volumes."""
    ranks = cluster.ranks_per_node
    names = " | ".join(f"opening, {one.name}, {count}" for one in storages for count in _counted(ranks))
    lines = [
        f"| volumes | on disk | shards | open at once | manifest | index | open set, a rank | order, a rank | "
        f"all of {ranks} ranks of a node | order's start | {names} | what breaks |",
        "| ---: " * (10 + 2 * len(storages)) + "| --- |",
    ]
    last: SetSizes | None = None
    for volumes in VOLUMES:
        last_measured = last
        sizes = (
            measured_set(volumes)
            if volumes <= largest or last_measured is None
            else extrapolated(last_measured, volumes)
        )
        last = sizes if sizes.measured else last
        order = order_cost(volumes, cluster.batch_size)
        alone, together = (opening_of(sizes, of_volume, storages, count) for count in (1, ranks))
        mark = "" if sizes.measured else "~"
        cells = [
            f"{volumes:,}", f"~{_bytes(sizes.stored_bytes)}", f"~{sizes.shards:,}",
            f"~{min(sizes.shards, cluster.open_shards):,}", mark + _bytes(sizes.manifest_bytes),
            mark + _bytes(sizes.index_bytes), mark + _bytes(sizes.open_bytes), _bytes(order.peak_bytes),
            mark + _bytes(memory_of_node(cluster, sizes, order)), f"{1e3 * order.start_s:.0f} ms",
            *(f"~{_time(one[name])}" for name in alone for one in (alone, together)),
            "; ".join(breaks(cluster, sizes, order, together)) or "nothing",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _counted(ranks: int) -> tuple[str, str]:
    return "1 rank", f"{ranks} ranks"


def table_of_ranks(cluster: Cluster, storages: Sequence[Storage]) -> list[str]:
    """A line for each number of ranks, mode and storage."""
    lines = [
        "| ranks | mode | slices a window | storage | images/s a rank | threads a rank at the knee | GB/s, all | "
        "requests/s, all | bound |",
        "| ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for ranks in RANKS:
        if cluster.batch_size % ranks:
            lines.append(
                f"| {ranks:,} | any | | any | | | | | a batch of {cluster.batch_size} has no window for each |"
            )
            continue
        for mode in ("runs", "random"):
            reading = reading_of(ranks, mode, batch_size=cluster.batch_size)
            for storage in storages:
                load = load_of(cluster, storage, reading, ranks)
                lines.append(
                    f"| {ranks:,} | {mode} | {reading.slices:.2f} | {storage.name} | ~{load.images_per_s:.3g} | "
                    f"~{load.threads} | ~{load.bytes_per_s / 1e9:.3g} | ~{load.reads_per_s:,.0f} | {load.bound} |"
                )
    return lines


def _bytes(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.2g} s"


def storages_of(given: argparse.Namespace) -> list[Storage]:
    """A local disk in every node, and an object store that all share."""
    return [
        Storage(
            name="local disk", node_bytes_per_s=1e9 * given.disk_gbps, all_bytes_per_s=math.inf,
            reads_per_s=math.inf, wait_s=1e-4,
        ),
        Storage(
            name="object store", node_bytes_per_s=1e9 * given.network_gbps, all_bytes_per_s=1e9 * given.store_gbps,
            reads_per_s=given.store_requests, wait_s=1e-3 * given.store_ms,
        ),
    ]  # fmt: skip


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images-per-s", type=float, default=150.0, help="of a rank's device (default: 150, ViT-L on an H100)")
    add("--slice-ms", type=float, default=0.36, help="of a core, to unpack a slice (default: 0.36, docs/loader.md)")
    add("--cores", type=int, default=8, help="of a rank, for loading (default: 8)")
    add("--ranks-per-node", type=int, default=8, help="(default: 8)")
    add("--node-memory-gib", type=float, default=1024.0, help="(default: 1024)")
    add("--batch-size", type=int, default=2048, help="of an update, over all ranks (default: 2048)")
    add("--open-files", type=int, default=1024, help="hard limit of a process, ulimit -Hn (default: 1024)")
    add("--disk-gbps", type=float, default=3.0, help="of a node's disk, 10^9 bytes/s (default: 3)")
    add("--network-gbps", type=float, default=3.0, help="of a node, to the store, 10^9 bytes/s (default: 3)")
    add("--store-gbps", type=float, default=100.0, help="of the store to all, 10^9 bytes/s (default: 100)")
    add("--store-requests", type=float, default=5500.0, help="a second for one prefix (default: 5500, as S3 says)")
    add("--store-ms", type=float, default=30.0, help="from a request to its first byte (default: 30)")
    add(
        "--largest", type=int, default=10**4, help="volumes of the largest made-up set (default: 10000, 1 GB of memory)"
    )
    return parser.parse_args(arguments)


def cluster_of(given: argparse.Namespace) -> Cluster:
    """Raises ValueError for what no machine is."""
    numbers = [value for value in vars(given).values() if isinstance(value, int | float)]
    if min(numbers) <= 0:
        raise ValueError("every assumption must be above 0")
    return Cluster(
        images_per_s=given.images_per_s, slice_s=1e-3 * given.slice_ms, cores=given.cores,
        ranks_per_node=given.ranks_per_node, node_memory_bytes=GIB * given.node_memory_gib,
        batch_size=given.batch_size, open_files=given.open_files,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parse_arguments(arguments)
    try:
        cluster = cluster_of(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    storages = storages_of(given)
    with tempfile.TemporaryDirectory(prefix="dinox-simulate-") as name:
        small, large = ((Path(name) / str(count)) for count in OPENED)
        taken = []
        for folder, count in ((small, OPENED[0]), (large, OPENED[1])):
            folder.mkdir()
            taken.append(opening_s(folder, count))
        reopened_s = reopening_s(Path(name))
    more = OPENED[1] - OPENED[0]
    of_volume = Opening(
        max(taken[1].known_s - taken[0].known_s, 0.0) / more, max(taken[1].checked_s - taken[0].checked_s, 0.0) / more
    )
    per_volume, per_slice = memory_of_index()
    print(
        f"A volume: {SLICES} slices of 512 x 512, {_bytes(SLICES * FRAME_BYTES)} stored; shards of "
        f"{SHARD_BYTES >> 20} MiB. Measured: opening takes {1e3 * of_volume.known_s:.3f} ms a volume in each rank and "
        f"{1e3 * of_volume.checked_s:.3f} ms that ranks share, beside the waits; an open set has {per_volume:,.0f} "
        f"bytes a volume and {per_slice:.1f} a slice, in each rank; a shard that had to be closed is opened again in "
        f"{1e6 * reopened_s:.0f} us."
    )
    print("Assumed:", ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in vars(given).items()))
    print("~: not measured here: extrapolated, or from an assumption.\n")
    print("\n".join(table_of_sets(cluster, storages, given.largest, of_volume)), end="\n\n", flush=True)
    print("\n".join(table_of_ranks(cluster, storages)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
