"""The training loop, and what a run does around it: wait, views, update, figures, evaluate, save, stop.

Everything random is a pure function of (seed, position, row, view), so a run's state is its tensors and a few
integers: a resumed run equals the uninterrupted one bit for bit on CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.progress import Progress

from dinox_io import Batch, Loader, LoaderError, LoaderStalled, ShardError
from dinox_train.checkpoint import Checkpoint
from dinox_train.data import Dataset
from dinox_train.drawn import Drawn
from dinox_train.evaluate import Evaluator
from dinox_train.feed import Feed
from dinox_train.guard import Guard
from dinox_train.learner import Learner, Values
from dinox_train.memory_trend import MemoryTrend, host_memory_bytes
from dinox_train.metrics import VERSION, LineFile
from dinox_train.micro_batch import GlobalBatch
from dinox_train.parallel import PeerFailed
from dinox_train.pictures import save_views_picture
from dinox_train.plan_report import costs_in_words
from dinox_train.platform import assert_precision
from dinox_train.profile import Profiler
from dinox_train.report import Report
from dinox_train.rollback import checkpoint_before, remove_after
from dinox_train.run import RunFolder, StopSignals, log
from dinox_train.saver import Saver
from dinox_train.slice_labels import SliceLabels
from dinox_train.stage_timers import Stages, StageTimers
from dinox_train.step import StepResult
from dinox_train.update_line import LOADER_SUMS, begin_line, in_words, memory_bytes
from dinox_train.utilisation import Utilisation
from dinox_train.view_batch import ViewBatch
from dinox_train.views import ViewPlan
from dinox_train.watch import Watch
from dinox_train.windows import open_loader

EXIT_DONE, EXIT_ERROR, EXIT_HEALTH, EXIT_STALLED = 0, 1, 4, 5
_ENDINGS = {
    EXIT_DONE: "done",
    EXIT_ERROR: "by an error of the data",
    EXIT_HEALTH: "by the health guard",
    EXIT_STALLED: "by a loader that stalled",
}
_GRAVE = ("alarm", "stopped", "rollback")


@dataclass
class Pending:
    """An update whose figures are still on the device."""

    line: dict[str, Any]
    result: StepResult
    drawn: Drawn
    stages: Stages


class Trainer:
    """One process's part in a run, from the first update it does to the last."""

    def __init__(
        self,
        learner: Learner,
        dataset: Dataset,
        folder: RunFolder,
        device: torch.device,
        peak_tflops: float | None = None,
    ) -> None:
        self.learner, self.dataset, self.folder, self.device = learner, dataset, folder, device
        self.parallel = learner.parallel
        self.config = learner.config
        self.labels = self._slice_labels()
        self.evaluator = Evaluator(dataset, learner, device, self.labels)
        self.feed = Feed(device, learner.kernels.unfilter, self.config.data.pin)
        self.timers, self.memory, self.utilisation = (
            StageTimers(device),
            MemoryTrend(),
            Utilisation(peak_tflops, learner.parallel.ranks.count),
        )
        self.profiler = Profiler(folder.path / "profile", self.config.profile.at, self.timers, device)
        self.update = 0
        self.report = Report(folder.path)
        self.saver = Saver(folder.checkpoints, device, self.config.checkpoint, self.parallel)
        self.guard = Guard(learner.run_config)
        self.watch = Watch(folder.path, learner.run_config, device)
        self.pending: Pending | None = None
        self.precision_seen = False

    def _slice_labels(self) -> SliceLabels | None:
        name = self.learner.objective.needs.labels
        if name is None:
            return None
        return SliceLabels(name, [(source.folder, source.shards.volumes) for source in self.dataset.sources])

    def resume(self, checkpoint: Checkpoint) -> None:
        """Be where the checkpoint was."""
        self.learner.restore(checkpoint)
        self.guard.restore(checkpoint.state)
        self.update = self.saver.saved = checkpoint.update

    def train(self, stop: StopSignals, progress: Progress | None) -> int:
        """Train to `train.updates`, a signal or a health stop; return the exit code. All end with a checkpoint."""
        self._open_lines()
        self.watch.start(self.update, self._event)
        try:
            self._event("started" if self.saver.saved is None else "resumed", f"at update {self.update}")
            for text in self.dataset.removals_told(self.update):
                self._event("removal", text)
            log.info("windows reach the device from %s", self.feed.describe())
            try:
                code = self._stages(stop, progress)
            except (ShardError, LoaderError, PeerFailed) as error:
                # What was learnt so far is sound: keep it, then say what is damaged or hangs.
                self._event("stopped", self.dataset.ways_on(error) if isinstance(error, ShardError) else str(error))
                code = EXIT_STALLED if isinstance(error, LoaderStalled) else EXIT_ERROR
            self.save()
            self._event("ended", _ENDINGS.get(code, f"by signal {stop.received}") + f" after update {self.update}")
            self.watch.end()  # so that the page has the last digest and reading
            log.info("%s: %s", self.report.write(), self.report.verdict())
            return code
        except Exception as error:
            self._event("stopped", f"by an error: {error}")
            raise
        finally:
            self.saver.close()
            self.watch.close()
            self.metrics.close()
            self.events.close()

    @property
    def position(self) -> int:
        """The number of the global batch that comes next: rollbacks have left some out."""
        return self.update + self.guard.skipped

    def _open_lines(self) -> None:
        """Lines past the last update are dropped: they will be written again."""
        self.metrics = LineFile(self.folder.metrics, self.update)
        self.events = LineFile(self.folder.events, self.update)

    def save(self) -> None:
        """Write a checkpoint of this moment, unless it is there already. Raises OSError (a full disk, say)."""
        self._hear_of_save()
        if self.saver.saved != self.update:
            self._begin_save()
            failed = self.saver.heard()
            if failed:
                raise OSError(failed)

    def _begin_save(self) -> None:
        """Have a checkpoint of this moment written while training goes on."""
        self._flush()
        state = {
            "update": self.update,
            "position": self.position,
            **self.guard.state(),
            "config": self.learner.run_config.model_dump(mode="json"),
            "shards": self.dataset.began,
            "removals": self.dataset.removals,
            "began_with": self.learner.began_with,
        }
        self.saver.begin(
            self.update,
            teacher=self.learner.teacher.backbone,
            weights=self.learner.networks.teacher_weights.gathered("backbone."),
            tensors=self.learner.tensors(),
            state=state,
            before=self._sync_lines,
        )

    def _sync_lines(self) -> None:
        """What a checkpoint says was done must not be missing from the lines after a power loss."""
        self.metrics.sync()
        self.events.sync()

    def _hear_of_save(self) -> None:
        """Wait for the save under way, and tell it where it failed. Raises CheckpointError where too many did."""
        failed = self.saver.heard()
        if failed:
            self._event("not saved", failed)
            log.error("%s; earlier checkpoints are intact, training goes on", failed)

    def _stages(self, stop: StopSignals, progress: Progress | None) -> int:
        """One stage after the other, each with a loader of its own; the windows go on where they are."""
        code: int | None = None
        while code is None:
            self.learner.enter(self.update + 1)
            self.config = self.learner.config
            self.utilisation.enter(self.learner)
            if len(self.learner.stages) > 1:
                self._event("stage", f"{self.learner.stage.number} begins or goes on with update {self.update + 1}")
            for line in costs_in_words(self.learner):
                log.info("%s", line)
            with open_loader(self.config, self.dataset, self.feed, self.position, self.parallel.ranks) as loader:
                code = self._loop(loader, stop, progress)
        return code

    def _loop(self, loader: Loader, stop: StopSignals, progress: Progress | None) -> int | None:
        """Train to the end of the stage (None), or to the end of the run: its exit code."""
        config, total = self.config, self.config.train.updates
        last = min(total, self.learner.stage.last or total)
        batches, counters, mark = iter(loader), loader.counters, time.perf_counter()
        (signal,) = self.parallel.largest(stop.received or 0)

        while self.update < last:
            if signal:
                return 128 + signal
            with self.profiler.around(self.update + 1):
                # --- the next global batch: wait, move, make views
                wait_s, drawn = self.parallel.together(lambda: self._draw(batches), ShardError, LoaderError)

                # --- one optimizer update; the figures of the one before are on the host by now
                result, values = self._step(drawn)
            self._flush()

            # --- a save goes on beside one update and no longer: so a kill costs one interval at most
            if self.saver.is_writing:
                with self.timers("save"):
                    self._hear_of_save()

            # --- its line
            self.update += 1
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            before, counters = counters, loader.counters
            line = begin_line(self.learner, self.update, drawn.epoch, values.line(), wait_s=wait_s, seconds=seconds)
            line |= self._measured(seconds, gram=values.objective.get("weight_gram", 0.0) > 0)
            line |= {name: counters[name] - before[name] for name in LOADER_SUMS}
            line |= {"loader_threads": counters["active_threads"], "set_shares": loader.shares}
            self.pending = Pending(line, result, drawn, self.timers.take())

            # --- around it
            evaluates = self.update % config.evaluate.every == 0 or self.update == total
            saves = self.update % config.checkpoint.every == 0
            if evaluates:
                line |= self._evaluate()
            if self.device.type == "cpu" or evaluates or saves:
                self._flush()
            if saves and not self.guard.is_troubled:
                with self.timers("save"):
                    self._begin_save()
            if evaluates or saves:
                self.report.write()
                mark = time.perf_counter()
            self.folder.beat(self.update)
            if progress:
                progress.update(progress.tasks[0].id, completed=self.update)

            # --- a signal, and what the health guard wants, of one rank or all
            guard = self.guard
            signal, back, stops = self.parallel.largest(stop.received or 0, guard.wants_back, guard.stops is not None)
            if back and self._go_back():
                return None
            if stops or guard.stops is not None:
                self._event("stopped", guard.stops or "by the health guard of another rank")
                return EXIT_HEALTH
        return EXIT_DONE if self.update >= total else None

    def _go_back(self) -> bool:
        """Be at the newest checkpoint from before the trouble, and leave out the windows since; False: that cannot be.

        What is left of the updates since is this one event, which stands with the update that is next: a run that is
        killed now and resumed comes to the same.
        """
        guard, limit = self.guard, self.config.health.max_rollbacks
        self._hear_of_save()
        if guard.rollbacks >= limit:
            guard.stops = f"update {guard.bad_since} and those after it are bad again, after {limit} rollbacks"
            return False
        since = guard.bad_since
        checkpoint = self.parallel.from_first(lambda: checkpoint_before(self.folder.checkpoints, since))
        if checkpoint is None:
            guard.stay()
            self._event("not rolled back", f"no checkpoint is from before update {since}, where the trouble began")
            return False
        self.pending = None
        self.parallel.from_first(lambda: remove_after(self.folder.checkpoints, checkpoint.update))
        self.learner.restore(checkpoint)
        self.metrics.close()
        self.events.close()
        dropped, rollbacks = guard.went_back(checkpoint.state, checkpoint.update), guard.rollbacks
        self.update = self.saver.saved = checkpoint.update
        self._open_lines()
        self.report = Report(self.folder.path)  # it has read lines that are gone
        text = (
            f"number {rollbacks} (at most {limit}): from update {since} on losses spiked or were not finite; the run "
            f"is back after update {self.update} and leaves out the {dropped} batches drawn since"
        )
        self._event("rollback", text, update=self.update + 1)
        return True

    def _draw(self, batches: Iterator[Batch]) -> tuple[float, Drawn]:
        """Seconds waited for data, and the views of the next global batch."""
        learner, wait_s, drawn, made = self.learner, 0.0, Drawn(), None
        for _ in range(self.config.train.accumulation):
            begin = time.perf_counter()
            with self.timers("wait"):
                batch = next(batches)
            wait_s += time.perf_counter() - begin
            if made is None:
                recipe = learner.recipe(self.config.train.batch_size)
                made = GlobalBatch(recipe, batch.position, gram=learner.wants_gram_views(self.update + 1))
            with self.timers("transfer"):
                images = self.feed.to_device(batch)
            labels = self.labels and self.labels.of(batch.set, batch.volume, batch.center)
            with self.timers("views"):
                views, plan = made.micro_batch(images, batch.rows, batch.sizes, batch.spacing_mm, labels)
            if self.update == 0 and not drawn.micro_batches and self.parallel.is_first:
                self._picture_of(views, plan)
            drawn.add(batch, views)
        return wait_s, drawn

    def _step(self, drawn: Drawn) -> tuple[StepResult, Values]:
        if not self.precision_seen:
            self._assert_precision(drawn.micro_batches[0])
        return self.learner.step(drawn.micro_batches, self.update + 1, self.timers)

    def _assert_precision(self, views: ViewBatch) -> None:
        student, networks = self.learner.student, self.learner.networks
        head = next(iter(student.heads.values()))
        mm = None if views.teacher_mm is None else views.teacher_mm[:1]
        with networks.eagerly():
            seen = assert_precision(
                lambda x: head(student.backbone(x, mm_per_pixel=mm).cls),
                views.global_views[:1],
                self.config.precision,
                student.parameters(),
            )
        networks.student_weights.zero_gradients()
        log.info("precision: %s asserted, forward and backward: %s", self.config.precision, seen)
        self.precision_seen = True

    def _measured(self, seconds: float, *, gram: bool) -> dict[str, Any]:
        """Of the machine, for the line of the last update."""
        host_bytes = host_memory_bytes()
        return {
            "model_flops_utilisation": self.utilisation.of(seconds, gram=gram),
            "memory_bytes": memory_bytes(self.device),
            "host_memory_bytes": host_bytes,
            "host_memory_trend": self.memory.add(self.update, host_bytes),
        }

    def _flush(self) -> None:
        """Write the line of the last update: this is where the host waits for the device."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        line, figures = pending.line, pending.result.to_host()
        line |= figures | {"stage_s": pending.stages.seconds()}
        line["applied"], line["clipped"] = figures["applied"] == 1.0, figures["clipped"] == 1.0
        found = self.guard.look(line)
        self.metrics.write(line)
        self.watch.line(line)
        if not line["applied"]:
            self._keep_masked(line, pending.drawn)
        for said in found:
            self._event(said.event, said.text, alarm=said.alarm)
        if line["update"] % self.config.log.every == 0 or line["update"] in (1, self.config.train.updates):
            log.info("%s", in_words(line, self.config.train.updates))

    def _keep_masked(self, line: dict[str, Any], drawn: Drawn) -> None:
        """Save which windows an update that was not applied saw, and their statistics."""
        figures = {"update": line["update"], "loss": str(line["loss"]), "grad_norm": str(line["grad_norm"])}
        record = figures | drawn.record(self.dataset)
        # After a rollback the same number is of other windows.
        again = f"-{self.guard.rollbacks}" if self.guard.rollbacks else ""
        self.folder.write_json(f"masked_batches/update-{line['update']:08d}{again}.json", record)

    def _evaluate(self) -> dict[str, Any]:
        found = self.evaluator.evaluate()
        # Slices of patients lie in one place of a run folder, whatever the number of ranks.
        first = self.parallel.is_first
        self.evaluator.save_patch_picture(self.folder.pictures / "patch_features.png" if first else None)
        if found.loss_val is not None:
            log.info("evaluation at update %d: loss_val %.4f, knn_z %s", self.update, found.loss_val, found.knn_z)
        return asdict(found)

    def _picture_of(self, views: ViewBatch, plan: ViewPlan) -> None:
        preprocess = self.learner.preprocess
        save_views_picture(self.folder.pictures / "views.png", views, plan, preprocess.mean, preprocess.std)

    def _event(self, event: str, text: str, *, alarm: str | None = None, update: int | None = None) -> None:
        line = {"version": VERSION, "update": self.update if update is None else update, "event": event, "text": text}
        self.events.write(line if alarm is None else line | {"alarm": alarm})
        self.watch.event(event, text, alarm)
        log.log(logging.WARNING if event in _GRAVE else logging.INFO, "%s %s", event, text)
