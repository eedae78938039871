"""The configuration of a run: what may stand in it, what each key means, and how files and the command line make one.

Defaults < files in the order given < `a.b=value` from the command line. An unknown key or a wrong type is an error
with its place and the nearest name. Config is the only truth: the resolved form lies in the run folder and in every
checkpoint.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]


class ConfigError(ValueError):
    """A configuration that is refused: what, where it stands, what to do."""


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(Section):
    folder: str = "runs/run"
    """Where the run writes: config.yaml, metrics.jsonl, checkpoints/, report.html. The same folder again resumes it."""
    init_from: str | None = None
    """A folder with weights (a checkpoint, or what `dinox_model.save` wrote) that a new run starts from."""


class DataSection(Section):
    shards: str = "shards"
    """A folder that `tools/pack_shards.py` wrote, or `fake`: made-up volumes, for trying a machine."""
    depth: Positive = 3
    """Slices in a window, odd; they are the network's input channels."""
    step: Positive = 1
    """Distance of the window's slices, in slices."""
    edge: Literal["clamp", "reflect", "error"] = "clamp"
    """What a window beyond a volume's end sees: the last slice, the mirrored slices, or (error) no such window exists.
    """
    threads: Positive | None = None
    """Decoder threads; null: chosen from the number of cores."""
    prefetch_mib: Positive = 256
    """Memory for batches that are read ahead, MiB; never more than eight micro-batches are."""
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A loader that hands out nothing for so long has stalled: the run ends with exit code 5."""

    @model_validator(mode="after")
    def _odd_depth(self) -> DataSection:
        if self.depth % 2 == 0:
            raise ValueError(f"depth must be odd (a middle slice and as many on either side), not {self.depth}")
        return self


class ModelSection(Section):
    preset: Literal["vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "vit_g", "vit_7b"] = "vit_s"
    """The size of the network."""
    layer_scale: Annotated[float, Field(gt=0)] = 1e-5
    """First value of LayerScale. 1e-5 is DINOv3's, for long runs: at first no block adds anything. Short ones: 0.1."""


class ViewsSection(Section):
    global_size: Positive = 224
    """Side of a global crop, pixels, a multiple of the patch size (16)."""
    local_size: Positive = 96
    """Side of a local crop, pixels, a multiple of the patch size (16)."""
    num_local: Annotated[int, Field(ge=0)] = 8
    """Local crops of an image, beside its two global ones."""
    global_scale: Range = (0.32, 1.0)
    """Area of a global crop as a fraction of the slice's."""
    local_scale: Range = (0.05, 0.32)
    """Area of a local crop as a fraction of the slice's."""
    aspect: Range = (0.75, 4.0 / 3.0)
    """Width of a crop over its height, drawn log-uniformly."""
    level_hu: Range = (-500.0, 0.0)
    """Centre of a view's intensity window, HU, drawn uniformly for each view."""
    width_hu: Range = (800.0, 2000.0)
    """Width of a view's intensity window, HU, drawn log-uniformly for each view."""
    flip_probability: Fraction = 0.0
    """Left-right flips. 0 by default: the side of an organ is anatomy."""

    @model_validator(mode="after")
    def _sensible(self) -> ViewsSection:
        for name in ("global_size", "local_size"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} must be a multiple of the patch size 16, not {getattr(self, name)}")
        for name in ("global_scale", "local_scale", "aspect", "level_hu", "width_hu"):
            low, high = getattr(self, name)
            if low > high or (name != "level_hu" and low <= 0):
                raise ValueError(f"{name} must be [low, high] with low <= high, not [{low}, {high}]")
        if max(self.global_scale[1], self.local_scale[1]) > 1.0:
            raise ValueError("a crop's scale is a fraction of the slice's area: at most 1.0")
        return self


class ObjectiveSection(Section):
    prototypes: Positive = 4096
    """Classes that teacher and student sort views into. Few for a small batch: a Sinkhorn needs samples for each."""
    head_hidden: Positive = 2048
    """Width of the two hidden layers of the head."""
    head_bottleneck: Positive = 256
    """Features between the hidden layers and the prototypes."""
    student_temperature: Annotated[float, Field(gt=0)] = 0.1
    """Divides the student's logits."""
    teacher_temperature: Annotated[float, Field(gt=0)] = 0.07
    """Divides the teacher's logits after its warm-up; lower is surer, and must be below the student's."""
    teacher_temperature_start: Annotated[float, Field(gt=0)] = 0.04
    """Where its warm-up begins."""
    teacher_temperature_warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from the start to the final temperature."""
    sinkhorn_iterations: Positive = 3
    """Rounds of balancing prototypes and samples."""


class OptimizerSection(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """The peak, as applied: no hidden scaling by the batch size (DINOv3's rule is base x 4 x sqrt(batch / 1024))."""
    final_learning_rate: Annotated[float, Field(ge=0)] = 1e-6
    """Where the cosine ends."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Of matrices; vectors and tokens have none. At the start of a cosine."""
    final_weight_decay: Annotated[float, Field(ge=0)] = 0.04
    """Where that cosine ends."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's average of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's average of the squared gradient."""
    clip_norm: Annotated[float, Field(gt=0)] = 3.0
    """Largest norm of the whole gradient."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of block i of L is times layer_decay^(L - i)."""
    patch_embed_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Further factor on the learning rate of the patch embedding."""
    last_layer_frozen_updates: Annotated[int, Field(ge=0)] = 0
    """The head's prototypes stay as they are for so many updates at the start."""


class ScheduleSection(Section):
    updates: Positive | None = None
    """Length of the schedules; null: the first run's train.updates, then kept by its checkpoints."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates of a straight line from 0 to the peak of the learning rate."""


class TeacherSection(Section):
    momentum: Fraction = 0.994
    """Share of itself that the teacher keeps in an update. At the start of a cosine."""
    final_momentum: Fraction = 1.0
    """Where that cosine ends."""


class TrainSection(Section):
    updates: Positive = 1000
    """Where to stop, in optimizer updates."""
    batch_size: Positive = 64
    """Images (windows) per update, over all micro-batches."""
    accumulation: Positive = 1
    """In how many pieces a batch is computed. Changes memory and speed, not the mathematics."""

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} must divide batch_size {self.batch_size}")
        return self


class CheckpointSection(Section):
    every: Positive = 500
    """Updates between checkpoints. One is also written at the end and on SIGTERM or SIGINT."""
    keep_last: Positive = 2
    """Newest checkpoints that stay; the newest is never deleted."""
    keep_every: Positive | None = None
    """Checkpoints of every so many updates stay for ever; null: none."""


class EvaluateSection(Section):
    every: Positive = 500
    """Updates between evaluations on the validation split."""
    windows: Positive = 256
    """Windows of each side, training and validation, that an evaluation looks at; evenly spread over the split."""
    neighbours: Positive = 10
    """Training slices whose heights predict a validation slice's, for knn_z."""


class LogSection(Section):
    every: Positive = 10
    """Updates between lines in train.log and on the terminal; metrics.jsonl has every update."""


class HealthSection(Section):
    max_masked_updates: Positive = 10
    """So many updates in a row with a non-finite loss or gradient stop the run (exit code 4)."""


class Config(Section):
    """A run's whole configuration."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the first weights, the order of windows and the views."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda or cuda:N; AMD GPUs are `cuda` too (ROCm reports itself so)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 under autocast, weights, teacher and losses in fp32."""
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    views: ViewsSection = ViewsSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    teacher: TeacherSection = TeacherSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()
    health: HealthSection = HealthSection()


# What a resumed run may change: where things lie, how fast they run, how often something is written. All else is
# mathematics.
FREE_ON_RESUME = (
    *("run.", "device", "data.shards", "data.threads", "data.prefetch_mib", "data.timeout_s"),
    *("train.updates", "train.accumulation", "checkpoint.", "evaluate.", "log.", "health."),
)


class _StrictLoader(yaml.SafeLoader):
    """YAML without tags that make objects, with `3e-4` a number (YAML 1.2), and repeated keys refused."""


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.[\d_]+)([eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def load_config(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> Config:
    """The configuration that `files` (later ones overlay earlier ones) and `overrides` (`a.b=value`) describe.

    Raises ConfigError for an unreadable file, invalid YAML, an unknown or repeated key, a wrong type or value.
    """
    tree: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    for file in files:
        part, lines = _read_yaml(Path(file))
        _overlay(tree, part)
        places.update({path: f"{file}:{line}" for path, line in lines.items()})
    for override in overrides:
        path, value = _parse_override(override)
        part = value
        for name in reversed(path):
            part = {name: part}
        _overlay(tree, part)
        places[path] = f"command line: {override}"
    return validate(tree, places)


def validate(tree: Mapping[str, Any], places: Mapping[tuple[str, ...], str] | None = None) -> Config:
    """`tree` (nested mappings) as a Config. Raises ConfigError that names each key, its place and the nearest name."""
    try:
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        lines = [_explain(item, places or {}) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def difference(before: Config, after: Config) -> list[str]:
    """The keys of the mathematics that differ, one line each: `key: before -> after`. Empty: a resume is allowed."""
    old, new = dict(_flatten(before.model_dump())), dict(_flatten(after.model_dump()))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_ON_RESUME)
    ]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(_lists(config.model_dump()), sort_keys=False, allow_unicode=True)


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}). Give an existing YAML file, e.g. configs/demo.yaml."
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text. A configuration is a YAML file.") from None
    try:
        node = yaml.compose(text, _StrictLoader)
        lines = dict(_key_lines(node, (), file)) if node is not None else {}
        tree = _StrictLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must hold keys and values (`train:` …), not a {type(tree).__name__}.")
    return tree, lines


def _key_lines(node: yaml.Node, path: tuple[str, ...], file: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    """Each key's path and line; refuses a key that stands twice in one mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{file}:{line}: key `{'.'.join((*path, name))}` stands already in line {seen[name]}.")
        seen[name] = line
        yield (*path, name), line
        yield from _key_lines(value, (*path, name), file)


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"command line: `{text}` is not of the form a.b=value (e.g. train.updates=2000).")
    try:
        return path, _StrictLoader(value).get_single_data()
    except yaml.YAMLError:
        raise ConfigError(f"command line: the value of `{text}` is not valid YAML; quote it.") from None


def _overlay(tree: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, Mapping) and isinstance(tree.get(name), dict):
            _overlay(tree[name], value)
        else:
            tree[name] = dict(value) if isinstance(value, Mapping) else value


def _explain(item: Mapping[str, Any], places: Mapping[tuple[str, ...], str]) -> str:
    location = tuple(str(part) for part in item["loc"])
    key = ".".join(location)
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), "configuration")
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [full for full, _ in _flatten(Config().model_dump()) if full.split(".")[-1] == location[-1]]
        near = [".".join((*location[:-1], near[0]))] if near else elsewhere
        advice = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}."
        return f"{place}: unknown key `{key}`; {advice}"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" else f" (given: {item['input']!r})"
    return f"{place}: `{key or 'configuration'}`: {message}{given}"


def _known_keys(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for name in path:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _tuples(value: Any) -> Any:
    """Lists as tuples: strict validation takes no list for a pair."""
    if isinstance(value, Mapping):
        return {str(name): _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lists(item) for name, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
