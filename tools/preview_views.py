#!/usr/bin/env python3
"""Draw what a configuration shows the network: crops of a set's windows, or of a made-up patient. See `--help`."""

import argparse
import sys
from pathlib import Path

import numpy as np
from phantom.study import StudyPlan, plan_series
from preview.sample import drawn_windows
from preview.views import Window, draw_views_page

from dinox_io import ShardError, open_shards
from dinox_train.config import Config, ConfigError, load_config
from dinox_train.views import ViewSettings

_EXAMPLES = """\
examples:
  python tools/preview_views.py                                         a made-up patient, default views, in views.png
  python tools/preview_views.py --shards shards --config configs/vit_l.yaml
  python tools/preview_views.py --shards shards --windows 8 'views.window_presets={lung: 2, bone: 1}'
  python tools/preview_views.py views.noise_probability=1 views.noise_hu=[50,50]

What to look for: what matters must be visible in most views (a window that is too narrow shows it black or white), and
two views of a window must share enough to be recognised.

exit code: 0 the picture is written; 1 the set is damaged; 2 the command cannot be carried out as it stands
"""
PHANTOM_SIDE, PHANTOM_SLICES = 512, 56


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        description="Draw the views of some windows as one picture (PNG): the boxes in the slice, and what is seen.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("overrides", metavar="a.b=value", nargs="*", help="keys of the configuration, as in training")
    command.add_argument("--config", metavar="C.yaml", type=Path, action="append", default=[], help="may be repeated")
    command.add_argument("--shards", metavar="OUT", type=Path, help="a set of shards (default: a made-up patient)")
    command.add_argument(
        "--windows", metavar="N", type=int, default=2, help="rows of the picture, 1 to 20 (default: 2)"
    )
    command.add_argument("--seed", metavar="N", type=int, default=0, help="other windows of the set (default: 0)")
    command.add_argument(
        "--position", metavar="N", type=int, default=0, help="other views: those of another batch (default: 0)"
    )
    command.add_argument(
        "--output", metavar="FILE", type=Path, default=Path("views.png"), help="the picture (default: views.png)"
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = parser().parse_args(arguments)
    try:
        if not 1 <= given.windows <= 20 or given.position < 0:
            raise ConfigError("--windows must be from 1 to 20, and --position not negative")
        config = load_config(given.config, given.overrides)
        windows = (
            of_the_phantom(config, given.windows, given.seed)
            if given.shards is None
            else of_a_set(given.shards, config, given.windows, given.seed)
        )
        settings = ViewSettings(**config.views.model_dump())
        page = draw_views_page(windows, settings, seed=config.seed, position=given.position)
        page.write(given.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    except ShardError as error:
        print(f"DAMAGED: {error}", file=sys.stderr)
        return 1
    print(f"{len(windows)} windows and their views: {given.output}")
    return 0


def of_a_set(folder: Path, config: Config, count: int, seed: int) -> list[Window]:
    """Windows drawn from a set. Raises ConfigError where there is none, ShardError where it is damaged."""
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: give the one that pack_shards wrote")
    with open_shards(folder) as shards:
        found = []
        for number, z in drawn_windows(shards, count, seed):
            volume = shards.volumes[number]
            hu = shards.read_window(volume, center=z, depth=config.data.depth, step=config.data.step)
            found.append(Window(hu, volume.spacing_mm, f"{volume.id[:12]}…  z {z} of {volume.shape[0]}"))
    return found


def of_the_phantom(config: Config, count: int, seed: int) -> list[Window]:
    """A window of each of the first made-up patients, at another height in each."""
    found = []
    for number in range(count):
        study = StudyPlan(seed=seed, size=PHANTOM_SIDE, slices=PHANTOM_SLICES, number=number)
        series = plan_series(study)[0]
        reach = config.data.step * (config.data.depth // 2)
        middle = round(series.count * (0.55 - 0.35 * number / max(count, 2)))
        places = np.clip(np.arange(middle - reach, middle + reach + 1, config.data.step), 0, series.count - 1)
        hu = np.stack([series.slice_hu(int(place)) for place in places])
        spacing = (series.protocol.spacing_mm, study.grid.pixel_mm, study.grid.pixel_mm)
        found.append(Window(hu, spacing, f"made-up patient {number}, slice {middle} of {series.count}"))
    return found


if __name__ == "__main__":
    sys.exit(main())
