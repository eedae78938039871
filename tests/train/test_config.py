"""Config: one truth, strict, with errors that say what, where and what to do."""

from pathlib import Path

import pytest

from dinox_train.config import Config, ConfigError, difference, load_config, to_yaml, validate
from dinox_train.views import ViewSettings


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_every_shipped_file_loads_and_survives_a_round_trip(repository: Path, tmp_path: Path) -> None:
    files = [file for file in sorted((repository / "configs").rglob("*.yaml")) if file.parent.name != "about"]
    names = {str(file.relative_to(repository / "configs").with_suffix("")) for file in files}
    overlays = {"hardware/strix_halo", "hardware/rtx_4090", "hardware/h200"}
    assert names == {"demo", "vit_s", "vit_b", "vit_l", "vit_g"} | overlays
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
    assert len(sections) == 13
    silent = [
        f"{section.__name__}.{name}"
        for section in (Config, *sections)
        for name, field in section.model_fields.items()
        if not field.description and not hasattr(field.annotation, "model_fields")
    ]
    assert silent == []


def test_the_views_section_has_the_defaults_of_the_views() -> None:
    assert ViewSettings(**Config().views.model_dump()) == ViewSettings()


def test_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finite"):
        load_config([], ["views.level_hu=[.nan, 0]"])


def test_micro_batches_of_shipped_configurations_are_moderate(repository: Path) -> None:
    largest = {"vit_s": 64, "vit_b": 32, "vit_l": 16, "vit_g": 8}
    for name, images in largest.items():
        for overlay in ("strix_halo", "rtx_4090", "h200"):
            config = load_config([repository / f"configs/{name}.yaml", repository / f"configs/hardware/{overlay}.yaml"])
            assert config.train.batch_size // config.train.accumulation <= images
