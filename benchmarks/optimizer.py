"""One update of a network's parameters, clipping, AdamW and the teacher's average, against its byte floor."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floors
import machine
import result
import torch
from command import Plan, add_output, finish, tell
from harness import AGAIN, Contender, Local, Measurement, measure
from result import Result
from timing import Prepared, Setup
from torch import Tensor, nn

import dinox_model
from dinox_train.optimizer import clip_gradients, make_optimizer, set_group_values
from dinox_train.teacher import update_teacher
from dinox_train.working_weights import MasterWeights

_EPILOG = """\
The floor is what must be moved: the gradient once for its norm; then gradient, parameters, both moments and teacher
read, and all but the gradient written: 40 bytes a parameter, at the bandwidth of a copy measured in the same rounds.
On the CPU all of it runs on one core. `torch foreach` is the same update as others write it: AdamW with foreach,
clipping part by part, momentum x teacher + (1 - momentum) x student.

examples:
  python benchmarks/optimizer.py --quick
  python benchmarks/optimizer.py --preset vit_s --output optimizer.json
  python benchmarks/optimizer.py --preset vit_l --device cuda

exit code: 0 measured, whatever came out (the target is in the result); 2 it cannot be measured so
"""
FLOOR_BYTES = 4 * (1 + 5 + 4)
"""Bytes a parameter that are read or written at least."""
LIMIT = 1.3
COPY_BYTES = 256 << 20
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, MOMENTUM = 1e-6, 0.04, 3.0, 0.994
HIDDEN, BOTTLENECK = 2048, 256
"""Of the heads."""
TOLERANCE = 1e-6
GRADIENT = 1e-5
"""Size of a gradient's numbers: its norm is below CLIP_NORM, as in most updates of a run."""


@dataclass(frozen=True)
class Settings:
    """What `make_optimizer` asks for, as configs/vit_s.yaml has it."""

    beta1: float = 0.9
    beta2: float = 0.999
    layer_decay: float = 0.9
    patch_embed_scale: float = 0.2


class _Network(nn.Module):
    """A backbone with two heads, as the objective has them."""

    def __init__(self, preset: str, prototypes: int) -> None:
        super().__init__()
        self.backbone = dinox_model.build(preset)
        width = self.backbone.config.width
        self.heads = nn.ModuleDict(
            {
                name: dinox_model.PrototypeHead(width, HIDDEN, BOTTLENECK, prototypes, seed=1)
                for name in ("dino", "ibot")
            }
        )


class Update:
    """Everything that one update touches, with gradients that are there already."""

    def __init__(self, preset: str, prototypes: int, device: torch.device, precision: str = "fp32") -> None:
        self.device = device
        self.student = MasterWeights(_Network(preset, prototypes).to(device), precision)
        self.teacher = MasterWeights(_Network(preset, prototypes).to(device).requires_grad_(False), precision)
        with torch.no_grad():
            self.teacher.buffer.mul_(1.01)
        self.applied = torch.ones((), device=device)
        generator = torch.Generator().manual_seed(0)
        for _, parameter in self.student.named:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device) * GRADIENT
        self.allowed = GRADIENT
        """Norm that `clipped` allows: less each time, since what it has clipped is no longer too long."""
        self.optimizer = make_optimizer(self.student.named, Settings())
        set_group_values(self.optimizer, LEARNING_RATE, WEIGHT_DECAY)
        self.optimizer.found_inf = 1.0 - self.applied  # type: ignore[attr-defined]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for _, parameter in self.student.named)

    def clip(self, norm: float = CLIP_NORM) -> None:
        clip_gradients(self.student.named, norm, by_part=True)

    def adamw(self) -> None:
        self.optimizer.step()

    def average(self) -> None:
        update_teacher(self.teacher.buffer, self.student.buffer, MOMENTUM, self.applied)

    def refresh(self) -> None:
        self.student.refresh()
        self.teacher.refresh()

    def whole(self, norm: float = CLIP_NORM) -> None:
        """As dinox_train/step.py does it, in fp32."""
        self.clip(norm)
        self.adamw()
        self.average()

    def clipped(self) -> None:
        """The same with a gradient that is too long, time after time."""
        self.allowed *= 0.999
        self.whole(self.allowed)


class ForeachUpdate(Update):
    """The same as others write it."""

    def __init__(self, preset: str, prototypes: int, device: torch.device) -> None:
        super().__init__(preset, prototypes, device)
        groups = [
            {key: group[key] for key in ("params", "lr", "weight_decay")} for group in self.optimizer.param_groups
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(Settings.beta1, Settings.beta2), foreach=True)
        network = self.student.network
        assert isinstance(network, _Network)
        self.parts = (network.backbone, *network.heads.values())
        self.pairs = (
            [parameter.detach() for _, parameter in self.teacher.named],
            [parameter.detach() for _, parameter in self.student.named],
        )

    def whole(self, norm: float = CLIP_NORM) -> None:
        for part in self.parts:
            nn.utils.clip_grad_norm_(part.parameters(), norm)
        self.optimizer.step()
        teacher, student = self.pairs
        torch._foreach_mul_(teacher, MOMENTUM)
        torch._foreach_add_(teacher, student, alpha=1 - MOMENTUM)


def check(preset: str, prototypes: int, device: torch.device) -> None:
    """Both updates have the same outcome. Raises ValueError where they have not."""
    outcomes: list[tuple[Tensor, Tensor]] = []
    for update in (Update(preset, prototypes, device), ForeachUpdate(preset, prototypes, device)):
        for _ in range(2):
            update.whole()
        outcomes.append((update.student.buffer, update.teacher.buffer))
    for ours, theirs in zip(*outcomes, strict=True):
        furthest = float((ours - theirs).abs().max())
        if furthest > TOLERANCE:
            raise ValueError(f"the two updates differ by {furthest:.2g}: they are not the same work")


def run(preset: str, prototypes: int, device: torch.device, plan: Plan) -> Result:
    """Measure the update and its parts."""
    with ExitStack() as stack:
        core = -1
        if device.type == "cpu":
            core = stack.enter_context(machine.one_core())
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            stack.callback(torch.set_num_threads, threads)
        check(preset, prototypes, device)
        made = result.begin(
            "optimizer",
            data=[{"name": preset, "prototypes": prototypes}],
            conditions={**plan.conditions(core), "device": _device_name(device)},
            versions={"dinox": machine.versions(("torch", "numpy"))},
        )
        update = Update(preset, prototypes, device)
        made.conditions["parameters"] = update.num_parameters
        listed = _contenders(update, preset, prototypes, device)
        measured = measure(listed, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
        made.take(measured)
        figures(made, measured, update.num_parameters)
        return made


def _contenders(update: Update, preset: str, prototypes: int, device: torch.device) -> list[Contender]:
    whole, long = _timed(update, update.whole), Update(preset, prototypes, device)
    foreach = ForeachUpdate(preset, prototypes, device)
    rounded = Update(preset, prototypes, device, "bf16_weights")
    return [
        Local("update", whole),
        Local("update" + AGAIN, whole),
        Local("update, clipped", _timed(long, long.clipped)),
        Local("torch foreach", _timed(foreach, foreach.whole)),
        Local("clip", _timed(update, update.clip)),
        Local("adamw", _timed(update, update.adamw)),
        Local("teacher", _timed(update, update.average)),
        Local("copies of bf16_weights", _timed(rounded, rounded.refresh)),
        Local("copy", floors.copying(COPY_BYTES) if device.type == "cpu" else _device_copy(device)),
    ]


def _timed(update: Update, work: Any) -> Setup:
    def once() -> float:
        work()
        _wait(update.device)
        return 1.0

    return lambda: Prepared(once, {})


def _device_copy(device: torch.device) -> Setup:
    def setup() -> Prepared:
        source = torch.arange(COPY_BYTES // 8, device=device)
        target = torch.empty_like(source)

        def once() -> float:
            target.copy_(source)
            _wait(device)
            return COPY_BYTES

        return Prepared(once, {"buffer_bytes": COPY_BYTES})

    return setup


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def figures(made: Result, measured: Measurement, num_parameters: int) -> None:
    """Times, the distance to the floor, and the target."""
    for name in measured.samples:
        if name != "copy":
            made.timed(f"{name}", measured.figure(lambda times, name=name: 1e3 * times[name]), "ms", better="lower")
    # A byte that is copied is one read and one written.
    floor = num_parameters * FLOOR_BYTES / 2
    made.exact("floor: bytes a parameter", FLOOR_BYTES, "B", better="lower")
    whole = floors.distance(measured, "update", "copy", floor)
    distance = made.timed("update / byte floor", whole, "× the time", better="lower", gate=True)
    clipped = floors.distance(measured, "update, clipped", "copy", floor)
    long = made.timed("update, clipped / byte floor", clipped, "× the time", better="lower", gate=True)
    made.timed("update / torch foreach", measured.ratio("update", "torch foreach"), "×", gate=True)
    made.target("AdamW, norm of the gradient and teacher: time over their byte floor", distance, "at most", LIMIT)
    made.target("the same where the gradient is clipped", long, "at most", LIMIT)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(dinox_model.PRESETS), help="network (default: vit_s; quick: vit_ti)")
    parser.add_argument("--prototypes", type=int, default=8192, help="of each of two heads (default: 8192)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    add_output(parser, "bench/optimizer.json")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here that torch can use; leave --device out", file=sys.stderr)
        return 2
    preset = given.preset or ("vit_ti" if given.quick else "vit_s")
    try:
        made = run(preset, given.prototypes, torch.device(given.device), Plan.of(given.quick))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output: Path = given.output
    return finish(made, output)


if __name__ == "__main__":
    sys.exit(main())
