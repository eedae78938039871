"""`python -m dinox_train --config C.yaml [--config OVERLAY.yaml] [a.b=value ...]`: start a run, or go on with it.

The same command on a run folder that holds checkpoints resumes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dinox_io import ShardError, codec
from dinox_model.host_memory import keep_freed_memory
from dinox_train.checkpoint import Checkpoint, CheckpointError, newest_checkpoint, remove_leftovers
from dinox_train.config import Config, ConfigError, difference, load_config, to_yaml, validate
from dinox_train.data import LeakError, open_dataset, tell_provenance
from dinox_train.learner import Learner, preprocess_of
from dinox_train.plan_report import plan_lines
from dinox_train.platform import PrecisionError, check_compiler, choose_device, describe
from dinox_train.prototype_counts import with_prototypes
from dinox_train.run import RunFolder, RunFolderError, StopSignals, log, logging_to
from dinox_train.stages import stages_of
from dinox_train.trainer import Trainer

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2

DESCRIPTION = """Pretrain a vision transformer on CT shards.

Start a run, or go on with it: the same command on a run folder that holds checkpoints resumes the run, bit for bit on
CPU. Later --config files overlay earlier ones (a hardware overlay, say), and a.b=value overlays both."""

EXAMPLES = """examples:
  python -m dinox_train --config configs/demo.yaml data.shards=fake          try this machine without any data
  python -m dinox_train --config configs/vit_s.yaml --config configs/hardware/rtx_4090.yaml data.shards=/data/shards
  python -m dinox_train --config configs/vit_l.yaml --config configs/hardware/rtx_4090.yaml --plan      does it fit?

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
        help="a single setting, e.g. train.updates=2000; every key stands in dinox_train/sections/",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="say what the run would take and whether it fits, and end; needs no shards and no GPU, writes nothing",
    )
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        if options.plan:
            print("\n".join(plan_lines(config)))
            return EXIT_DONE
        return run(config)
    except (ConfigError, LeakError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except torch.OutOfMemoryError as error:
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"error: the device's memory is full (peak {peak:.1f} GiB): {str(error).splitlines()[0]}\n"
            "Raise train.accumulation (smaller pieces, same result); the newest checkpoint is intact.",
            file=sys.stderr,
        )
        return EXIT_ERROR
    except (CheckpointError, MemoryError, OSError, PrecisionError, RunFolderError, ShardError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR


def run(config: Config) -> int:
    """Start or resume the run that `config` describes; return the exit code."""
    folder = RunFolder(Path(config.run.folder))
    with StopSignals() as stop, folder.locked():
        remove_leftovers(folder.checkpoints)
        checkpoint, damage = newest_checkpoint(folder.checkpoints)
        config = settled(config, config_of(checkpoint) if checkpoint else None)
        if checkpoint and checkpoint.update >= config.train.updates:
            print(f"{folder.path}: done already, {checkpoint.update} updates (train.updates={config.train.updates}).")
            return EXIT_DONE
        try:
            device = choose_device(config.device)
            if any(stage.config.execution.compile != "off" for stage in stages_of(config)):
                check_compiler(device)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if device.type == "cpu":
            keep_freed_memory()
        with logging_to(folder.path, config.train.updates) as progress:
            for message in damage:
                log.warning("a damaged checkpoint was set aside: %s", message)
            began = checkpoint.state["shards"] if checkpoint else None
            dataset = open_dataset(config.data, folder.path, began, log.info)
            if config.data.shards == "fake":
                log.warning("data.shards is fake: made-up volumes, to try a machine; nothing can be learnt from them")
            tell_provenance(dataset, log.info, log.warning)
            log.info("%s", dataset.sides_in_words)
            log.info("peak learning rate %s", config.optimizer.learning_rate_in_words(config.train.batch_size))
            learner = Learner(config, preprocess_of(config, dataset.hu_histogram), device)
            trainer = Trainer(learner, dataset, folder, device)
            if checkpoint:
                trainer.resume(checkpoint)
            elif config.run.init_from:
                start_from(learner, Path(config.run.init_from))
            folder.write_text("config.yaml", to_yaml(config))
            noted = {"shards": dataset.provenance, "filters": codec.describe().removeprefix("filters: ")}
            folder.write_json("env.json", describe(device) | noted)
            return trainer.train(stop, progress)


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
    changed = difference(previous, config)
    if changed:
        raise ConfigError(
            f"{config.run.folder} holds checkpoints of a run with other mathematics:\n  "
            + "\n  ".join(changed)
            + "\nUndo the change to resume, or give another run.folder (and run.init_from to start from these weights)."
        )
    return config


if __name__ == "__main__":
    sys.exit(main())
