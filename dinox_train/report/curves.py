"""The charts of what a run learns: its loss, the figures that would show a collapse, and what its updates are like."""

from __future__ import annotations

from collections.abc import Iterator

from dinox_train.report.chart import Axis, Marks, draw_chart
from dinox_train.report.field_chart import FieldChart, curve_of, draw_for, field_charts, with_mean
from dinox_train.report.history import History
from dinox_train.report.numerals import number, percent
from dinox_train.report.timeline import marks_of
from dinox_train.report.verdict import most_prototypes


def learning(history: History) -> Iterator[str]:
    """The loss, and what evaluations find of patients that were never seen."""
    marks = marks_of(history.events, history.skipped, history.last_update)
    yield '<section><h2>Learning</h2><div class="charts wide">'
    validation = curve_of(history.lines, "loss_val", "validation", "second")
    sentence = "The student's cross-entropy with the teacher's targets. It should fall and level off."
    if not validation.is_empty:
        sentence += " On validation it is that of patients who are never trained on."
    else:
        sentence += f" {_no_validation(history)}"
    yield draw_chart(
        "Loss",
        [*with_mean(history.lines, "loss", "loss"), validation],
        Axis(write=number),
        sentence=sentence,
        empty="No update is done yet.",
        marks=marks,
        over=history.span,
    )
    yield "</div>"
    yield from field_charts(
        history,
        marks,
        FieldChart(
            "Height of a slice, told from its features (knn_z)",
            {"knn_z": "knn_z"},
            Axis(write=number, include=(0.0, 1.0)),
            "R² of a slice's height in its volume, predicted from its nearest neighbours among the training patients. "
            "Rising is good: memorising patients does not help it. Below 0 is worse than a guess.",
            colour="second",
            noisy=False,
        ),
        FieldChart(
            "Labels, told from features (knn_label)",
            {"knn_label": "knn_label"},
            Axis(write=number, include=(0.0, 1.0)),
            "How well the nearest neighbours among the training patients tell which slices of unseen patients bear a "
            "mark (AUROC). Rising is good; 0.5 is a guess.",
            colour="second",
            noisy=False,
        ),
    )
    yield "</section>"


def health(history: History) -> Iterator[str]:
    """The figures that would show a collapse."""
    most = most_prototypes(history)
    limit = f" With this batch it can reach at most {percent(most)}." if most else ""
    whole = Axis(write=number, include=(0.0, 1.0))
    told = history.texts.get("shortcut_name", "the scanner or the data set")
    charts = (
        FieldChart(
            "Teacher entropy",
            {"teacher_entropy": "teacher entropy"},
            whole,
            "How undecided the teacher is, as a share of ln K. Good: below 1 and steady. At 1 its targets are uniform "
            "and teach nothing; near 0 it is certain of everything.",
            always=True,
        ),
        FieldChart(
            "Feature std",
            {"feature_std": "feature std"},
            Axis(write=number, include=(0.0,)),
            "How far apart features of different images point. Good: well above 0, up to 1. At 0 all are the same.",
            always=True,
        ),
        FieldChart(
            "Effective rank",
            {"effective_rank": "effective rank"},
            Axis(write=number, include=(0.0,)),
            "How many directions the features of one batch use; never more than it has global views. Good: high or "
            "rising. Close to 1 is a collapse.",
            always=True,
        ),
        FieldChart(
            "Prototype use",
            {"prototype_use": "prototype use"},
            Axis(write=percent, include=(0.0,)),
            f"Share of the prototypes that some view of a batch chose. Good: steady. Near 0 it is a collapse.{limit}",
            always=True,
        ),
        FieldChart(
            "Patch similarity",
            {"patch_similarity": "patch similarity"},
            whole,
            "Mean cosine between the patches of one image. Good: well below 1. Close to 1 all patches say the same: a "
            "dense collapse, which the figures of whole images do not show.",
        ),
        FieldChart(
            "Shortcut",
            {"shortcut_accuracy": "told rightly", "shortcut_chance": "chance"},
            whole,
            f"Whether {told} of a scan can be read from its features, beyond chance. High while knn_z is poor: the "
            "network looks at how an image was made, not at what it shows.",
            colour="second",
        ),
    )
    yield '<section><h2>Health</h2><p class="intro">A self-supervised network can cheat by saying the same of every '
    yield "image. Its loss may look fine then; these figures would show it.</p>"
    yield from field_charts(history, marks_of(history.events, history.skipped, history.last_update), *charts)
    yield "</section>"


def optimizer(history: History) -> Iterator[str]:
    """What the updates were like."""
    skipped = history.skipped
    if skipped:
        shown = ", ".join(f"{update:,.0f}" for update in skipped[:8]) + (" …" if len(skipped) > 8 else "")
        note = f"{len(skipped)} of {len(history.lines):,} updates were not applied: {shown}."
    else:
        note = "Every update was applied."
    rate, norm = (
        FieldChart(
            "Learning rate",
            {"lr": "learning rate"},
            Axis(write=number, include=(0.0,)),
            "As applied: warm-up, then its schedule.",
            always=True,
            colour="first",
            noisy=False,
        ),
        FieldChart(
            "Gradient norm",
            {"grad_norm": "gradient norm"},
            Axis(write=number, logarithmic=True),
            f"Before clipping. Good: steady or falling; a rise over many updates precedes trouble. {note}",
            always=True,
            colour="first",
        ),
    )
    yield '<section><h2>Optimizer</h2><div class="charts">'
    yield draw_for(history, rate, Marks())
    yield draw_for(history, norm, marks_of(history.events, history.skipped, history.last_update))
    yield "</div></section>"


def _no_validation(history: History) -> str:
    every = history.config.evaluate.every if history.config else None
    total = history.config.train.updates if history.config else None
    if every and total and history.last_update < min(every, total):
        return f"The first evaluation comes at update {min(every, total):,}."
    return "No validation curve: the shards hold no validation side (or no training side), so all patients train."
