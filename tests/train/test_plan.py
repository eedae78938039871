"""The plan of a run: what torch counts in a real update, the memory that one takes, and a verdict that follows."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinox_model import Preprocess
from dinox_model.storage_meter import StorageMeter
from dinox_train.__main__ import main
from dinox_train.config import Config, validate
from dinox_train.learner import Learner, make_objective, vit_config
from dinox_train.micro_batch import GlobalBatch
from dinox_train.objectives.gram import NEGATIVES, Negatives, gram_flops, gram_loss
from dinox_train.plan import gram_memory_of, plan_stage
from dinox_train.plan_report import costs_in_words, plan_lines
from dinox_train.stages import stages_of

SMALL = {
    "device": "cpu",
    "model": {"preset": "vit_ti", "layer_scale": 0.5},
    "views": {"global_size": 64, "local_size": 32, "num_local": 2},
    "objective": {"prototypes": 64, "head_hidden": 64, "head_bottleneck": 32, "koleo": {"weight": 0.0}},
    "train": {"updates": 10, "batch_size": 4},
}
GRAM = {"weight": 1.0, "size": 128, "views": 1, "layers": (0, -1), "max_patches": 9}
pytestmark = pytest.mark.usefixtures("tiny_preset")


def config_of(**objective: object) -> Config:
    return validate(SMALL | {"objective": SMALL["objective"] | objective})


def update_of(config: Config) -> tuple[Learner, Callable[[], object]]:
    """A learner, and its first update on made-up windows."""
    learner = Learner(config, Preprocess(), torch.device("cpu"))
    size, pieces = config.train.batch_size, config.train.accumulation
    images = torch.randint(-1000, 400, (size, 3, 64, 64), dtype=torch.int16)
    batch = GlobalBatch(learner.recipe(size), 0, gram=learner.wants_gram_views(1))
    labels = np.arange(size) % 2
    made = [
        batch.micro_batch(images[rows], rows, np.full((len(rows), 2), 64), np.ones((len(rows), 3)), labels[rows])[0]
        for rows in np.split(np.arange(size), pieces)
    ]
    return learner, lambda: learner.step(made, 1)


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"gram": GRAM},
        {"ibot": {"head": "shared"}, "gram": GRAM | {"negatives": "clamp_both", "tokens": "masked"}},
        {"ibot": {"weight": 0.0}},
        {"name": "mae"},
        {"name": "classification"},
    ],
    ids=["dinov3", "Gram", "shared head", "no iBOT", "mae", "classification"],
)
def test_operations_are_what_torch_counts(objective: dict[str, object]) -> None:
    config = config_of(**objective)
    learner, update = update_of(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        update()
    expected = counter.get_total_flops()
    if config.objective.name == "dinov3":
        expected -= 2 * 8 * 8 * learner.vit.width  # the figures': all CLS features by all
    (stage,) = stages_of(learner.run_config)
    assert plan_stage(learner.run_config, stage).flops.total == expected


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(("num_patches", "width"), [(6, 8), (40, 8)])
def test_the_gram_loss_costs_what_torch_counts(negatives: Negatives, num_patches: int, width: int) -> None:
    student, teacher = torch.randn(3, num_patches, width, requires_grad=True), torch.randn(3, num_patches, width)
    with FlopCounterMode(display=False) as counter:
        gram_loss(student, teacher, negatives=negatives).backward()
    assert counter.get_total_flops() == 3 * gram_flops(num_patches, width, negatives)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("more", [{}, {"gram": GRAM}], ids=["dinov3", "Gram"])
def test_memory_is_near_what_an_update_takes(accumulation: int, more: dict[str, object]) -> None:
    tree = SMALL | {"objective": SMALL["objective"] | more, "train": {"batch_size": 8, "accumulation": accumulation}}
    gc.collect()
    with StorageMeter() as meter:
        learner, update = update_of(validate(tree))
        update()  # the optimizer's moments are there from now on
        meter.forget_peak()
        update()
    (stage,) = stages_of(learner.run_config)
    plan = plan_stage(learner.run_config, stage)
    assert 0.9 * meter.peak < plan.peak - plan.memory["windows, int16"] < 1.2 * meter.peak  # windows are gone by then


STAGED = {
    "stages": (
        {"updates": 4, "objective": {"gram": {"weight": 0.0}}},
        {"views": {"global_size": 128}, "execution": {"activation_checkpointing": "block"}},
    )
}


def test_stages_add_up_and_gram_counts_from_its_start() -> None:
    config = validate(
        SMALL
        | {"objective": SMALL["objective"] | {"ibot": {"prototypes": 64}, "gram": {"weight": 1.0, "start": 7}}}
        | STAGED
    )
    first, second = (plan_stage(config, stage) for stage in stages_of(config))
    assert (first.updates, first.gram_updates, first.gram_flops) == (4, 0, 0)
    assert (second.updates, second.gram_updates) == (6, 3)
    assert first.total_flops == 4 * first.flops.total
    assert second.total_flops == 6 * second.flops.total - 3 * second.gram_flops
    assert second.flops.of(step="recomputation") > 0
    assert "Gram teacher" in second.memory
    assert "Gram teacher" not in first.memory
    lines = "\n".join(plan_lines(config))
    assert "stage 2, 6 updates from update 5" in lines
    assert "gram loss" in lines
    memory = gram_memory_of(
        stages_of(config)[1].config, vit_config(config), make_objective(stages_of(config)[1].config)
    )
    assert {name: second.memory[name] for name in memory} == memory
    size = sum(memory.values())
    assert (
        f"Gram anchoring: {second.gram_flops / second.flops.total:.1%} of the operations, and {size / 2**20:,.1f} MiB, "
        f"{size / second.peak:.1%} of the peak, in 3 of 6 updates"
    ) in lines
    assert lines.count("Gram anchoring") == 1, "the first stage has none"


def verdict(memory_gib: float, **more: object) -> str:
    tree = SMALL | {"device": "cuda", "execution": {"memory_gib": memory_gib}} | more
    return plan_lines(validate(tree))[-1]


def test_the_verdict_says_whether_it_fits_and_what_to_change() -> None:
    assert verdict(4.0).startswith("verdict: fits: ")
    large = {"train": {"batch_size": 64}, "views": {"global_size": 224}}
    refused = verdict(1.4, **large)
    assert refused.startswith("verdict: does not fit: ")
    number = int(refused.partition("train.accumulation=")[2].partition(":")[0].split()[0])
    assert 64 % number == 0
    assert verdict(1.4, **large | {"train": {"batch_size": 64, "accumulation": number}}).startswith("verdict: fits")
    less = {"train": {"batch_size": 64, "accumulation": number // 2}}
    assert verdict(1.4, **large | less).startswith("verdict: does not")
    assert "smaller model.preset" in verdict(0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_here_and_not_described_leaves_it_open() -> None:
    last = plan_lines(validate(SMALL | {"device": "cuda"}))[-1]
    assert last.startswith("verdict: not known: ")
    assert "execution.memory_gib" in last


def test_the_command_needs_no_shards_and_writes_nothing(
    tmp_path: Path, small_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["--config", str(small_config), "data.shards=nowhere", f"run.folder={run}", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("verdict: fits: ")
    assert any("9 updates of 4 images, 36 images" in line for line in lines)
    assert not run.exists()
    assert main(["--config", str(small_config), "model.preset=vit_x", "--plan"]) == 2


def test_a_run_says_what_gram_anchoring_and_distant_neighbours_cost() -> None:
    learner, _ = update_of(config_of(gram=GRAM))
    assert [line.split(",")[0] for line in costs_in_words(learner)] == [
        "networks: compile off",
        "Gram anchoring",
    ]
    memory = sum(gram_memory_of(learner.config, learner.vit, learner.objective).values())
    assert f"and {memory / 2**20:,.1f} MiB" in costs_in_words(learner)[-1]
    config = validate(SMALL | {"objective": {"prototypes": 64}, "train": {"batch_size": 4, "accumulation": 2}})
    (_, told) = costs_in_words(Learner(config, Preprocess(), torch.device("cpu")))
    assert told.startswith("KoLeo compares 4 images and a micro-batch has 2")
