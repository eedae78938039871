"""What ranks send each other in an update, what that takes on which link, and whether a rank's memory is enough: a
simulation from byte counts (collective_bytes.py, rank_memory.py) and from what makers publish of machines.

    seconds on a link = bytes that a rank sends / bytes a second + messages one after another x latency
    share of an update = what is not hidden / (the update's work + what is not hidden)

"Overlapped" hides what can be hidden, all of it: a network card and its driver take nothing of the device then. The
truth lies between both. Work is at the machine's fastest (dinox_train/plan_machines.py), so that shares are upper ends.
Invariant: nothing is measured here and nothing is sent; each rank has the same number of images, whatever their number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import machine
import result
from collective_bytes import Collective, collectives_of, sent_bytes
from rank_memory import Mode, RankMemory, items_of, memory_of_rank

from dinox_train.config import Config, ConfigError, load_config
from dinox_train.learner import make_objective, vit_config
from dinox_train.plan import StagePlan, flops_of
from dinox_train.plan_machines import MACHINES
from dinox_train.plan_speed import stage_speed
from dinox_train.prototype_counts import with_prototypes
from dinox_train.span import Span, short
from dinox_train.stages import Stage

_EPILOG = """\
examples:
  python benchmarks/communication.py                                   all tables, as in docs/cluster.md
  python benchmarks/communication.py --models vit_l --ranks 2 --images 64 --machine rtx_4090
  python benchmarks/communication.py --output benchmarks/results/communication.json

exit code: 0 counted; 2 the assumptions are impossible
"""
CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GIB = 1 << 30
MODELS = ("vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_7b")
LARGE = ("vit_l", "vit_h", "vit_g", "vit_7b")
RANKS = (2, 4, 8, 64)
MEMORIES = (24, 48, 96, 128, 192)
BATCH = 2048
"""Images of a batch whose prototypes memory is planned with."""
PIECES = (32, 8, 1)
"""Images of a micro-batch that are tried, the most first."""


class Link(NamedTuple):
    """What a rank sends through, both ways at once."""

    name: str
    bytes_per_s: float
    """Each way, as named: what is reached is less."""
    latency_s: float
    """Of a message; estimates: a kernel's TCP, RDMA, NVLink."""


LINKS = (
    Link("10 Gb/s", 10e9 / 8, 30e-6),
    Link("25 Gb/s", 25e9 / 8, 30e-6),
    Link("100 Gb/s", 100e9 / 8, 5e-6),
    Link("400 Gb/s", 400e9 / 8, 5e-6),
    Link("NVLink 450 GB/s", 450e9, 2e-6),
    Link("NVLink 900 GB/s", 900e9, 2e-6),
)


class Arm(NamedTuple):
    """A way of spreading a run."""

    mode: Mode
    precision: str

    @property
    def words(self) -> str:
        return f"{self.mode}, {self.precision}"


ARMS = (Arm("ddp", "bf16"), Arm("fsdp", "bf16"), Arm("fsdp", "bf16_weights"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network spread in one way over so many ranks."""

    model: str
    arm: Arm
    ranks: int
    micro_batches: int
    fits: bool
    """Into the machine's memory; else it is counted with one image at a time."""
    collectives: Sequence[Collective]
    work_s: Span
    """Of a rank's update, as if it were alone."""
    backward_share: float
    """Of that, the last micro-batch's backward."""

    @property
    def sent(self) -> float:
        return sent_bytes(self.collectives, self.ranks)

    def seconds(self, link: Link, behind: str | None = None) -> float:
        """Of all collectives, or of those that hide behind `behind`."""
        chosen = [one for one in self.collectives if behind in (None, one.behind)]
        hops = sum(one.hops(self.ranks) for one in chosen)
        return sent_bytes(chosen, self.ranks) / link.bytes_per_s + hops * link.latency_s

    def shares(self, link: Link, work_s: float) -> tuple[float, float]:
        """Of an update whose work takes so long: without overlap, and with all of it."""
        left = self.seconds(link, "nothing")
        left += max(self.seconds(link, "backward") - self.backward_share * work_s, 0.0)
        left += max(self.seconds(link, "compute") - work_s, 0.0)
        together = self.seconds(link)
        return together / (work_s + together), left / (work_s + left)

    def facts(self) -> dict[str, Any]:
        """What a result file keeps; shares are those of work at its fastest."""
        by_link = {}
        for link in LINKS:
            share, overlapped = self.shares(link, self.work_s.low)
            by_link[link.name] = {"seconds": self.seconds(link), "share": share, "share_overlapped": overlapped}
        return {
            "sent_bytes": {one.what: one.sent(self.ranks) for one in self.collectives},
            "micro_batches": self.micro_batches, "fits": self.fits, "work_s": list(self.work_s), "links": by_link,
        }  # fmt: skip


def config_of(model: str, precision: str, batch_size: int, accumulation: int) -> Config:
    """Of the file in configs/ that is for this network, or for the next smaller one. Raises ConfigError."""
    file = CONFIGS / f"{model}.yaml"
    values = [
        f"model.preset={model}", f"precision={precision}", f"train.batch_size={batch_size}",
        f"train.accumulation={accumulation}", "execution.activation_checkpointing=block",
    ]  # fmt: skip
    return with_prototypes(load_config([file if file.exists() else CONFIGS / "vit_g.yaml"], values))


def part_of(config: Config, images: int) -> Config:
    """A rank's own part: as many images, with the whole batch's prototypes."""
    return config.model_copy(update={"train": config.train.model_copy(update={"batch_size": images})})


def pieces_that_fit(model: str, arm: Arm, ranks: int, images: int, room: float) -> tuple[Config, bool]:
    """In the largest micro-batches that fit into the memory, and whether any does."""
    config = None
    for piece in PIECES:
        if images % piece:
            continue
        config = config_of(model, arm.precision, images * ranks, images // piece)
        memory = memory_of_rank(config, arm.precision, planned(model, images, images // piece))
        if memory.wanted(arm.mode, ranks) <= room:
            return config, True
    assert config is not None
    return config, False


@cache
def planned(model: str, images: int, accumulation: int) -> dict[str, int]:
    """Bytes by item of a rank's part of a batch of `BATCH`, which says how many prototypes there are."""
    own = part_of(config_of(model, "bf16", BATCH, accumulation), images)
    return items_of(own, vit_config(own), make_objective(own))


def case_of(model: str, arm: Arm, ranks: int, *, images: int, machine_name: str) -> Case:
    """Count one case. Raises ConfigError for a network that cannot be."""
    published = MACHINES[machine_name]
    config, fits = pieces_that_fit(model, arm, ranks, images, published.memory_gib * GIB)
    own = part_of(config, images)
    vit, objective = vit_config(own), make_objective(own)
    flops = flops_of(own, vit, objective)
    work_s = stage_speed(StagePlan(Stage(1, 1, None, own), 1, flops, 0, {}), vit, published.machine(own.precision))
    backward = flops.of(step="student backward") + flops.of(step="recomputation")
    return Case(
        model=model, arm=arm, ranks=ranks, micro_batches=own.train.accumulation, fits=fits,
        collectives=collectives_of(config, arm.mode, ranks), work_s=work_s.update_s,
        backward_share=backward / flops.total / own.train.accumulation,
    )  # fmt: skip


def table_of_bytes(cases: Sequence[Case]) -> list[str]:
    """What each rank sends in an update."""
    ranks = sorted({case.ranks for case in cases})
    lines = [
        "| network | mode | micro-batches | " + " | ".join(f"GB, {n} ranks" for n in ranks) + " | collectives |",
        "| --- | --- | ---: " + "| ---: " * (len(ranks) + 1) + "|",
    ]
    for model, arm, group in _groups(cases):
        micro = "/".join(dict.fromkeys(str(case.micro_batches) + ("" if case.fits else "*") for case in group))
        sent = " | ".join(f"{case.sent / 1e9:.3g}" for case in group)
        calls = sum(one.count for one in group[-1].collectives)
        lines.append(f"| {model} | {arm.words} | {micro} | {sent} | {calls:,} |")
    return lines


def table_of_shares(cases: Sequence[Case]) -> list[str]:
    """Of an update, what goes to sending: without overlap / with all of it."""
    names = " | ".join(link.name for link in LINKS)
    lines = [
        f"| network | mode | ranks | work, s | {names} |",
        "| --- | --- | ---: | ---: " + "| ---: " * len(LINKS) + "|",
    ]
    for case in cases:
        cells = [_percents(case.shares(link, case.work_s.low)) for link in LINKS]
        work = short(case.work_s.low)
        lines.append(f"| {case.model} | {case.arm.words} | {case.ranks} | {work} | {' | '.join(cells)} |")
    return lines


def table_of_memory(models: Sequence[str]) -> list[str]:
    """How few ranks are enough, of devices with so much memory, one image at a time."""
    of_devices = " | ".join(f"ranks of {size} GiB" for size in MEMORIES)
    lines = [
        f"| network | state, divided, GB | gathered, GB | waiting, GB | one image, GB | {of_devices} |",
        "| --- | ---: | ---: | ---: | ---: " + "| ---: " * len(MEMORIES) + "|",
    ]
    for model in models:
        memory = memory_of_one_image(model)
        parts = " | ".join(f"{size / 1e9:.3g}" for size in (memory.state, memory.gathered, memory.waiting, memory.rest))
        cells = [f"{memory.fewest(size * GIB) or 'none'} ({memory.fewest_of_any(size * GIB)})" for size in MEMORIES]
        lines.append(f"| {model} | {parts} | {' | '.join(cells)} |")
    return lines


def memory_of_one_image(model: str) -> RankMemory:
    """In micro-batches of one image of 32 a rank, with bf16 weights, each block computed again."""
    config = config_of(model, "bf16_weights", BATCH, 32)
    return memory_of_rank(config, config.precision, planned(model, 32, 32))


def _groups(cases: Sequence[Case]) -> Iterator[tuple[str, Arm, list[Case]]]:
    for model, arm in dict.fromkeys((case.model, case.arm) for case in cases):
        yield model, arm, [case for case in cases if (case.model, case.arm) == (model, arm)]


def _percents(shares: tuple[float, float]) -> str:
    return " / ".join("<1 %" if share < 0.01 else f"{share:.0%}".replace("%", " %") for share in shares)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="PRESET", help="(default: all from vit_s)")
    add("--ranks", nargs="+", type=int, default=list(RANKS), help="numbers of ranks (default: 2 4 8 64)")
    add("--images", type=int, default=32, help="of a rank and update (default: 32)")
    add("--machine", choices=list(MACHINES), default="h100", help="of each rank (default: h100)")
    add("--output", metavar="FILE", type=Path, help="result, JSON (default: none)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parse_arguments(arguments)
    if min(*given.ranks, given.images) < 1 or 1 in given.ranks:
        print("error: --images must be at least 1, and --ranks at least 2: one rank sends nothing", file=sys.stderr)
        return 2
    try:
        cases = [
            case_of(model, arm, ranks, images=given.images, machine_name=given.machine)
            for model in given.models
            for arm in ARMS
            for ranks in given.ranks
        ]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    memories = [model for model in LARGE if model in given.models]
    print(f"{given.images} images of a rank and update, on {MACHINES[given.machine].words} each; configs/*.yaml with "
          "activation_checkpointing block.")  # fmt: skip
    print("* does not fit into its memory; counted one image at a time.\n")
    print("\n".join(table_of_bytes(cases)), end="\n\n")
    print("\n".join(table_of_shares(cases)), end="\n\n")
    if memories:
        print("\n".join(table_of_memory(memories)))
    if given.output is not None:
        _write(given, cases, memories)
        print(f"written: {given.output}")
    return 0


def _write(given: argparse.Namespace, cases: Sequence[Case], memories: Sequence[str]) -> None:
    made = result.begin(
        "communication",
        data=[{"name": "configs/*.yaml", "images": given.images, "machine": given.machine}],
        conditions={
            "core": -1, "rounds": 0, "round_s": 0.0,
            "links": [link._asdict() for link in LINKS],
            "memory": {model: asdict(memory_of_one_image(model)) for model in memories},
        },
        versions={"dinox": machine.versions(("torch",))},
    )  # fmt: skip
    made.notes.append("computed, not measured: bytes are counted, seconds follow from links and machines as published")
    for case in cases:
        name = f"{case.model}, {case.arm.words}, {case.ranks} ranks"
        made.contenders.append(
            {"name": name, "environment": "dinox", "seconds": [], "amounts": [], "facts": case.facts()}
        )
        made.exact(f"{name}: bytes sent by each in an update", case.sent, "bytes", better="lower")
    result.finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
