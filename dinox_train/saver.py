"""Checkpoints written beside training: a copy of the run's state is taken, a thread writes it, the loop goes on.

One save at a time. What the thread meets is told when it is asked for, in the thread that trains; `close` waits for
the save under way. Invariant: `saved` is the update of the newest checkpoint that stands whole on the disk.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from dinox_model import VisionTransformer
from dinox_train.checkpoint import CheckpointError, rotate, save_checkpoint
from dinox_train.host_copy import HostCopy, Named, bytes_of
from dinox_train.parallel import Parallel
from dinox_train.part import Held, values_by_file, with_values
from dinox_train.sections import CheckpointSection

log = logging.getLogger("dinox_train")
_MODEL = "model"
"""Under this name the teacher's weights are copied with the rest."""
_LEFT_FREE = 1.25
"""A copy is taken where so many times its size is free: the loader and the file cache need room, too."""


class Saver:
    """Writes the checkpoints of a run under `root`, and deletes old ones."""

    def __init__(
        self, root: Path, device: torch.device, settings: CheckpointSection, parallel: Parallel | None = None
    ) -> None:
        """parallel: the processes that write together; None: this one does alone."""
        self.saved: int | None = None
        self._parallel = parallel or Parallel(device)
        self._root, self._settings = root, settings
        self._copy = HostCopy(device)
        self._network: VisionTransformer | None = None
        self._beside: bool | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None
        self._update, self._held_up_s, self._written_s = 0, 0.0, 0.0
        self._failures = 0

    def begin(
        self,
        update: int,
        *,
        teacher: VisionTransformer,
        weights: Mapping[str, torch.Tensor] | None,
        tensors: Mapping[str, Mapping[str, Held]],
        state: Mapping[str, Any],
        before: Callable[[], None],
    ) -> None:
        """Begin the checkpoint after `update` updates; `heard` says later how it went. Nothing may be under way.

        weights: the teacher's, in fp32; None where another rank has them. tensors: by file and name. before: called by
        the thread once the checkpoint is about to be written, to bring to the disk what must be there earlier. Where
        the host has no room for a copy of the tensors, this writes them itself, and the caller waits.
        """
        assert self._under_way is None, "heard() comes first"
        begin = time.perf_counter()
        self._update = update
        whole = values_by_file(tensors) | {_MODEL: dict(weights or {})}
        if self._beside is None:
            self._beside = self._has_room(bytes_of(whole))
        if self._beside:
            kept = self._copy.take(whole)
            args = (update, self._with(kept[_MODEL], teacher), tensors, kept, copy.deepcopy(state), before)
            self._under_way = self._thread.submit(self._write, *args)
        else:
            self._under_way = Future()
            try:
                network = self._with(whole[_MODEL], teacher)
                self._under_way.set_result(self._write(update, network, tensors, whole, state, before))
            except Exception as error:
                self._under_way.set_exception(error)
        self._held_up_s = time.perf_counter() - begin

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint was begun that nobody has heard of since."""
        return self._under_way is not None

    def heard(self) -> str | None:
        """Wait for the save under way, and return what went wrong with it; None: nothing, or there is none.

        Raises CheckpointError where `checkpoint.max_failures` saves in a row could not be written.
        """
        if self._under_way is None:
            return None
        under_way, self._under_way = self._under_way, None
        begin = time.perf_counter()
        try:
            under_way.result()
        except OSError as error:
            why = error.strerror or str(error)
            if self.saved == self._update:
                return f"the checkpoint of update {self._update} is whole, but older ones could not be deleted: {why}"
            self._failures += 1
            if self._failures >= self._settings.max_failures:
                raise CheckpointError(
                    f"the last {self._failures} checkpoints could not be written ({why}): stopped after update "
                    f"{self._update}, since what is learnt from here on could not be kept. The newest whole one is of "
                    f"update {self.saved or 0}. Make room or repair the disk of {self._root}, and start the run again "
                    "(checkpoint.max_failures says how many may fail)."
                ) from error
            return f"the checkpoint of update {self._update} failed: {why}"
        self._failures = 0
        self._held_up_s += time.perf_counter() - begin
        log.info(
            "checkpoint of update %d: training was held up for %.3f s, writing took %.1f s",
            self._update,
            self._held_up_s,
            self._written_s,
        )
        return None

    def close(self) -> None:
        """Wait for the save under way; nothing can be begun afterwards."""
        self._thread.shutdown(wait=True)

    def _write(
        self,
        update: int,
        teacher: VisionTransformer | None,
        tensors: Mapping[str, Mapping[str, Held]],
        kept: Named,
        state: Mapping[str, Any],
        before: Callable[[], None],
    ) -> None:
        """kept: the values of `tensors`, and the teacher's, as they were when the save began."""
        begin, parallel = time.perf_counter(), self._parallel

        def ready() -> None:
            self._copy.arrive()
            before()

        parts = {name: with_values(named, kept[name]) for name, named in tensors.items()}
        if parallel.saving is None:
            assert teacher is not None
            ready()
            save_checkpoint(self._root, update, teacher=teacher, tensors=values_by_file(parts), state=state)
        else:
            from dinox_train.checkpoint_of_ranks import on_all, save_together

            # Agreed on: where one rank cannot, the others must not wait for its part.
            on_all(ready, parallel.saving)
            of_all = {f"{name}/{key}": one for name, named in kept.items() for key, one in named.items()}
            save_together(
                self._root,
                update,
                teacher=teacher,
                tensors=parts,
                state=state,
                replicas=of_all if parallel.mode == "ddp" else {},
                group=parallel.saving,
            )
        self.saved, self._written_s = update, time.perf_counter() - begin
        if parallel.is_first:
            rotate(self._root, keep_last=self._settings.keep_last, keep_every=self._settings.keep_every)

    def _with(self, weights: Mapping[str, torch.Tensor], teacher: VisionTransformer) -> VisionTransformer | None:
        """A network beside the teacher that holds `weights` themselves; None where another rank has them."""
        if not weights:
            return None
        if self._network is None:
            with torch.device("meta"):
                self._network = VisionTransformer(teacher.config)
        self._network.load_state_dict(weights, assign=True)
        self._network.preprocess = teacher.preprocess
        return self._network

    def _has_room(self, needed: int) -> bool:
        free = psutil.virtual_memory().available // self._parallel.on_host
        said = f"{needed / 2**30:.2f} GiB of host memory for a copy, {free / 2**30:.1f} GiB free"
        if free >= needed * _LEFT_FREE:
            log.info("checkpoints are written while training goes on (%s)", said)
            return True
        log.warning("checkpoints are written while training WAITS: too little room (%s)", said)
        return False
