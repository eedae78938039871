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
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dinox_model import PRESETS
from dinox_train.config_file import ConfigError as ConfigError
from dinox_train.config_file import overlay, parse_override, put, read_yaml, written
from dinox_train.lengths import lengths_in_updates
from dinox_train.platform.device import check_device_name
from dinox_train.sections import (
    CheckpointSection,
    DataSection,
    EvaluateSection,
    EventsSection,
    ExecutionSection,
    HealthSection,
    KernelsSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    PlanSection,
    ProfileSection,
    RehearsalSection,
    RunSection,
    ScheduleSection,
    Section,
    StageSection,
    TeacherSection,
    TrainSection,
    ViewsSection,
    WatchSection,
)
from dinox_train.view_batch import NUM_GLOBAL


class Config(Section):
    """A run's whole configuration."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the first weights, the order of windows and the views."""
    device: Annotated[str, AfterValidator(check_device_name)] = "auto"
    """auto, cpu, cuda or cuda:N; AMD GPUs are `cuda` too (ROCm reports itself so)."""
    precision: Literal["fp32", "bf16", "bf16_weights"] = "fp32"
    """bf16: matrix products in bfloat16 under autocast, weights, teacher and losses in fp32. bf16_weights: the same,
    and each weight is rounded once an update instead of in each forward; 2 bytes a parameter more, for each network."""
    deterministic: bool = False
    """Only algorithms that repeat bit for bit, on a GPU too; slower. A CPU always repeats."""
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    views: ViewsSection = ViewsSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    teacher: TeacherSection = TeacherSection()
    train: TrainSection = TrainSection()
    execution: ExecutionSection = ExecutionSection()
    kernels: KernelsSection = KernelsSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    log: LogSection = LogSection()
    watch: WatchSection = WatchSection()
    events: EventsSection = EventsSection()
    health: HealthSection = HealthSection()
    profile: ProfileSection = ProfileSection()
    plan: PlanSection = PlanSection()
    rehearsal: RehearsalSection | None = None
    """Instead of the run, try it in small and end with a verdict; see configs/micro.yaml."""
    stages: tuple[StageSection, ...] = ()
    """Parts of the run, one after the other, in which some keys are others; none: all of it is one."""

    @model_validator(mode="before")
    @classmethod
    def _lengths(cls, tree: Any) -> Any:
        return lengths_in_updates(tree, TrainSection().batch_size)

    @model_validator(mode="after")
    def _sensible(self) -> Config:
        if self.schedule.shape == "constant" and self.optimizer.final_learning_rate is not None:
            raise ValueError("schedule.shape is constant: optimizer.final_learning_rate has no use, set it to null")
        self._check_sizes()
        self._check_images()
        self._check_masks()
        if self.health.rollback is not None and self.checkpoint.keep_last < 2:
            raise ValueError(
                "checkpoint.keep_last is 1: a signal in the midst of the trouble would delete the checkpoint that "
                "health.rollback goes back to; set it to 2 or more"
            )
        if self.parallel.mode == "ddp" and self.precision == "bf16_weights":
            raise ValueError(
                "parallel.mode ddp sums gradients as they arrive, and those of precision bf16_weights arrive in bf16: "
                "set precision to bf16, which computes the same, or parallel.mode to fsdp"
            )
        if any(stage.updates is None for stage in self.stages[:-1]):
            raise ValueError("stages: only the last one may go without `updates`")
        return self

    def _check_images(self) -> None:
        if self.objective.name != "dinov3" or not self.objective.koleo.weight:
            return
        for name, images in (("train.batch_size", self.train.batch_size), ("evaluate.windows", self.evaluate.windows)):
            if images < 2:
                raise ValueError(f"objective.koleo compares images of a batch, and {name} is 1: set its weight to 0")

    def _check_masks(self) -> None:
        """A term that predicts what is masked needs something masked in every update."""
        objective = self.objective
        if objective.name == "mae":
            key, share, fraction = "objective.mae.masked_share", objective.mae.masked_share, 1.0
        elif objective.name == "dinov3" and objective.ibot.weight:
            ibot = objective.ibot
            key, share, fraction = "objective.ibot.masked_share", ibot.masked_share[1], ibot.masked_crops
        else:
            return
        views, crops = self.views.global_size, NUM_GLOBAL * self.train.batch_size
        num_patches = (views // self._patch_size) ** 2
        if not int(crops * fraction):
            raise ValueError(f"objective.ibot.masked_crops masks none of {crops} global views: raise it")
        if not int(num_patches * share):  # that of the view which is masked most (dinox_train/masking.py)
            raise ValueError(
                f"{key} masks no patch: {share:g} of {num_patches}, as a global view of {views} pixels has, is less "
                "than one. Raise it"
            )

    @property
    def _patch_size(self) -> int:
        return self.model.patch_size or PRESETS[self.model.preset].patch_size

    def _check_sizes(self) -> None:
        preset, gram = PRESETS[self.model.preset], self.objective.gram
        patch, depth = self._patch_size, preset.num_layers
        sizes = {"views.global_size": self.views.global_size, "views.local_size": self.views.local_size}
        for name, size in (sizes | {"objective.gram.size": gram.size or patch}).items():
            if size % patch:
                raise ValueError(f"{name} must be a multiple of the patch size {patch}, not {size}")
        wrong = [layer for layer in gram.layers if not -depth <= layer < depth]
        if wrong:
            raise ValueError(f"objective.gram.layers: {self.model.preset} has blocks 0 to {depth - 1}, not {wrong}")


# What a resumed run may change: where things lie, how fast they run, how often something is written. All else is
# mathematics.
FREE_ON_RESUME = (
    *(
        "run.",
        "device",
        "deterministic",
        "data.shards",
        "data.after_removal",
        "data.threads",
        "data.prefetch_mib",
        "data.pool_mib",
        "data.pin",
        "data.max_gbps",
    ),
    *("data.cache_mib", "data.timeout_s"),
    *(
        "train.updates",
        "train.accumulation",
        "execution.",
        "kernels.",
        "parallel.",
        "checkpoint.",
        "evaluate.",
        "log.",
        "watch.",
        "events.",
        "health.",
        "profile.",
        "plan.",
    ),
)
_FREE_IN_STAGES = re.compile(r"stages\.\d+\.(train\.accumulation|execution\..+)")

# What a stage may change: anything that neither shapes a network nor is kept from update to update.
STAGE_KEYS = (
    *("views.", "teacher.", "train.accumulation", "execution.", "optimizer.clip_norm"),
    *("optimizer.learning_rate", "optimizer.base_learning_rate", "optimizer.final_learning_rate"),
    *("optimizer.weight_decay", "optimizer.final_weight_decay"),
    *("objective.student_temperature", "objective.teacher_temperature", "objective.sinkhorn_iterations"),
    *("objective.centre_momentum", "objective.dino.", "objective.koleo.", "objective.gram."),
    *("objective.ibot.weight", "objective.ibot.masked_crops", "objective.ibot.masked_share"),
    *("objective.mae.",),
)

_RATES = ("learning_rate", "base_learning_rate")


def load_config(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> Config:
    """The configuration that `files` (later ones overlay earlier ones) and `overrides` (`a.b=value`) describe.

    Raises ConfigError for an unreadable file, invalid YAML, an unknown or repeated key, a wrong type or value.
    """
    tree: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {}
    for file in files:
        part, lines = read_yaml(Path(file))
        overlay(tree, part)
        places.update({path: f"{file}:{line}" for path, line in lines.items()})
    for override in overrides:
        path, value = parse_override(override)
        put(tree, path, value, override)
        places[path] = f"command line: {override}"
    return validate(tree, places)


def validate(tree: Mapping[str, Any], places: Mapping[tuple[str, ...], str] | None = None) -> Config:
    """`tree` (nested mappings) as a Config. Raises ConfigError that names each key, its place and the nearest name."""
    try:
        config = Config.model_validate(_tuples(tree))
    except ValidationError as error:
        lines = [_explain(item, places or {}) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    stage_configs(config)
    return config


def stage_configs(config: Config) -> tuple[Config, ...]:
    """The configuration of each stage, in order; `config` alone where there are none.

    Raises ConfigError for a stage with an unknown key, a wrong value, or one that a stage cannot change.
    """
    return tuple(_in_stage(config, number) for number in range(len(config.stages))) or (config,)


def _in_stage(config: Config, number: int) -> Config:
    changes = config.stages[number].model_dump(exclude={"updates"})
    keys = [key for key, _ in _flatten(changes)]
    tree = config.model_dump(exclude={"stages"})
    for one, other in (_RATES, _RATES[::-1]):
        if one in changes["optimizer"] and other not in changes["optimizer"]:
            tree["optimizer"][other] = None  # the one stands in the place of the other
    overlay(tree, changes)
    try:
        there = Config.model_validate(_tuples(tree))
    except ValidationError as error:
        lines = [f"in stages.{number}: " + _explain(item, {}) for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None
    fixed = [key for key in keys if not key.startswith(STAGE_KEYS)]
    if fixed:
        raise ConfigError(f"stages.{number}: a stage cannot change {', '.join(fixed)}; it may change {_in_words()}.")
    if there.objective.ibot.weight and not config.objective.ibot.weight:
        raise ConfigError(
            f"stages.{number}: objective.ibot.weight is 0 for the run as a whole, so that there is no iBOT head. Give "
            "the run the weight, and the other stages 0."
        )
    return there


def _in_words() -> str:
    return ", ".join(key + "*" if key.endswith(".") else key for key in STAGE_KEYS)


def difference(before: Config, after: Config) -> list[str]:
    """The keys of the mathematics that differ, one line each: `key: before -> after`. Empty: a resume is allowed."""
    old, new = dict(_flatten(before.model_dump())), dict(_flatten(after.model_dump()))
    return [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_ON_RESUME) and not _FREE_IN_STAGES.fullmatch(key)
    ]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return written(config.model_dump())


def _explain(item: Mapping[str, Any], places: Mapping[tuple[str, ...], str]) -> str:
    location = tuple(str(part) for part in item["loc"])
    key = ".".join(location)
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), "configuration")
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [full for full, _ in _flatten(Config().model_dump()) if full.split(".")[-1] == location[-1]]
        near = elsewhere or [".".join((*location[:-1], one)) for one in near]
        advice = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}."
        return f"{place}: unknown key `{key}`; {advice}"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if item["type"] == "value_error" else f" (given: {item['input']!r})"
    return f"{place}: `{key or 'configuration'}`: {message}{given}"


def _known_keys(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for name in path:
        if name.isdecimal():  # one of a tuple of sections
            section = next((part for part in get_args(section) if hasattr(part, "model_fields")), None)
            continue
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and all(isinstance(item, Mapping) for item in value):
            yield from _flatten({str(number): item for number, item in enumerate(value)}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _tuples(value: Any) -> Any:
    """Lists as tuples: strict validation takes no list for a pair."""
    if isinstance(value, Mapping):
        return {str(name): _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
