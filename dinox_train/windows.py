"""The loader of a run's windows, made as a configuration says."""

from __future__ import annotations

from dinox_io import Loader
from dinox_train.config import Config, ConfigError
from dinox_train.data import Dataset
from dinox_train.feed import Feed
from dinox_train.ranks import ALONE, Ranks


def open_loader(config: Config, dataset: Dataset, feed: Feed, position: int, ranks: Ranks = ALONE) -> Loader:
    """Global batches from number `position` on, of the side that the run trains on, in memory that `feed` gives: of
    each this rank's rows.

    config: that of the stage. Raises ConfigError where there are no such batches.
    """
    data, train = config.data, config.train
    try:
        return Loader(
            [(source.shards, source.weight) for source in dataset.sources],
            batch_size=train.batch_size,
            depth=data.depth,
            step=data.step,
            step_mm=data.step_mm,
            every=data.every,
            every_mm=data.every_mm,
            limit=data.limit,
            seed=config.seed,
            mode=data.mode,
            run_length=data.run_length,
            split=dataset.train_side,
            inflation=data.inflation,
            position=position,
            parts=train.accumulation,
            rank=ranks.rank,
            world=ranks.count,
            threads=data.threads,
            prefetch_bytes=data.prefetch_mib * 2**20,
            pool_bytes=data.pool_mib * 2**20,
            cache_bytes=data.cache_mib * 2**20,
            max_gbps=data.max_gbps,
            filtered=feed.filtered,
            slab=feed.allocate,
            timeout_s=data.timeout_s,
        )
    except ValueError as error:
        raise ConfigError(f"data, train: {error}") from None
