"""Config: one truth, strict, with errors that say what, where and what to do."""

import dataclasses
from pathlib import Path

import pytest

from dinox_train.config import Config, ConfigError, difference, load_config, to_yaml, validate
from dinox_train.objectives.classification import ClassificationSettings
from dinox_train.objectives.dinov3 import DINOv3Settings
from dinox_train.objectives.masked_autoencoder import MAESettings
from dinox_train.prototype_counts import with_prototypes
from dinox_train.sections import ObjectiveSection, RehearsalSection, Section, StageSection
from dinox_train.stages import stage_of, stages_of
from dinox_train.views import ViewSettings

MACHINES = ("strix_halo", "rtx_4090", "rx_7900_xtx", "mi300x", "h100", "h200")


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_every_shipped_file_loads_and_survives_a_round_trip(repository: Path, tmp_path: Path) -> None:
    files = [file for file in sorted((repository / "configs").rglob("*.yaml")) if file.parent.name != "about"]
    names = {str(file.relative_to(repository / "configs").with_suffix("")) for file in files}
    overlays = {*(f"hardware/{name}" for name in MACHINES), "micro", "warm_start"}
    start = {"warm_start"}
    assert names == {"demo", "vit_s", "vit_b", "vit_l", "vit_g"} | overlays | start
    for file in files:
        config = load_config([file])
        assert load_config([write(tmp_path, to_yaml(config))]) == config
        for overlay in overlays if "hardware" not in str(file) else ():
            load_config([file, repository / "configs" / f"{overlay}.yaml"])


def test_overlays_and_overrides_in_order(tmp_path: Path) -> None:
    base = write(tmp_path, "train: {updates: 10, batch_size: 8}\nseed: 1\n", "base.yaml")
    overlay = write(tmp_path, "train: {batch_size: 16}\n", "overlay.yaml")
    config = load_config([base, overlay], ["seed=7", "optimizer.learning_rate=3e-4", "views.global_scale=[0.5, 1]"])
    assert (config.train.updates, config.train.batch_size, config.seed) == (10, 16, 7)
    assert config.optimizer.learning_rate == 3e-4
    assert config.views.global_scale == (0.5, 1.0)


def test_scientific_notation_in_a_file_is_a_number(tmp_path: Path) -> None:
    assert load_config([write(tmp_path, "optimizer:\n  learning_rate: 3e-4\n")]).optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train:\n  batchsize: 8\n", ["config.yaml:2", "train.batchsize", "did you mean `train.batch_size`"]),
        ("batch_size: 8\n", ["config.yaml:1", "did you mean `train.batch_size`"]),
        ("train:\n  updates: many\n", ["config.yaml:2", "train.updates", "'many'"]),
        ("train:\n  updates: '5'\n", ["train.updates", "valid integer"]),
        ("train:\n  updates: 1.5\n", ["train.updates"]),
        ("train:\n  updates: true\n", ["train.updates"]),
        ("seed: 1\nseed: 2\n", ["config.yaml:2", "stands already in line 1"]),
        ("precision: fp16\n", ["precision", "'fp32'"]),
        ("train: {batch_size: 10, accumulation: 4}\n", ["must divide"]),
        ("views: {global_size: 100}\n", ["multiple of the patch size"]),
        ("data: {depth: 4}\n", ["odd"]),
        ("run: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
        ("train: [1, 2\n", ["not valid YAML"]),
        ("- a\n- b\n", ["must hold keys"]),
    ],
)
def test_a_mistake_names_its_place_and_the_way_on(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, text)])
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_file_and_a_malformed_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config([tmp_path / "none.yaml"])
    with pytest.raises(ConfigError, match=r"a\.b=value"):
        load_config([], ["train.updates"])
    with pytest.raises(ConfigError, match=r"command line: train\.update=5"):
        load_config([], ["train.update=5"])


def test_difference_lists_mathematics_only() -> None:
    before = Config()
    after = validate(
        {
            "seed": 5,
            "device": "cpu",
            "run": {"folder": "elsewhere"},
            "train": {"updates": 7, "accumulation": 4},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    lines = difference(before, after)
    assert [line.split(":")[0] for line in lines] == ["optimizer.learning_rate", "seed"]
    assert difference(before, validate({"precision": "bf16"})) == ["precision: 'fp32' -> 'bf16'"]


def test_every_key_says_what_it_means() -> None:
    sections = [field.annotation for field in Config.model_fields.values() if hasattr(field.annotation, "model_fields")]
    sections += [StageSection, RehearsalSection, *_within(ObjectiveSection)]
    assert len(sections) == 28
    silent = [
        f"{section.__name__}.{name}"
        for section in (Config, *sections)
        for name, field in section.model_fields.items()
        if not field.description and not hasattr(field.annotation, "model_fields")
    ]
    assert silent == []


def _within(section: type[Section]) -> list[type[Section]]:
    found = [field.annotation for field in section.model_fields.values()]
    return [one for one in found if isinstance(one, type) and issubclass(one, Section)]


def test_the_objective_section_has_the_defaults_of_the_objectives() -> None:
    section = Config().objective.model_copy(update={"prototypes": DINOv3Settings().prototypes})
    given = section.model_dump()
    for name in ("dino", "ibot", "koleo", "gram"):
        assert given[name] == dataclasses.asdict(getattr(DINOv3Settings(), name))
    flat = {key: value for key, value in dataclasses.asdict(DINOv3Settings()).items() if not isinstance(value, dict)}
    assert {key: given[key] for key in flat} == flat
    assert given["mae"] == dataclasses.asdict(MAESettings())
    assert given["classification"] == dataclasses.asdict(ClassificationSettings())


STAGES = """
views: {global_size: 64}
objective: {gram: {weight: 2.0, start: 5}}
stages:
  - {updates: 10, objective: {gram: {weight: 0.0}}}
  - {updates: 5, objective: {dino: {local_weight: 0.5}}}
  - {views: {global_size: 96, local_size: 32}, optimizer: {learning_rate: 1.0e-5}, train: {accumulation: 4}}
train: {updates: 40, batch_size: 8}
"""


def test_stages_overlay_the_run_and_follow_one_another(tmp_path: Path) -> None:
    config = load_config([write(tmp_path, STAGES)])
    stages = stages_of(config)
    assert [(stage.number, stage.first, stage.last) for stage in stages] == [(1, 1, 10), (2, 11, 15), (3, 16, None)]
    assert [stage_of(stages, update).number for update in (1, 10, 11, 15, 16, 1000)] == [1, 1, 2, 2, 3, 3]
    assert [stage.config.objective.gram.weight for stage in stages] == [0.0, 2.0, 2.0]
    assert [stage.config.objective.dino.local_weight for stage in stages] == [1.0, 0.5, 1.0]
    assert [stage.config.views.global_size for stage in stages] == [64, 64, 96]
    assert stages[2].config.train.accumulation == 4
    assert stages[2].config.views.num_local == config.views.num_local
    assert sum(stage.updates_until(12) for stage in stages) == 12
    assert [stage.updates_until(17) for stage in stages] == [10, 5, 2]
    assert load_config([write(tmp_path, to_yaml(config))]) == config
    (alone,) = stages_of(Config())
    assert (alone.first, alone.last, alone.config) == (1, None, Config())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stages: [{updates: 3, views: {global_sise: 64}}, {}]", ["stages.0", "views.global_size"]),
        ("stages: [{updates: 3}, {views: {global_size: 100}}]", ["stages.1", "multiple of"]),
        ("stages: [{}, {updates: 3}]", ["only the last one"]),
        ("stages: [{objective: {prototypes: 64}}]", ["stages.0", "cannot change objective.prototypes"]),
        ("stages: [{optimizer: {layer_decay: 0.5}}]", ["stages.0", "optimizer.layer_decay"]),
        ("stages: [{train: {batch_size: 128}}]", ["stages.0", "train.batch_size"]),
        ("stages: [{update: 3}]", ["stages.0.update", "did you mean `stages.0.updates`"]),
        ("objective: {ibot: {weight: 0.0}}\nstages: [{objective: {ibot: {weight: 1.0}}}]", ["no iBOT head"]),
        ("objective: {ibot: {weight: 0.0}, dino: {weight: 0.0}}", ["nothing is left to learn"]),
        ("objective: {ibot: {head: shared, prototypes: 8}}", ["separate head"]),
        ("objective: {gram: {layers: [12]}}", ["blocks 0 to 11"]),
        ("objective: {gram: {size: 100}}", ["objective.gram.size"]),
        ("train: {batch_size: 1}", ["objective.koleo"]),
        ("objective: {name: dino}", ["objective.name"]),
        ("model: {patch_size: 14}\nviews: {local_size: 96}", ["views.local_size", "patch size 14"]),
    ],
)
def test_a_stage_or_an_objective_that_cannot_be_is_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, text)])
    for part in parts:
        assert part in str(caught.value)


def test_accumulation_may_change_in_a_stage_too(tmp_path: Path) -> None:
    before = load_config([write(tmp_path, STAGES)])
    after = load_config([write(tmp_path, STAGES.replace("accumulation: 4", "accumulation: 8"))])
    assert difference(before, after) == []
    other = load_config([write(tmp_path, STAGES.replace("local_weight: 0.5", "local_weight: 0.7"))])
    assert difference(before, other) == ["stages.1.objective.dino.local_weight: 0.5 -> 0.7"]


def test_prototypes_follow_the_batch_where_nobody_says(tmp_path: Path) -> None:
    small, large = (with_prototypes(validate({"train": {"batch_size": size}})).objective for size in (16, 512))
    assert (small.prototypes, small.ibot.prototypes) == (128, 512)
    assert (large.prototypes, large.ibot.prototypes) == (8192, 16384)
    given = with_prototypes(validate({"objective": {"prototypes": 64}})).objective
    assert (given.prototypes, given.ibot.prototypes) == (64, 64)
    kept = with_prototypes(Config(), validate({"objective": {"prototypes": 77}})).objective
    assert kept.prototypes == 77


def test_the_views_section_has_the_defaults_of_the_views() -> None:
    assert ViewSettings(**Config().views.model_dump()) == ViewSettings()


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finite"):
        load_config([], ["views.level_hu=[.nan, 0]"])


def test_micro_batches_of_shipped_configurations_are_moderate(repository: Path) -> None:
    largest = {"vit_s": 64, "vit_b": 32, "vit_l": 16, "vit_g": 8}
    for name, images in largest.items():
        for overlay in MACHINES:
            config = load_config([repository / f"configs/{name}.yaml", repository / f"configs/hardware/{overlay}.yaml"])
            assert config.train.batch_size // config.train.accumulation <= images


def test_a_stage_may_give_either_form_of_the_learning_rate(tmp_path: Path) -> None:
    base = "optimizer: {base_learning_rate: 1.0e-4}"
    for run, stage, expected in (
        ("", base, (None, 1e-4)),
        (base, "optimizer: {learning_rate: 3.0e-5}", (3e-5, None)),
        (base, "optimizer: {base_learning_rate: 2.0e-4}", (None, 2e-4)),
    ):
        config = load_config([write(tmp_path, f"{run}\nstages: [{{updates: 3}}, {{{stage}}}]")])
        there = stages_of(config)[1].config.optimizer
        assert (there.learning_rate, there.base_learning_rate) == expected


STAGED = "stages:\n  - {updates: 3}\n  - {views: {num_local: 2}}\n"


def test_the_command_line_reaches_into_stages_and_lists_of_sets(tmp_path: Path) -> None:
    file = write(tmp_path, STAGED + "data: {shards: [{path: a}, {path: b}]}\n")
    config = load_config([file], ["stages.0.updates=5", "stages.1.views.num_local=4", "data.shards.1.weight=2.0"])
    assert [stage.updates for stage in config.stages] == [5, None]
    assert config.stages[1].views == {"num_local": 4}
    assert [one.weight for one in config.data.shards] == [None, 2.0]  # type: ignore[union-attr] # a list here


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.2.updates=5", ["`stages` has items 0 to 1", "`2` is none of them"]),
        ("stages.first.updates=5", ["`stages` has items 0 to 1", "`first`"]),
        ("stages.0.update=5", ["command line: stages.0.update=5", "did you mean `stages.0.updates`"]),
        ("stages.0.updates=many", ["stages.0.updates", "'many'"]),
        ("stages.1.views.num_locals=5", ["stages.1", "views.num_locals", "did you mean"]),
        ("stages.0.seed=5", ["stages.0", "seed"]),
        ("seed.0.x=5", ["no file gives a list `seed`"]),
    ],
)
def test_errors_within_stages_name_the_place(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config([write(tmp_path, STAGED)], [override])
    assert [part for part in parts if part not in str(refused.value)] == [], refused.value


def test_a_stage_that_no_file_has_is_told_how_to_give_one() -> None:
    with pytest.raises(
        ConfigError, match=r"no file gives a list `stages` that has an item 0.*'stages=\[\{KEY: value\}\]'"
    ):
        load_config([], ["stages.0.updates=5"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"evaluate": {"windows": 1}}, r"koleo compares images of a batch, and evaluate\.windows is 1"),
        ({"train": {"batch_size": 1}}, r"koleo compares images of a batch, and train\.batch_size is 1"),
        (
            {"objective": {"name": "mae", "mae": {"masked_share": 1e-3}}},
            r"mae\.masked_share masks no patch: 0\.001 of 196",
        ),
        ({"objective": {"ibot": {"masked_share": [0, 1e-3]}}}, r"ibot\.masked_share masks no patch"),
        ({"objective": {"ibot": {"masked_crops": 1e-3}}}, r"ibot\.masked_crops masks none of 128"),
        ({"views": {"global_size": 32, "local_size": 16}, "objective": {"ibot": {"masked_share": [0.1, 0.2]}}}, "of 4"),
        ({"views": {"global_size": 160 * 10**18}}, r"views\.global_size.*16384"),
        ({"objective": {"prototypes": 10**20}}, r"objective\.prototypes.*16777216"),
        ({"train": {"batch_size": 10**20}}, r"train\.batch_size.*2147483648"),
    ],
)
def test_what_could_never_run_is_refused_before_it_begins(tree: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tree)


def test_one_window_of_evaluation_is_enough_without_koleo() -> None:
    assert validate({"evaluate": {"windows": 1}, "objective": {"koleo": {"weight": 0.0}}}).evaluate.windows == 1
    assert validate({"evaluate": {"windows": 1}, "objective": {"name": "mae"}}).evaluate.windows == 1


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_off_is_a_word_not_a_truth(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"execution: {{compile: {text}}}\ndata: {{pin: {text}}}\ndeterministic: true\n")
    for config in (load_config([file]), load_config([file], [f"data.pin={text}", f"execution.compile={text}"])):
        assert (config.execution.compile, config.data.pin, config.deterministic) == ("off", "off", True)
    with pytest.raises(ConfigError, match="deterministic"):
        load_config([file], ["deterministic=yes"])
