"""The card says what the network and the given provenance say, and takes nothing else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import dinox_model
from dinox_model import Preprocess
from dinox_model.convert.source import FORMATS
from dinox_model.model_card import ABOUT, model_card
from tests.model.foreign_weights import SMALL, perturbed

PROVENANCE = {
    "licence": "Apache-2.0",
    "started_from": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "run_config_digest": "ab" * 32,
    "shard_set_digests": ["cd" * 32, "ef" * 32],
    "updates": 1000,
    "images": 64000,
    "dinox_version": "0.1.0",
    "data": [
        {"name": "LIDC-IDRI", "licence": "CC-BY-3.0", "citation": "Armato\net al.", "weights_may_be_released": "yes"},
        {"name": "Our hospital", "licence": "none", "weights_may_be_released": "ask"},
    ],
}


def test_it_says_what_is_known() -> None:
    model = perturbed(SMALL)
    model.preprocess = Preprocess(level_hu=-500.0, width_hu=1500.0, mean=0.4, std=0.2)
    card = model_card(model, PROVENANCE, FORMATS["hf_dinov3"])
    count = sum(parameter.numel() for parameter in model.parameters())
    for text in (
        'license: "Apache-2.0"',
        "library_name: transformers",
        f"{count:,} parameters",
        "| width | 32 |",
        "x = (clamp((hu - (-1250)) / 1500, 0, 1) - 0.4) / 0.2",
        "Windows of 3 neighbouring CT slices",
        "AutoModel.from_pretrained",
        "sha256 of the run's configuration: " + "ab" * 32,
        "cd" * 32 + ", " + "ef" * 32,
        "windows drawn in training: 64000",
        "### Data: LIDC-IDRI",
        "- citation: Armato et al.",
        "It is no medical device",
    ):
        assert text in card, text
    assert card.count("may not be passed on before its owner has agreed") == 1


def test_what_was_not_given_is_not_there() -> None:
    card = model_card(perturbed(SMALL))
    assert "Nothing was recorded" in card
    assert "license" not in card
    assert "transformers" not in card
    assert "dinox_model.load(" in card
    assert 'format="meta_dinov3"' in model_card(perturbed(SMALL), None, FORMATS["meta_dinov3"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patient": "Doe^John"}, "unknown key 'patient'"),
        ({"license": "MIT"}, "unknown key 'license'.*did you mean 'licence'"),
        ({"updates": "many"}, "'updates' must be int"),
        ({"data": [{"name": "A", "patients": "x"}]}, "unknown key 'patients' of a data set"),
        ({"data": [{"name": 3}]}, "'data' must be mappings of texts"),
        ({"data": ["A"]}, "'data' must be mappings of texts"),
        ({"shard_set_digests": [1]}, "'shard_set_digests' must be texts"),
    ],
)
def test_what_it_does_not_know_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_card(perturbed(SMALL), PROVENANCE | changes)


def test_a_value_cannot_end_its_line_or_the_head() -> None:
    card = model_card(perturbed(SMALL), {"licence": 'x"\n---\nevil: true', "started_from": "a\n# heading<script>"})
    head = card.split("---\n")[1]
    assert 'license: "x\\" --- evil: true"' in head
    assert "\n# heading" not in card
    assert "<script" not in card


def test_an_export_that_the_card_refuses_writes_nothing(tmp_path: Path) -> None:
    for format in ("hf", "meta", "dinox"):
        with pytest.raises(ValueError, match="unknown key 'patient'"):
            dinox_model.save_pretrained(perturbed(SMALL), tmp_path / "out", format=format, provenance={"patient": "x"})
    assert not list(tmp_path.iterdir())


def test_data_sets_have_the_keys_that_manifests_have() -> None:
    about = pytest.importorskip("dinox_io.about")
    assert set(ABOUT) == set(about.KEYS)


def test_every_option_of_the_network_stands_in_it() -> None:
    config = dataclasses.replace(SMALL, in_channels=5)
    card = model_card(perturbed(config))
    for name, value in config.to_dict().items():
        assert f"| {name} | {json.dumps(value)} |" in card


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"step": 2}, "slices (in training 2 of the volume's apart)"),
        ({"step_mm": 2.5}, "slices (in training 2.5 mm apart)"),
    ],
)
def test_it_says_how_far_apart_slices_were(facts: dict[str, Any], words: str) -> None:
    model = perturbed(SMALL)
    model.preprocess = Preprocess(**facts)
    assert f"Windows of 3 neighbouring CT {words}, as float32" in model_card(model, None)
