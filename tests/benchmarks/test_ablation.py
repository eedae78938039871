"""The ablation's command: a run for each variant, and a table of what it found."""

from dataclasses import replace
from pathlib import Path

import result
from ablation import COLUMNS, VARIANTS, as_table, figures_of, main

from dinox_model import PRESETS
from dinox_train.config import load_config
from dinox_train.metrics import read_lines

TINY = ("views.global_size=32", "views.local_size=16", "views.num_local=1", "train.batch_size=2", "evaluate.windows=4")


def test_every_variant_runs_and_stands_in_the_table(tmp_path: Path, monkeypatch) -> None:
    tiny = replace(PRESETS["vit_ti"], num_layers=2, width=64, num_heads=2, mlp_hidden=128)
    monkeypatch.setitem(PRESETS, "vit_ti", tiny)
    monkeypatch.setattr("ablation.VARIANTS", {name: VARIANTS[name] for name in ("all", "DINO alone")})
    assert main(["--output", str(tmp_path), "--updates", "2", *TINY]) == 0
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["run", "---", "all", "DINO alone"]
    last = read_lines(tmp_path / "all/metrics.jsonl")[-1]
    assert f"{last['loss_koleo']:.3f}" in table[2]
    assert table[3].count(" - ") == 3
    assert all(f" {column} " in table[0] for column in COLUMNS)
    figures = {one.name: one.value for one in result.read(tmp_path / "ablation.json").figures}
    assert figures["all: loss_koleo"] == last["loss_koleo"]
    assert "DINO alone: loss_koleo" not in figures


def test_each_variant_is_another_configuration() -> None:
    made = [
        load_config(["configs/demo.yaml"], [one.format(half=5) for one in differs]).objective
        for differs in VARIANTS.values()
    ]
    assert len({str(one) for one in made}) == len(VARIANTS)


def test_figures_are_means_of_the_last_tenth() -> None:
    lines = [{"loss_dino": float(number), "knn_z": 0.5 if number == 20 else None} for number in range(1, 21)]
    row = figures_of(lines)
    assert row["loss_dino"] == 19.5
    assert row["knn_z"] == 0.5
    assert row["loss_gram"] is None


def test_a_term_that_is_off_is_a_dash() -> None:
    assert as_table({"one": figures_of([{"loss_dino": 1.5}])}).splitlines()[2].startswith("| one | 1.500 | - |")
