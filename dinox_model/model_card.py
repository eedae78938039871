"""The card (README.md) of an exported network: what it is, what it was trained on, how HU become its input, its limits.

Invariant: it says what the network and the given provenance say, and no more; provenance has the keys below and no
others, so that nothing about a patient gets into a card by accident.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dinox_model.config import nearest
from dinox_model.preprocess import AIR_HU

if TYPE_CHECKING:
    from dinox_model.convert.format import Format
    from dinox_model.vit import VisionTransformer

PROVENANCE: Mapping[str, tuple[type, str]] = {
    "licence": (str, "licence of the weights"),
    "started_from": (str, "weights that training started from"),
    "run_config_digest": (str, "sha256 of the run's configuration"),
    "shard_set_digests": (list, "digests of the shard sets"),
    "updates": (int, "updates of the weights"),
    "images": (int, "windows drawn in training"),
    "dinox_version": (str, "version of dinox"),
    "data": (list, "one mapping for each data set, as its shards' manifest has it in `about`"),
}
"""What provenance may hold, each optional: its type, and what it says."""
ABOUT = ("name", "version", "doi", "url", "licence", "citation", "weights_may_be_released", "description", "notes")
"""Keys of a data set."""
FEATURES = """\
The network gives one vector for the image (CLS) and one for each patch, for a classifier, a segmentation head, a
nearest-neighbour search or a detector that is trained on labelled scans of the user's own population.
"""
LIMITS = """\
It is for research. It is no medical device, finds no disease by itself, and nothing here says how well it does on
another hospital's scanners, kernels, doses or patients: measure that before use. Features of images that were windowed,
scaled or padded otherwise than above, or of other modalities than CT, mean nothing.
"""


def model_card(
    model: VisionTransformer,
    provenance: Mapping[str, Any] | None = None,
    target: Format | None = None,
    *,
    use: str | None = None,
) -> str:
    """Markdown with the YAML head that model hubs read.

    `use`: how the exported network is run, Markdown; None: as networks of `target` are (None: ours).

    Raises ValueError for a key of `provenance` that is not in `PROVENANCE` (naming the nearest) or of another type.
    """
    given = dict(provenance or {})
    check_provenance(given)
    sections = [
        _head(given, target),
        "# " + _title(model),
        _architecture(model),
        _input(model),
        _use(target) if use is None else f"## Use\n\n{use}",
        _provenance(given),
        "## Intended use and limits\n\n" + FEATURES + "\n" + LIMITS,
    ]
    return "\n".join(section for section in sections if section)


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that a card does not know, or a value of another type."""
    for key, value in provenance.items():
        if key not in PROVENANCE:
            raise ValueError(f"unknown key {key!r} of a model card's provenance{nearest(key, PROVENANCE)}")
        kind = PROVENANCE[key][0]
        if type(value) is not kind:
            raise ValueError(f"provenance {key!r} must be {kind.__name__}, not {value!r}")
    for digest in provenance.get("shard_set_digests", []):
        if not isinstance(digest, str):
            raise ValueError(f"provenance 'shard_set_digests' must be texts, not {digest!r}")
    for about in provenance.get("data", []):
        if not isinstance(about, Mapping) or not all(isinstance(value, str) for value in about.values()):
            raise ValueError(f"provenance 'data' must be mappings of texts, not {about!r}")
        for key in about:
            if key not in ABOUT:
                raise ValueError(f"unknown key {key!r} of a data set in a model card{nearest(key, ABOUT)}")


def _head(given: Mapping[str, Any], target: Format | None) -> str:
    lines = ["---", "tags: [ct, image-feature-extraction]"]
    if target is not None and target.model_type is not None:
        lines.append("library_name: transformers")
    if "licence" in given:
        lines.append(f"license: {json.dumps(_line(given['licence']))}")
    return "\n".join([*lines, "---", ""])


def _title(model: VisionTransformer) -> str:
    config = model.config
    return f"Vision transformer for CT: width {config.width}, {config.num_layers} blocks, patch {config.patch_size}\n"


def _architecture(model: VisionTransformer) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = [f"| {name} | {_cell(value)} |" for name, value in model.config.to_dict().items()]
    return "\n".join(
        ["## Architecture", "", f"{count:,} parameters, float32.", "", "| option | value |", "| --- | --- |", *rows, ""]
    )


def _input(model: VisionTransformer) -> str:
    config, preprocess = model.config, model.preprocess
    lower = preprocess.level_hu - preprocess.width_hu / 2
    level, width, mean, std = preprocess.level_hu, preprocess.width_hu, preprocess.mean, preprocess.std
    apart = f"{preprocess.step_mm:g} mm" if preprocess.step_mm is not None else f"{preprocess.step} of the volume's"
    steps = "" if preprocess.step is None and preprocess.step_mm is None else f" (in training {apart} apart)"
    return f"""\
## Input

Windows of {config.in_channels} neighbouring CT slices{steps}, as float32 (b, {config.in_channels}, y, x),
y and x multiples of {config.patch_size} pixels (what is added, below and to the right, is air, {AIR_HU} HU).
From int16 Hounsfield units:

    x = (clamp((hu - ({lower:g})) / {width:g}, 0, 1) - {mean:g}) / {std:g}

that is a window of level {level:g} HU and width {width:g} HU. The same numbers, unrounded, are in preprocess.json.
"""


def _use(target: Format | None) -> str:
    if target is None:
        code = (
            "import dinox_model\n\n"
            'model = dinox_model.load("FOLDER")\n'
            "features = dinox_model.encode(model, hu, spacing_mm)"
        )
    elif target.model_type is not None:
        code = (
            "from transformers import AutoModel\n\n"
            'model = AutoModel.from_pretrained("FOLDER").eval()\n'
            "tokens = model(pixel_values=x).last_hidden_state  # (b, CLS + registers + patches, width)"
        )
    else:
        code = (
            "import dinox_model\n\n"
            f'model, report = dinox_model.load_pretrained("FOLDER", format="{target.name}")\n'
            "features = dinox_model.encode(model, hu, spacing_mm)"
        )
    return f"## Use\n\n```python\n{code}\n```\n"


def _provenance(given: Mapping[str, Any]) -> str:
    lines = ["## Provenance", ""]
    for key, (_, meaning) in PROVENANCE.items():
        if key in given and key != "data":
            value = given[key]
            text = ", ".join(map(_line, value)) if isinstance(value, list) else _line(value)
            lines.append(f"- {meaning}: {text}")
    if len(lines) == 2 and not given.get("data"):
        lines.append("Nothing was recorded when this folder was written.")
    for about in given.get("data", []):
        lines += ["", f"### Data: {_line(about.get('name', 'without a name'))}", ""]
        lines += [f"- {key.replace('_', ' ')}: {_line(about[key])}" for key in ABOUT[1:] if key in about]
        if about.get("weights_may_be_released", "yes") != "yes":
            lines += ["", "**These weights may not be passed on before its owner has agreed.**"]
    return "\n".join([*lines, ""])


def _line(value: object) -> str:
    """One line without markup that would end it."""
    return " ".join(str(value).split()).replace("<", "&lt;")


def _cell(value: object) -> str:
    return json.dumps(value).replace("|", "\\|")
