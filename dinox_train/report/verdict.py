"""What a run's figures mean, in plain words. Thresholds of collapse are those of the alarms (dinox_train/alarms.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dinox_train.alarms import (
    ALIKE_PATCHES,
    BLURRED_ENTROPY,
    CERTAIN_ENTROPY,
    COLLAPSED_STD,
    EARLY_UPDATES,
    KNN_FALL,
    LOSS_PINNED,
    LOW_RANK,
    ONE_HOT_ENTROPY,
    SIMILAR_PATCHES,
    SMALL_STD,
    UNIFORM_ENTROPY,
    collapsed_rank,
    few_prototypes,
)
from dinox_train.report.history import History
from dinox_train.report.numerals import number, percent

Level = Literal["good", "watch", "bad"]

DATA_WAIT = 0.1  # of the time


@dataclass(frozen=True)
class Finding:
    """One statement about the run, and how much it matters."""

    level: Level
    text: str


def findings(history: History) -> list[Finding]:
    """Everything that can be said, the worst first. Empty where there are no figures yet."""
    order = {"bad": 0, "watch": 1, "good": 2}
    parts = (_loss, _entropy, _spread, _rank, _prototypes, _patches, _height, _data_wait, _skipped)
    found = [finding for part in parts for finding in part(history)]
    if history.last_update < EARLY_UPDATES:
        found = [Finding("watch", f.text) if f.level == "bad" else f for f in found]
    return sorted(found, key=lambda finding: order[finding.level])


def summary(history: History, found: list[Finding]) -> Finding:
    """The verdict in one sentence."""
    if not found:
        return Finding("watch", "No update is done yet, so there is nothing to judge.")
    if history.last_update < EARLY_UPDATES:
        return Finding("watch", f"Too early to judge: the figures say little before update {EARLY_UPDATES}.")
    words = {"bad": "This run does not learn.", "watch": "Worth a look."}
    if found[0].level in words:
        return Finding(found[0].level, f"{words[found[0].level]} {found[0].text}")
    return Finding("good", "Healthy: the loss falls, and no figure points to a collapse.")


def most_prototypes(history: History) -> float | None:
    """The largest `prototype_use` there can be: two global views an image, each winning one of K prototypes."""
    prototypes = _number_of_prototypes(history)
    if history.config is None or prototypes is None:
        return None
    return min(1.0, 2 * history.config.train.batch_size / prototypes)


def _number_of_prototypes(history: History) -> int | None:
    """None where the objective has none, whatever the key says."""
    if history.config is None or history.config.objective.name != "dinov3":
        return None
    return history.config.objective.prototypes


def _loss(history: History) -> Iterator[Finding]:
    # Of several terms, the DINO term is the one whose value says something by itself.
    name = "loss" if history.now("loss_dino") is None else "loss_dino"
    first, now = history.first(name), history.now(name)
    if first is None or now is None:
        return
    prototypes = _number_of_prototypes(history)
    uniform = math.log(prototypes) if prototypes else math.inf
    if abs(now - uniform) < LOSS_PINNED * uniform:
        yield Finding(
            "bad",
            f"The loss sits at ln K = {uniform:.2f}: that is what a network gets which says the same of every image. A "
            "lower optimizer.learning_rate, a longer schedule.warmup_updates or a lower teacher temperature can help.",
        )
    elif now < first:
        yield Finding("good", f"The loss fell from {number(first)} to {number(now)}.")
    else:
        yield Finding("watch", f"The loss did not fall: {number(first)} at the start, {number(now)} now.")


def _entropy(history: History) -> Iterator[Finding]:
    now = history.now("teacher_entropy")
    if now is None:
        return
    if now > BLURRED_ENTROPY:
        level: Level = "bad" if now > UNIFORM_ENTROPY else "watch"
        yield Finding(level, f"The teacher's targets are close to uniform (entropy {now:.3f} of 1): they teach little.")
    elif now < CERTAIN_ENTROPY:
        level = "bad" if now < ONE_HOT_ENTROPY else "watch"
        yield Finding(level, f"The teacher is almost certain of everything (entropy {now:.3f}); raise its temperature.")
    else:
        yield Finding("good", f"The teacher's targets are neither uniform nor certain (entropy {now:.2f} of 1).")


def _spread(history: History) -> Iterator[Finding]:
    first, now = history.first("feature_std"), history.now("feature_std")
    if first is None or now is None:
        return
    # A small LayerScale lets a network start with features that are almost equal; what counts then is that they part.
    if now < SMALL_STD and now > 2 * first:
        yield Finding(
            "watch", f"Features of different images still point almost the same way, but they part ({now:.3g})."
        )
    elif now < SMALL_STD:
        level: Level = "bad" if now < COLLAPSED_STD else "watch"
        yield Finding(level, f"Features of different images point almost the same way (feature std {now:.3g}).")
    else:
        yield Finding("good", f"Features of different images differ (feature std {now:.2f}).")


def _rank(history: History) -> Iterator[Finding]:
    now = history.now("effective_rank")
    if now is None:
        return
    # A batch of n images cannot span more than about n directions, so a small batch is judged by its size.
    batch = history.config.train.batch_size if history.config else 256
    if now < max(min(LOW_RANK, batch / 4), collapsed_rank(batch)):
        level: Level = "bad" if now < collapsed_rank(batch) else "watch"
        yield Finding(level, f"The features of a batch span only {now:.1f} directions.")
    else:
        yield Finding("good", f"The features of a batch span {now:.1f} directions.")


def _prototypes(history: History) -> Iterator[Finding]:
    now = history.now("prototype_use")
    if now is None or history.config is None or history.config.objective.prototypes is None:
        return
    used = now * history.config.objective.prototypes
    views = 2 * history.config.train.batch_size
    over = f"spread over {used:.0f} prototypes" if used >= 1.5 else "all on one prototype"
    text = f"The {views} global views of a batch are {over}."
    if used < few_prototypes(history.config.train.batch_size):
        yield Finding("bad", text)
    else:
        yield Finding("watch" if used < views / 20 else "good", text)


def _patches(history: History) -> Iterator[Finding]:
    now = history.now("patch_similarity")
    if now is None:
        return
    if now > SIMILAR_PATCHES:
        level: Level = "bad" if now > ALIKE_PATCHES else "watch"
        yield Finding(level, f"The patches of an image have almost the same features (mean cosine {now:.3f}).")
    else:
        yield Finding("good", f"The patches of an image have features of their own (mean cosine {now:.2f}).")


def _height(history: History) -> Iterator[Finding]:
    last = history.last("knn_z")
    if last is None:
        return
    best = history.largest("knn_z") or last
    if best - last > KNN_FALL:
        yield Finding("bad", f"Features of unseen patients get worse: knn_z was {best:.2f} and is {last:.2f}.")
    elif last > 0:
        yield Finding(
            "good", f"Features of unseen patients tell where in the body a slice lies (knn_z {last:.2f} of 1)."
        )
    else:
        yield Finding(
            "watch", f"Features of unseen patients do not tell where in the body a slice lies (knn_z {last:.2f})."
        )


def _data_wait(history: History) -> Iterator[Finding]:
    now = history.now("data_wait_fraction")
    if now is None:
        return
    if now > DATA_WAIT:
        advice = "More data.threads, a larger data.prefetch_mib or faster storage would speed the run up."
        yield Finding("watch", f"Training waits for data {percent(now)} of the time. {advice}")
    else:
        yield Finding("good", f"Training waits for data {percent(now)} of the time.")


def _skipped(history: History) -> Iterator[Finding]:
    number = len(history.skipped)
    if number == 0:
        return
    many = number > 0.01 * len(history.lines)
    were = "update was" if number == 1 else "updates were"
    text = (
        f"{number} {were} not applied, since loss or gradient was not finite (see masked_batches/ in the run folder)."
    )
    yield Finding("watch" if many else "good", text)
