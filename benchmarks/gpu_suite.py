"""All that a GPU can tell about our kernels, in one command and under nine minutes: whether they are right, how fast
they are, and what they do for a training step. Needs torch, numpy and Triton only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
if str(REPOSITORY) not in sys.path:
    sys.path.insert(0, str(REPOSITORY))  # nothing is installed there
# What dinox_train/platform sets at the start of a run; the user's own wins.
os.environ.setdefault("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")
os.environ.setdefault("TRITON_HIP_USE_IN_THREAD_TRANSPOSE", "1")

import attention_case  # noqa: E402
import kernel_trials  # noqa: E402
import kernels  # noqa: E402
import result  # noqa: E402
import torch  # noqa: E402
from attention_case import AttentionCase  # noqa: E402
from command import Plan, add_output  # noqa: E402
from result import Result  # noqa: E402
from update_arms import EAGER, ArmResult, arms, product_peak, run_arm  # noqa: E402
from update_case import UpdateCase  # noqa: E402

from dinox_model.kernels.architecture import architecture  # noqa: E402
from dinox_model.kernels.language import INTERPRETED, can_run_on  # noqa: E402

_EPILOG = """\
Parts: correct (every kernel in fp32, fp16 and bf16 against fp64), attention (five lengths, two head widths, forward and
backward, interleaved with SDPA's backends and FlexAttention), packed (global and local views in one launch), update (a
training update of vit_l, eager, compiled and ours, losses compared over 50 updates). A part that fails keeps its error
in the file, and the others go on. Please send us the file: it names your GPU and versions, nothing else of you.

examples:
  python benchmarks/gpu_suite.py                          writes bench/gpu_suite.json
  python benchmarks/gpu_suite.py --batch 16               less memory in the training update
  python benchmarks/gpu_suite.py --device cpu --quick     does it run at all?

exit code: 0 every part ran (whether targets were reached is in the file); 1 a part failed, the file is written all the
           same; 2 there is no such device
"""
BUDGET_S = 540.0
QUICK = Plan.of(True)
LOSS_LIMIT = 0.02
"""Largest relative difference of a loss between forms in bf16: their roundings differ, and 50 updates add them up."""
NOMINAL = {"H200": 989.5, "H100 80GB HBM3": 989.5, "A100": 312.0, "MI300X": 1307.4, "gfx1151": 59.4}
"""TFLOP/s in bf16, dense, as the makers say; by a part of the device's name or its architecture."""

Part = Callable[[], None]


class Suite:
    """The parts, on one device, into one result."""

    def __init__(self, device: torch.device, batch: int, *, quick: bool) -> None:
        self.device, self.quick, self.batch = device, quick, batch
        self.plan = QUICK if quick else kernels.GPU_PLAN
        self.made: Result = kernels.begin(device, self.plan)
        self.made.benchmark = "gpu_suite"
        self.made.conditions |= {"architecture": architecture(device), "hip": torch.version.hip, "parts": {}}
        self._begin = time.monotonic()

    def parts(self) -> dict[str, Part]:
        """By name, in the order of what matters most."""
        return {
            "correct": self.correct,
            "update": self.update,
            "attention": self.attention,
            "packed": self.packed,
        }

    def run(self) -> bool:
        """All parts; whether each ran. One that is not begun within the budget is said to be missing."""
        for name, part in self.parts().items():
            begin, error = time.monotonic(), None
            if begin - self._begin > BUDGET_S:
                error = "not begun: the time was up"
            else:
                print(f"{name} …", file=sys.stderr, flush=True)
                try:
                    part()
                except Exception:
                    error = traceback.format_exc(limit=8)
            self.made.conditions["parts"][name] = {"seconds": round(time.monotonic() - begin, 1), "error": error}
        return all(part["error"] is None for part in self.made.conditions["parts"].values())

    def correct(self) -> None:
        """Errors of every kernel over those of plain torch in the same dtype."""
        if not can_run_on(self.device):
            self.made.notes.append("Triton runs nothing on this device: no kernel was tried (CPU: TRITON_INTERPRET=1)")
            return
        dtypes = kernel_trials.DTYPES[:1] if INTERPRETED else kernel_trials.DTYPES  # its bf16 is not the hardware's
        wrong = 0
        for trial in kernel_trials.trials(self.device, dtypes, quick=self.quick):
            name = f"{trial.name} {str(trial.inputs[0].dtype).removeprefix('torch.')}"
            found = trial.run()
            for what, error in (("forward", found.forward_error), ("backward", found.backward_error)):
                if error is not None and error == error:
                    self.made.exact(f"error of {name}, {what}", error, "", better="lower")
            if found.fault:
                wrong += 1
                self.made.notes.append(f"{name}: {found.fault}")
        side = 64 if self.quick else 512
        hu = kernel_trials.unfilter_difference(self.device, side)
        self.made.exact("error of unfilter", hu, "HU", better="lower")
        figure = self.made.exact("kernels that are wrong, or do not run", wrong + (hu != 0), "", better="lower")
        self.made.target("every kernel is right", figure, "at most", 0)

    def attention(self) -> None:
        """Ours against SDPA's backends and FlexAttention."""
        lengths, widths = attention_case.LENGTHS, attention_case.HEAD_DIMS
        if self.device.type == "cpu":
            lengths, widths = (21,), (64,)
        for length in lengths:
            cases = [AttentionCase.of(length, width, self.device) for width in widths]
            kernels.attention(self.made, cases, self.plan)

    def packed(self) -> None:
        """DINO's crops in one launch."""
        if not can_run_on(self.device):
            self.made.notes.append("packed: Triton runs nothing on this device")
            return
        cpu = self.device.type == "cpu"
        kernels.packed(self.made, AttentionCase.of(21 if cpu else 261, 64, self.device), 1 if cpu else 8, self.plan)

    def update(self) -> None:
        """A training update in each form that this device can run."""
        case = self._case()
        count, warm_up = (2, 0) if self.quick else (50, 10)
        peak = product_peak(self.device, 256 if self.quick else 8192)
        self.made.exact("matrix product, bf16", peak / 1e12, "TFLOP/s")
        first: ArmResult | None = None
        losses: dict[str, list[float]] = {}
        self.made.conditions["losses"] = losses
        for arm in arms(self.device):
            print(f"  update: {arm}", file=sys.stderr, flush=True)
            done = run_arm(case, arm, updates=count, warm_up=warm_up)
            losses[arm] = done.losses
            self._update_figures(case, arm, done, peak)
            if first is None:
                first = done
            else:
                gap = self.made.exact(f"update, {arm}: furthest loss from {EAGER}", done.furthest_from(first), "",
                                      better="lower")  # fmt: skip
                self.made.target(f"{arm} learns as {EAGER} does", gap, "at most", LOSS_LIMIT)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _update_figures(self, case: UpdateCase, arm: str, done: ArmResult, peak: float) -> None:
        seconds = statistics.median(done.seconds)
        rate = case.flops(done.masked_patches) / seconds
        self.made.exact(f"update, {arm}", case.batch / seconds, "images/s")
        self.made.exact(f"update, {arm}: operations", rate / 1e12, "TFLOP/s")
        self.made.exact(f"update, {arm}: of the product's rate", 100 * rate / peak, "%")
        names = (self.made.conditions["device"], self.made.conditions["architecture"])
        nominal = next((value for part, value in NOMINAL.items() if any(part in name for name in names)), None)
        if nominal is not None:
            self.made.exact(f"update, {arm}: model FLOP utilisation", 100 * rate / (nominal * 1e12), "%")
        if done.memory_bytes:
            self.made.exact(f"update, {arm}: memory", done.memory_bytes / 2**30, "GiB", better="lower")

    def _case(self) -> UpdateCase:
        case = UpdateCase(
            preset="vit_ti" if self.quick else "vit_l",
            batch=2 if self.quick else self.batch,
            precision="bf16" if self.device.type == "cuda" else "fp32",
            device=self.device,
            threads=torch.get_num_threads(),
            prototypes=256 if self.quick else 65536,
        )
        return replace(case, global_size=64, local_size=32, num_local=2) if self.quick else case


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cuda: NVIDIA or AMD (default)")
    parser.add_argument("--batch", type=int, default=32, help="images of a training update (default: 32)")
    add_output(parser, "bench/gpu_suite.json")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU here that torch can use; --device cpu --quick tries the flow", file=sys.stderr)
        return 2
    suite = Suite(device, given.batch, quick=given.quick)
    whole = suite.run()
    output: Path = given.output
    result.finish(suite.made, output)
    print("\n".join(result.lines(suite.made)))
    print(json.dumps(suite.made.conditions["parts"], indent=1))
    print(f"written: {output}")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
