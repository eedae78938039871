"""What the figures of health cost: their share of an update, on the tensors that the update has anyway."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import machine
import result
import torch
from command import Plan, add_output, finish, tell
from harness import AGAIN, Local, measure
from model import device_name
from peak_memory import wait
from result import Result
from timing import Prepared, Setup
from train_step import DTYPES, case_of
from update_case import OurUpdate, UpdateCase

import dinox_model
from dinox_model.host_memory import keep_freed_memory
from dinox_train import health
from dinox_train.config import validate
from dinox_train.guard import Guard
from dinox_train.objectives.dinov3 import DINOv3
from dinox_train.objectives.sinkhorn import balanced_targets
from dinox_train.view_batch import NUM_GLOBAL

_EPILOG = """\
`figures` are those that stand in every line: the targets of CLS made once more and their entropy and winners, feature
std and rank, patch similarity, all copied to the host, and the alarms. `update` is dinox_train/step.py's, with them.

examples:
  python benchmarks/health_cost.py --quick
  python benchmarks/health_cost.py --output health_cost.json
  python benchmarks/health_cost.py --preset vit_l --batch 64 --prototypes 65536 --device cuda --precision bf16

exit code: 0 measured, whatever came out (the target is in the result); 2 it cannot be measured so
"""
LIMIT = 1.0
"""% of an update."""


def run(case: UpdateCase, plan: Plan) -> Result:
    """Measure both."""
    torch.set_num_threads(case.threads)
    made = result.begin(
        "health_cost",
        data=[case.described()],
        conditions={
            **plan.conditions(-1),
            "device": device_name(case.device),
            "threads": case.threads,
            "keeps_freed_memory": keep_freed_memory(),
        },
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    made.notes.append("an evaluation's figures (knn_z, knn_label, shortcut) are not in it: they are made once in many")
    ours = OurUpdate(case, DINOv3(case.settings))
    figures = _timed(case, figures_of(case))
    listed = [
        Local("update", _timed(case, lambda: ours.run().to_host())),
        Local("figures", figures),
        Local("figures" + AGAIN, figures),
    ]
    measured = measure(listed, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
    made.take(measured)
    for name in ("update", "figures"):
        made.timed(name, measured.figure(lambda times, name=name: 1e3 * times[name]), "ms", better="lower")
    share = measured.figure(lambda times: 100 * times["figures"] / times["update"])
    cost = made.timed("figures, of an update", share, "% of the time", better="lower", gate=True)
    made.target("figures of health: share of an update", cost, "at most", LIMIT)
    return made


def figures_of(case: UpdateCase) -> Callable[[], list[float]]:
    """What computes all figures of an update, from features and logits of its shapes to what the guard says."""
    rows, side = NUM_GLOBAL * case.batch, case.global_size // case.config.patch_size
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.device)

    cls, patches = made(rows, case.config.width), made(rows, side**2, case.config.width)
    logits, potential = made(rows, case.prototypes), made(case.prototypes)
    guard, lines = Guard(validate({"objective": {"prototypes": case.prototypes}})), [0]

    def compute() -> list[float]:
        targets = balanced_targets(logits, potential, 0.05)
        figures = {
            "teacher_entropy": health.teacher_entropy(targets),
            "prototype_use": health.prototype_use(targets),
            "patch_similarity": health.patch_similarity(patches),
            "feature_std": health.feature_std(cls),
        }
        gram = health.feature_gram(cls)
        numbers = torch.stack([value.double() for value in figures.values()]).tolist()
        lines[0] += 1
        line = dict(zip(figures, numbers, strict=True)) | {"update": lines[0], "applied": True, "clipped": False}
        line |= {"loss": 5.0, "loss_dino": 4.0, "grad_norm": 1.0}
        line["effective_rank"] = float(health.effective_rank_of_gram(gram.cpu()))
        guard.look(line)
        return numbers

    return compute


def _timed(case: UpdateCase, work: Callable[[], object]) -> Setup:
    def once() -> float:
        work()
        wait(case.device)
        return 1.0

    return lambda: Prepared(once, {})


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=list(dinox_model.PRESETS), help="network (default: vit_s; quick: vit_ti)")
    parser.add_argument("--batch", type=int, help="images of an update (default: 8)")
    parser.add_argument("--prototypes", type=int, help="of the head (default: 8192)")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="default: fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: torch's)")
    parser.add_argument("--rounds", type=int, default=20, help="how often each takes its turn (default: 20)")
    add_output(parser, "bench/health_cost.json")
    given = parser.parse_args(arguments)
    plan = Plan.of(True) if given.quick else Plan(given.rounds, Plan.of(False).round_s, False)
    try:
        made = run(case_of(given), plan)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
