"""`python -m dinox_train --config C.yaml [--config OVERLAY.yaml] [a.b=value ...]`: start a run, or go on with it.

The same command on a run folder that holds checkpoints resumes it.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dinox_io import ShardError, codec
from dinox_model import WeightsError
from dinox_model.host_memory import keep_freed_memory
from dinox_train.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, remove_leftovers
from dinox_train.config import Config, ConfigError, difference, load_config, to_yaml, validate
from dinox_train.data import LeakError, open_dataset, tell_provenance
from dinox_train.fake import FAKE_SET, write_fake_set
from dinox_train.kernel_choice import RunKernels, choose_run_kernels, product_rows
from dinox_train.learner import Learner, preprocess_of, vit_config
from dinox_train.out_of_memory import is_out_of_memory, out_of_memory_in_words
from dinox_train.parallel import GradientMissing, Parallel, PeerFailed, joined, lost_rank_in_words
from dinox_train.plan_report import plan_lines
from dinox_train.platform import (
    PrecisionError,
    check_compiler,
    describe,
    make_deterministic,
    product_dtype,
)
from dinox_train.platform.start import Platform, start
from dinox_train.prototype_counts import with_prototypes
from dinox_train.rehearsal import rehearse
from dinox_train.run import RunFolder, RunFolderError, StopSignals, log, logging_to
from dinox_train.stages import stages_of
from dinox_train.trainer import Trainer
from dinox_train.watch.sinks import check_installed

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2

DESCRIPTION = """Pretrain a vision transformer on CT shards.

Start a run, or go on with it: the same command on a run folder that holds checkpoints resumes the run, bit for bit on
CPU. Later --config files overlay earlier ones (a hardware overlay, say), and a.b=value overlays both."""

EXAMPLES = """examples:
  python -m dinox_train --config configs/demo.yaml data.shards=fake          try this machine without any data
  python -m dinox_train --config configs/vit_s.yaml --config configs/hardware/rtx_4090.yaml data.shards=/data/shards
  python -m dinox_train --config configs/vit_l.yaml --config configs/hardware/rtx_4090.yaml --plan      does it fit?
  python -m dinox_train --config configs/vit_l.yaml --plan plan.machine=h200 plan.days=14   what fits into two weeks?
  python -m dinox_train --config configs/vit_l.yaml --config configs/micro.yaml     a rehearsal: 0 passed, 1 failed

exit codes: 0 done (with --plan: whatever the verdict) · 1 error · 2 usage or a refused configuration · 4 stopped by the
health guard · 5 the loader stalled · 143 / 130 after a checkpoint on SIGTERM / SIGINT"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinox_train",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", action="append", required=True, metavar="FILE", help="a YAML file, e.g. configs/vit_s.yaml"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=value",
        help="a single setting, e.g. train.updates=2000, or stages.0.updates=500 of a stage in a file; every key "
        "stands in dinox_train/sections/",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say what the run would take, here or on plan.machine, and whether it fits, and end; needs no shards and "
        "no GPU, writes nothing",
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        if options.plan:
            print("\n".join(plan_lines(config)))
            return EXIT_DONE
        return run(config) if config.rehearsal is None else rehearse(config)
    except (ConfigError, LeakError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (
        CheckpointError,
        GradientMissing,
        MemoryError,
        OSError,
        PeerFailed,
        PrecisionError,
        RunFolderError,
        ShardError,
        WeightsError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except RuntimeError as error:
        words = out_of_memory_in_words(error, config) if is_out_of_memory(error) else lost_rank_in_words(error, config)
        if words is None:
            raise
        print(f"error: {words}", file=sys.stderr)
        return EXIT_ERROR


def run(config: Config) -> int:
    """Start or resume the run that `config` describes; return the exit code."""
    with StopSignals() as stop, joined(config) as parallel:
        folder = RunFolder(Path(config.run.folder), parallel.ranks.rank)
        with folder.locked():
            return _run(config, parallel, folder, stop)


def _run(config: Config, parallel: Parallel, folder: RunFolder, stop: StopSignals) -> int:
    """One process's part."""
    checkpoint, damage = parallel.from_first(lambda: _newest(folder))
    config = settled(parallel.own(config), config_of(checkpoint) if checkpoint else None)
    if checkpoint and checkpoint.update >= config.train.updates:
        print(f"{config.run.folder}: done already, {checkpoint.update} updates (train.updates={config.train.updates}).")
        return EXIT_DONE
    device = parallel.device
    try:
        check_installed(config.log.sinks)
        if any(stage.config.execution.compile != "off" for stage in stages_of(config)):
            check_compiler(device)
        repeatable = make_deterministic() if config.deterministic else None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if device.type == "cpu":
        keep_freed_memory()
    with logging_to(folder.path, config.train.updates, quiet=not parallel.is_first) as progress:
        for message in damage:
            log.warning("a damaged checkpoint was set aside: %s", message)
        if repeatable is not None:
            log.info("%s", repeatable)
        platform, kernels = settle_machine(config, device)
        state = checkpoint.state if checkpoint else {}
        so_far = {"removals": state.get("removals", ()), "update": state.get("update", 0)}
        ranks, run_folder = parallel.ranks, Path(config.run.folder)
        if config.data.shards == "fake":
            parallel.from_first(lambda: write_fake_set(run_folder / FAKE_SET).name)
        share = (ranks.rank, ranks.count)
        dataset = open_dataset(config.data, run_folder, state.get("shards"), log.info, share=share, **so_far)
        if config.data.shards == "fake":
            log.warning("data.shards is fake: made-up volumes, to try a machine; nothing can be learnt from them")
        tell_provenance(dataset, log.info, log.warning)
        log.info("%s", dataset.sides_in_words)
        log.info("peak learning rate %s", config.optimizer.learning_rate_in_words(config.train.batch_size))
        preprocess = preprocess_of(config, dataset.hu_histogram)
        learner = Learner(config, preprocess, device, kernels, platform.routes, parallel)
        trainer = Trainer(learner, dataset, folder, device, platform.peak_tflops)
        if checkpoint:
            trainer.resume(checkpoint)
        elif config.run.init_from:
            start_from(learner, Path(config.run.init_from))
        folder.write_text("config.yaml", to_yaml(config))
        noted = {"shards": dataset.provenance, "filters": codec.describe().removeprefix("filters: ")}
        noted |= {
            "ranks": parallel.ranks.count,
            "parallel": parallel.mode,
            "platform": platform.record(),
            "kernels": kernels.record(),
            "removals": dataset.removals,
        }
        folder.write_json("env.json", describe(device) | noted)
        return trainer.train(stop, progress)


def _newest(folder: RunFolder) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, and what is said of damaged ones; what a kill left behind is removed."""
    remove_leftovers(folder.checkpoints)
    return newest_checkpoint(folder.checkpoints)


def settle_machine(config: Config, device: torch.device) -> tuple[Platform, RunKernels]:
    """Look at the machine and set it, choose the kernels, and say all of it. Raises ConfigError for a kernel that was
    asked for by name and cannot run."""
    vit, stages = vit_config(config), stages_of(config)
    dtype = product_dtype(config.precision)
    rows = product_rows(vit, stages, dtype)
    platform = start(device, vit, rows, dtype, routed=config.kernels.linear == "auto")
    for line in platform.lines:
        log.info("%s", line)
    for line in platform.warnings:
        log.warning("%s", line)
    try:
        kernels = choose_run_kernels(config, vit, stages, device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for choice in kernels.choices:
        log.info("%s", choice.words())
        if choice.warning is not None:
            log.warning("%s", choice.warning)
    return platform, kernels


def config_of(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was written with."""
    try:
        return validate(checkpoint.state["config"])
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: holds a configuration that this version of DINOX does not know; use the one that "
            f"wrote it.\n{error}"
        ) from None


def start_from(learner: Learner, folder: Path) -> None:
    """Begin a new run with the weights in `folder`. Raises ConfigError where there are none that fit."""
    try:
        for line in learner.start_from(folder):
            log.info("%s", line)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.init_from: {error}") from None


def settled(config: Config, previous: Config | None) -> Config:
    """`config` with the length of its schedules and its numbers of prototypes; refused where it changes the mathematics
    of `previous`.

    Raises ConfigError with the difference.
    """
    length = config.schedule.updates
    if length is None:
        length = previous.schedule.updates if previous else config.train.updates
    config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"updates": length})})
    config = with_prototypes(config, previous)
    if previous is None:
        return config
    if config.run.init_from != previous.run.init_from and config.run.init_from is not None:
        raise ConfigError(
            f"run.init_from: {config.run.folder} holds checkpoints of a run that began otherwise; weights start a "
            "new run, so give another run.folder."
        )
    # Whose weights it began with stays in its checkpoints: they say whom it has seen (tools/probing/pretraining.py).
    config = config.model_copy(update={"run": config.run.model_copy(update={"init_from": previous.run.init_from})})
    changed = difference(previous, config)
    if changed:
        raise ConfigError(
            f"{config.run.folder} holds checkpoints of a run with other mathematics:\n  "
            + "\n  ".join(changed)
            + "\nUndo the change to resume, or give another run.folder (and run.init_from to start from these weights)."
        )
    return config


if __name__ == "__main__":
    # `kill -USR1`, or the supervisor before it ends a run that hangs: where each thread is, on standard error.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.exit(main())
