"""What is said when the memory is full: how much was taken, and which setting to lower."""

from __future__ import annotations

import resource

import torch

from dinox_train.config import Config
from dinox_train.stages import stages_of

_OF_THE_CPU = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's of a full memory, of a GPU or of the host (a plain RuntimeError)."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_THE_CPU)
    )


def out_of_memory_in_words(error: BaseException, config: Config) -> str:
    """Several lines: the peak as measured, the settings that need less with the same result, what is kept."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    if peak:
        measured = f"the device's memory is full (peak {peak / 2**30:.1f} GiB allocated by torch)"
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        measured = f"the memory is full (peak {peak / 2**30:.1f} GiB resident)"
    advice = [*_pieces(config), *_checkpointing(config), "views of fewer or smaller crops (other mathematics)"]
    return (
        f"{measured}: {str(error).splitlines()[0]}\nWhat needs less: {'; '.join(advice)}.\n"
        "The newest checkpoint is intact: the same command goes on from it. --plan says what an update takes."
    )


def _pieces(config: Config) -> list[str]:
    images, now = config.train.batch_size, config.train.accumulation
    more = next((pieces for pieces in range(now + 1, images + 1) if images % pieces == 0), None)
    if more is None:
        return []
    return [
        f"train.accumulation={more} (now {now}: {images // now} images at a time; then {images // more}; same result)"
    ]


def _checkpointing(config: Config) -> list[str]:
    if all(stage.config.execution.activation_checkpointing != "none" for stage in stages_of(config)):
        return []
    return ["execution.activation_checkpointing=block (slower; same result)"]
