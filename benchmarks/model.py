"""Forward and backward of our networks against transformers' and against the floor of their products, side by side."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import machine
import model_figures
import result
import torch
from command import Plan, add_output, tell
from harness import AGAIN, Contender, Local, Worker, WorkerError, measure
from network_case import Case, CaseError
from our_networks import NAMES, PASSES, OurNetwork, Pass, contenders, part_contenders
from result import Result

import dinox_model
from dinox_model import ViTConfig
from dinox_model.host_memory import keep_freed_memory
from dinox_model.memory_plan import plan_pass

_EPILOG = """\
The floor is the same matrix products and attention with nothing in between. transformers runs in an environment of
its own (benchmarks/peers_torch.txt), with the same weights; its features and gradients are compared with ours first.
Beside FILE.json stand FILE.csv (all figures) and FILE.png.

examples:
  python benchmarks/model.py --quick
  python benchmarks/model.py --preset vit_s --peers peers/bin/python --output model.json
  python benchmarks/model.py --config mine.yaml --sizes 224,512 --batch 4 --pass forward
  python benchmarks/model.py --preset vit_l --batch 64 --device cuda --precision bf16

exit code: 0 measured, whatever came out (the targets are in the result); 2 it cannot be measured so
"""
BATCH = {"vit_ti": 8, "vit_s": 8, "vit_b": 2}
"""Images, where --batch is not given; 1 for larger networks."""
QUICK_BATCH = 1
ROUNDS = 25
PART_ROUNDS, PART_ROUND_S = 10, 0.05
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""What `keep_freed_memory` does, for the peer's process: with glibc's defaults it would be slower on the CPU."""


def run(
    cases: Sequence[Case], passes: Sequence[Pass], peers_python: str | None, compile_blocks: bool, plan: Plan
) -> Result:
    """Measure the cases one after the other. WorkerError, CaseError where that cannot be done."""
    first = cases[0]
    torch.set_num_threads(first.threads)
    kept = keep_freed_memory()
    made = result.begin(
        "model",
        data=[case.described() for case in cases],
        conditions={
            **plan.conditions(-1),
            "device": device_name(first.device),
            "threads": first.threads,
            "keeps_freed_memory": kept,
        },
        versions={"dinox": machine.versions(("torch", "numpy"))},
    )
    if peers_python is None:
        made.notes.append("no peer was measured: --peers was not given")
    made.notes += bf16_warning(first.device, cases[-1].precision)
    for case in cases:
        _measure(made, case, passes, peers_python, compile_blocks, plan)
    model_figures.targets(made, cases, passes)
    return made


def _measure(
    made: Result, case: Case, passes: Sequence[Pass], peers_python: str | None, compile_blocks: bool, plan: Plan
) -> None:
    with ExitStack() as stack:
        ours = OurNetwork(case, case.model())
        peer = _open_peer(stack, made, case, ours, peers_python)
        memory = None if peer is None else peer.table("memory")
        for which in passes:
            listed = _contenders(case, ours, which, compile_blocks, peer)
            measured = measure(listed, rounds=plan.rounds, round_s=plan.round_s, tell=tell)
            made.take(measured)
            model_figures.whole(made, case, which, measured)
            planned = plan_pass(case.config, case.batch, case.size, precision=case.precision, backward=which == "both")
            model_figures.memory(made, case, which, ours.memory(which), planned.peak, memory and memory[which])
        for which in passes:
            counts, setups = part_contenders(ours, which)
            prefix = f"{case.label} {NAMES[which]}: "
            chosen: list[Contender] = [Local(prefix + "whole", contenders(ours, which, False)["ours"])]
            chosen.append(Local(prefix + "whole" + AGAIN, contenders(ours, which, False)["ours"]))
            chosen += [Local(prefix + name, setup) for name, setup in setups.items()]
            rounds, round_s = min(PART_ROUNDS, plan.rounds), min(PART_ROUND_S, plan.round_s)
            measured = measure(chosen, rounds=rounds, round_s=round_s, tell=tell)
            made.take(measured)
            model_figures.parts(made, case, which, counts, measured)


def _contenders(
    case: Case, ours: OurNetwork, which: Pass, compile_blocks: bool, peer: Worker | None
) -> list[Contender]:
    prefix = f"{case.label} {NAMES[which]}: "
    setups = contenders(ours, which, compile_blocks)
    listed: list[Contender] = [Local(prefix + name, setup) for name, setup in setups.items()]
    listed.append(Local(prefix + "ours" + AGAIN, setups["ours"]))
    if peer is not None:
        listed.append(peer.contender(which, prefix + "transformers"))
    return listed


def _open_peer(stack: ExitStack, made: Result, case: Case, ours: OurNetwork, peers_python: str | None) -> Worker | None:
    """The peer with our weights, compared with us; None where there is none, with a note that says why."""
    if peers_python is None:
        return None
    cannot = case.peer_cannot()
    if cannot is not None:
        made.notes.append(f"{case.label}: transformers has no such network ({cannot})")
        return None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dinox-model-")))
    arguments = case.write(folder, ours.model)
    peer = stack.enter_context(
        Worker(peers_python, "peer_networks", arguments, environment="peers", variables=KEPT_MEMORY)
    )
    made.versions["peers"] = peer.versions
    peer.table("answers")
    made.conditions[f"largest difference, {case.label}"] = case.compare(folder, ours.model)
    return peer


def device_name(device: torch.device) -> str:
    """As results name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 numbers in hardware."""
    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def bf16_warning(device: torch.device, precision: str) -> list[str]:
    """What a result must say where bf16 is asked for and the hardware has none."""
    if precision == "fp32" or has_fast_bf16(device):
        return []
    return ["this processor has no bf16: its figures say only that everything runs"]


def cases_of(given: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for. Raises ValueError, OSError for a configuration that is none."""
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here that torch can use; leave --device out")
    configs = {name: dinox_model.PRESETS[name] for name in given.preset or ()}
    for path in given.config or ():
        configs[path.stem] = ViTConfig.from_yaml(path.read_text("utf-8"))
    if not configs:
        names = ("vit_ti",) if given.quick else ("vit_s", "vit_b", "vit_l")
        configs = {name: dinox_model.PRESETS[name] for name in names}
    precisions = {"auto": ("fp32", "bf16") if has_fast_bf16(device) else ("fp32",)}
    return [
        Case(
            name=name,
            config=config,
            size=size,
            batch=given.batch or (QUICK_BATCH if given.quick else BATCH.get(name, 1)),
            precision=precision,
            device=device,
            threads=given.threads,
        )
        for name, config in configs.items()
        for size in given.sizes or ([96] if given.quick else [224])
        for precision in precisions.get(given.precision, (given.precision,))
    ]


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--preset", action="append", choices=list(dinox_model.PRESETS),
                        help="network, repeatable (default: vit_s, vit_b, vit_l; quick: vit_ti)")  # fmt: skip
    parser.add_argument("--config", action="append", type=Path, metavar="FILE", help="a ViTConfig as YAML, repeatable")
    parser.add_argument("--sizes", type=_sizes, metavar="A,B", help="sides of the input (default: 224; quick: 96)")
    parser.add_argument("--batch", type=int, help="images (default: 8 for vit_s, 2 for vit_b, 1 for larger ones)")
    parser.add_argument("--pass", dest="which", choices=PASSES, default="both",
                        help="forward, or both: forward, and forward with backward (default)")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                        help="auto (default): fp32, and bf16 beside it where the hardware multiplies it")  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: torch's)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often each takes its turn (default: {ROUNDS})")
    parser.add_argument("--compiled", action="store_true", help="our network with compiled blocks too (minutes)")
    parser.add_argument("--peers", metavar="PYTHON",
                        help="interpreter that has peers_torch.txt (default: the peer is left out)")  # fmt: skip
    add_output(parser, "bench/model.json")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    given = parser.parse_args(arguments)
    plan = Plan.of(True) if given.quick else Plan(given.rounds, Plan.of(False).round_s, False)
    passes: tuple[Pass, ...] = PASSES if given.which == "both" else ("forward",)
    try:
        made = run(cases_of(given), passes, given.peers, given.compiled, plan)
    except (CaseError, WorkerError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output: Path = given.output
    result.finish(made, output)
    written = [output, *model_figures.write_beside(made, output)]
    print("\n".join([*result.lines(made), *model_figures.table(made)]))
    print(f"written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
