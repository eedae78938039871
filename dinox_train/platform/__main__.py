"""`python -m dinox_train.platform tune --config C.yaml [a.b=value ...]`: tune this machine for a configuration."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinox_train.config import Config

DESCRIPTION = """Tune this machine for a configuration, outside any run: its matrix products one by one (AMD), and
the tiles of our attention kernels. What is faster is kept by machine and version, and runs of any configuration with
the same shapes use it; runs never tune. On a CPU the products are measured, and there is nothing to tune."""

EXAMPLES = """examples:
  python -m dinox_train.platform tune --config configs/vit_l.yaml --config configs/hardware/strix_halo.yaml
  python -m dinox_train.platform tune --config configs/vit_s.yaml precision=bf16

The results lie in $XDG_CACHE_HOME/dinox (~/.cache/dinox), or in the folder that DINOX_CACHE names; delete it to forget.

exit codes: 0 done · 1 error · 2 usage or a refused configuration"""

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dinox_train.platform",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["tune"], help="what to do")
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="a YAML file; later overlay")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="a single setting, e.g. precision=bf16")
    options = parser.parse_intermixed_args(arguments)
    # The configuration needs pydantic and yaml, which the rest of this package does without.
    from dinox_train.config import ConfigError, load_config

    try:
        for line in _tuned(load_config(options.config, options.overrides)):
            print(line, flush=True)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_DONE


def _tuned(config: Config) -> Iterator[str]:
    from dinox_train.kernel_choice import attention_shapes, product_rows
    from dinox_train.learner import vit_config
    from dinox_train.platform.device import choose_device
    from dinox_train.platform.facts import find
    from dinox_train.platform.kept import Kept
    from dinox_train.platform.precision import product_dtype
    from dinox_train.platform.switches import settle
    from dinox_train.platform.tune import Work, tune
    from dinox_train.stages import stages_of

    device = choose_device(config.device)
    facts = find(device)
    yield f"machine: {facts.words()}"
    yield from (f"environment: {line}" for line in settle(facts, os.environ))
    dtype = product_dtype(config.precision)
    vit, stages = vit_config(config), stages_of(config)
    shapes = attention_shapes(vit, stages, dtype)
    rows = product_rows(vit, stages, dtype)
    yield from tune(Work(vit=vit, rows=rows, dtype=dtype, shapes=shapes), facts, device, Kept(facts))


if __name__ == "__main__":
    sys.exit(main())
