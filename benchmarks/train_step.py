"""One update of training, all losses on, against the same written plainly and against the floor of its products."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import machine
import result
import torch
from command import Plan, add_output, finish, tell
from harness import AGAIN, Contender, Local, Measurement, Worker, WorkerError, measure
from intervals import median_interval
from matrix_floor import Floor, Tensors
from model import KEPT_MEMORY, bf16_warning, device_name
from peak_memory import wait
from result import Result
from timing import Prepared, Setup
from update_case import OurUpdate, UpdateCase, UpdateError, compare, with_gram, write
from update_stages import ClockedObjective, StageClock, read_stages

import dinox_model
from dinox_model.host_memory import keep_freed_memory
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings

_EPILOG = """\
`ours` is dinox_train/step.py: teacher, targets, student on all views, DINO + iBOT + KoLeo, backward, clipping, AdamW,
the teacher's average. `plain` is the same with torch and transformers, in an environment of its own
(benchmarks/peers_torch.txt); the terms of two updates are compared first. The floor is the matrix products and
attention of student, teacher and heads alone. Views are made before, and timed by themselves.

examples:
  python benchmarks/train_step.py --quick
  python benchmarks/train_step.py --peers peers/bin/python --output train_step.json
  python benchmarks/train_step.py --preset vit_l --batch 64 --prototypes 65536 --device cuda --precision bf16

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""
ROUNDS, STAGE_ROUNDS = 8, 3
FLOOR_LIMIT_CPU, PEER_LIMIT_GPU = 1.10, 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_weights": torch.bfloat16}
TIME, SHARE = "× the time", "% of the time"


def run(case: UpdateCase, peers_python: str | None, plan: Plan) -> Result:
    """Measure the update. WorkerError, UpdateError where that cannot be done."""
    torch.set_num_threads(case.threads)
    kept = keep_freed_memory()
    made = result.begin(
        "train_step",
        data=[case.described()],
        conditions={
            **plan.conditions(-1),
            "device": device_name(case.device),
            "threads": case.threads,
            "keeps_freed_memory": kept,
        },
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    made.notes += bf16_warning(case.device, case.precision)
    made.notes.append("facebookresearch/dinov3's own step was not run: `plain` stands for it")
    with ExitStack() as stack:
        ours = OurUpdate(case, DINOv3(case.settings))
        peer = _open_peer(stack, made, case, ours, peers_python)
        measured = measure(_contenders(case, ours, peer), rounds=plan.rounds, round_s=plan.round_s, tell=tell)
        made.take(measured)
        figures(made, case, ours, measured)
    stages(made, case, updates=1 if plan.quick else STAGE_ROUNDS)
    return made


def _contenders(case: UpdateCase, ours: OurUpdate, peer: Worker | None) -> list[Contender]:
    listed: list[Contender] = [
        Local("ours", _runs(case, ours.run)),
        Local("ours" + AGAIN, _runs(case, ours.run)),
        Local("floor", lambda: Prepared(floor_run(case, ours.masked_patches), {})),
        Local("views", _runs(case, ours.windows.views)),
    ]
    if peer is not None:
        listed.append(peer.contender("plain"))
    return listed


def _runs(case: UpdateCase, work: Callable[[], object]) -> Setup:
    def once() -> float:
        work()
        wait(case.device)
        return case.batch

    return lambda: Prepared(once, {})


def floor_run(case: UpdateCase, masked_patches: int) -> Callable[[], float]:
    """The products of an update: the teacher's forward, the student's forward and backward, and both's heads."""
    tensors, config = Tensors(case.device, DTYPES[case.precision]), case.config
    teacher, student = Floor(tensors, backward=False), Floor(tensors, backward=True)
    for floor, cls_tokens in ((teacher, 2 * case.batch), (student, (2 + case.num_local) * case.batch)):
        floor.network(config, 2 * case.batch, case.global_size)
        if floor is student and case.num_local:
            floor.network(config, case.num_local * case.batch, case.local_size)
        for rows in (cls_tokens, masked_patches):
            floor.head(case.head, config.width, rows)

    def run() -> float:
        teacher.run()
        student.run()
        wait(case.device)
        return case.batch

    return run


def _open_peer(
    stack: ExitStack, made: Result, case: UpdateCase, ours: OurUpdate, peers_python: str | None
) -> Worker | None:
    """The plain update with our weights and views, compared with ours; None without `peers_python`, and a note."""
    if peers_python is None:
        made.notes.append("no peer was measured: --peers was not given")
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinox-update-")))
    peer = stack.enter_context(
        Worker(peers_python, "peer_updates", write(case, folder, ours), environment="peers", variables=KEPT_MEMORY)
    )
    made.versions["peers"] = peer.versions
    made.conditions["largest relative difference of a term"] = compare(case, ours, peer.table("two_updates"))
    return peer


def figures(made: Result, case: UpdateCase, ours: OurUpdate, measured: Measurement) -> None:
    """Rates, ratios of the same rounds, and the targets."""
    has_peer = "plain" in measured.samples
    for name in ("ours", "plain", "floor", "views") if has_peer else ("ours", "floor", "views"):
        made.timed(name, measured.rate(name), "images/s")
    flops = case.flops(ours.masked_patches) / case.batch
    made.timed("ours, operations", measured.rate("ours").scaled(flops / 1e12), "TFLOP/s")
    floor = made.timed("ours / floor", measured.ratio("floor", "ours"), TIME, better="lower", gate=True)
    if case.device.type == "cpu" and case.precision == "fp32":
        made.target("an update: time over its floor's", floor, "at most", FLOOR_LIMIT_CPU)
    if has_peer:
        made.timed("plain / floor", measured.ratio("floor", "plain"), TIME, better="lower")
        faster = made.timed("ours, throughput over plain", measured.ratio("ours", "plain"), "×", gate=True)
        if case.device.type == "cuda":
            made.target("an update: throughput over the plain one", faster, "at least", PEER_LIMIT_GPU)
    share = measured.figure(lambda times: 100 * times["views"] / (times["views"] + times["ours"]))
    made.timed("views, of views and update", share, SHARE, better="lower")


def stages(made: Result, case: UpdateCase, *, updates: int) -> None:
    """The share of each stage, without and with Gram anchoring, and what that costs."""
    lengths: list[float] = []
    for name, settings, gram in (
        ("update", case.settings, False),
        ("update with Gram anchoring", with_gram(case.settings, case.global_size), True),
    ):
        found = _stages(case, settings, gram, updates)
        lengths.append(median_interval([sum(one.values()) for one in found]).value)
        for stage in sorted(found[0], key=lambda stage: -found[0][stage]):
            shares = median_interval([100 * one[stage] / sum(one.values()) for one in found])
            made.timed(f"{name}: {stage}", shares, SHARE, better="lower")
    made.exact("Gram anchoring, in all", lengths[1] / lengths[0], TIME, better="lower")


def _stages(case: UpdateCase, settings: DINOv3Settings, gram: bool, updates: int) -> Sequence[dict[str, float]]:
    clock = StageClock(case.device)
    return read_stages(OurUpdate(case, ClockedObjective(settings, clock), gram=gram), clock, updates)


def case_of(given: argparse.Namespace) -> UpdateCase:
    """The update that the command line asks for. Raises ValueError where there is no such device."""
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here that torch can use; leave --device out")
    case = UpdateCase(
        preset=given.preset or ("vit_ti" if given.quick else "vit_s"),
        batch=given.batch or (2 if given.quick else 8),
        precision=given.precision,
        device=device,
        threads=given.threads,
        prototypes=given.prototypes or (256 if given.quick else 8192),
    )
    return replace(case, global_size=64, local_size=32, num_local=2) if given.quick else case


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(dinox_model.PRESETS), help="network (default: vit_s; quick: vit_ti)")
    parser.add_argument("--batch", type=int, help="images of an update (default: 8)")
    parser.add_argument("--prototypes", type=int, help="of each of two heads (default: 8192)")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: torch's)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each takes its turn (default: {ROUNDS})")
    parser.add_argument("--peers", metavar="PYTHON",
                        help="interpreter that has peers_torch.txt (default: the peer is left out)")  # fmt: skip
    add_output(parser, "bench/train_step.json")
    given = parser.parse_args(arguments)
    plan = Plan.of(True) if given.quick else Plan(given.rounds, Plan.of(False).round_s, False)
    try:
        made = run(case_of(given), given.peers, plan)
    except (UpdateError, WorkerError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output: Path = given.output
    return finish(made, output)


if __name__ == "__main__":
    sys.exit(main())
