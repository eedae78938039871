"""The key `kernels`: read when a run begins, refused in words, said in log and env.json, and free on resume."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dinox_model.execution import use
from dinox_model.kernels.dispatch import Kernels
from dinox_model.linear import Routes
from dinox_train.config import Config, ConfigError, difference, load_config, to_yaml, validate
from dinox_train.kernel_choice import RunKernels, attention_shapes, choose_run_kernels
from dinox_train.learner import Learner, vit_config
from dinox_train.sections import KernelsSection
from dinox_train.stages import stages_of

CPU = torch.device("cpu")
SMALL = {
    "device": "cpu",
    "views": {"global_size": 32, "local_size": 16, "num_local": 2},
    "model": {"preset": "vit_ti"},
    "objective": {"prototypes": 64, "head_hidden": 64, "head_bottleneck": 32},
    "train": {"batch_size": 4},
}
pytestmark = pytest.mark.usefixtures("tiny_preset")


def small(**keys: object) -> Config:
    return validate(SMALL | keys)


def chosen(config: Config) -> RunKernels:
    return choose_run_kernels(config, vit_config(config), stages_of(config), CPU)


def test_a_word_is_for_all_and_a_mapping_for_some(tmp_path: Path) -> None:
    reference = small(kernels="reference").kernels
    assert set(reference.model_dump().values()) == {"reference", "host"}
    assert set(small(kernels="auto").kernels.model_dump().values()) == {"auto"}
    some = small(kernels={"attention": "math"})
    assert (some.kernels.attention, some.kernels.rotate) == ("math", "auto")
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(some))
    assert load_config([file]) == some
    assert load_config([file], ["kernels=reference"]).kernels == reference
    assert load_config([file], ["kernels.attention=sdpa-flash"]).kernels.attention == "sdpa-flash"


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ("refrence", "did you mean 'reference'"),
        ({"attention": "sdpa-flsh"}, "did you mean 'sdpa-flash'"),
        ({"atention": "auto"}, "did you mean `kernels.attention`"),
        ({"unfilter": "hots"}, "did you mean 'host'"),
        ({"attention": 3}, "kernels.attention"),
    ],
)
def test_what_is_none_is_refused_with_the_nearest(kernels: object, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        small(kernels=kernels)
    assert words in str(refused.value)


def test_kernels_are_no_mathematics() -> None:
    assert difference(small(kernels="reference"), small(kernels={"attention": "math"}, device="cpu")) == []


def test_on_a_cpu_auto_is_torchs_operators() -> None:
    found = chosen(small())
    assert (found.network.attention, found.network.rotate) == ("reference", "reference")
    assert not found.fused_losses
    assert not found.fused_optimizer
    assert found.crop is None
    assert found.unfilter is None
    names = {choice.kernel for choice in found.choices}
    assert names == set(KernelsSection.model_fields) - {"linear"}  # which platform/start.py says
    json.dumps(found.record())


def test_attention_is_chosen_for_each_length_that_the_networks_see() -> None:
    config = small(objective=SMALL["objective"] | {"gram": {"weight": 1.0, "size": 64}}, train={"batch_size": 8})
    shapes = attention_shapes(vit_config(config), stages_of(config), torch.float32)
    assert [(shape.tokens, shape.images) for shape in shapes] == [(9, 16), (6, 16), (21, 16)]


def test_a_form_that_cannot_run_here_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"kernels\.attention=sdpa-cudnn"):
        chosen(small(kernels={"attention": "sdpa-cudnn"}))


def test_a_learner_hands_kernels_and_routes_to_all_its_networks() -> None:
    from dinox_model import Preprocess

    config = small(objective=SMALL["objective"] | {"gram": {"weight": 1.0}})
    kernels = RunKernels(network=Kernels(attention="math"), fused_losses=True)
    learner = Learner(config, Preprocess(), CPU, kernels, Routes(grad_weight="cublas"))
    learner.networks.take_gram_teacher()
    gram = learner.networks.gram
    assert gram is not None
    for network in (learner.student.backbone, learner.teacher.backbone, gram):
        assert {block.attention.kernels for block in network.blocks} == {kernels.network}  # type: ignore[union-attr]
        assert "forward" in vars(network.blocks[0].mlp.up)  # type: ignore[union-attr]
    assert use(learner.student, Kernels()) == 4
    assert learner.objective._comparison.fused  # type: ignore[attr-defined]


def test_the_update_in_one_pass_is_tried_against_the_plain_one() -> None:
    from dinox_train.optimizer_trial import SMALL_WIDTH, UpdateTrial

    trial = UpdateTrial(small().optimizer, "bf16_weights", CPU)
    width = torch.tensor(SMALL_WIDTH)
    student, teacher = trial.form("reference")(width)
    again, _ = trial.form("reference")(width)
    assert torch.equal(student, again)
    assert not torch.equal(student, teacher)


def test_a_run_says_its_machine_and_kernels_and_may_change_them(tmp_path: Path, train: Callable[..., int]) -> None:
    short = ("train.updates=1", "evaluate.every=99", "evaluate.windows=4", "schedule.updates=2")
    assert train(tmp_path, *short) == 0
    assert train(tmp_path, *short, "train.updates=2", "kernels.attention=math", "kernels.unfilter=reference") == 0
    log = (tmp_path / "train.log").read_text()
    assert "kernels: attention 9 tokens: reference (auto: on a CPU nothing is faster; torch takes sdpa-flash)" in log
    assert "kernels: attention 9 tokens: math (as asked; right" in log
    assert "the device undoes the filter" in log
    assert "routing of products: off" in log
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["platform"]["facts"]["kind"] == "cpu"
    assert {"kernel", "about", "backend", "reason"} == set(env["kernels"][0])
    assert train(tmp_path / "other", *short, "kernels.attention=sdpa-cudnn") == 2
