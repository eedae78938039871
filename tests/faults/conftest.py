"""Runs small enough to be broken again and again: the set, the configuration and the tiny network of tests/train."""

from tests.train.conftest import small_config, small_set, tiny_preset, train

__all__ = ["small_config", "small_set", "tiny_preset", "train"]
