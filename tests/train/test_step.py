"""The step: exact under accumulation with every term on, masked as a whole, and able to learn."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dinox_train.network import Networks
from dinox_train.objectives.classification import Classification, ClassificationSettings
from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings, GramSettings, IBOTSettings, KoLeoSettings
from dinox_train.objectives.masked_autoencoder import MAESettings, MaskedAutoencoder
from dinox_train.objectives.objective import Objective
from dinox_train.view_batch import ViewBatch
from tests.train.small_step import SETTINGS, TINY, batch_of, gradient, networks, optimizer_of, step

ALL_ON = DINOv3Settings(
    prototypes=32,
    head_hidden=64,
    head_bottleneck=16,
    teacher_temperature=0.05,
    koleo=KoLeoSettings(weight=0.5, group=None),
    gram=GramSettings(weight=2.0, layers=(0, -1)),
)
RANDOM = replace(TINY, drop_path=0.3, rope_shift=0.2, rope_jitter=1.2, rope_rescale=1.5)


def prepared(objective: Objective, vit=TINY, student: int = 1, teacher: int = 2) -> Networks:
    """Networks whose teacher has begun to tell images apart, with a Gram teacher that is neither of them."""
    made = networks(objective, student, teacher, vit)
    made.take_gram_teacher()
    with torch.no_grad():
        for head in made.teacher.heads.values():
            head.last_layer.weight *= 30
        for parameter in made.gram.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return made


def gradient_of(objective: DINOv3, batches: list[ViewBatch], *, vit=TINY) -> tuple[Tensor, dict[str, Tensor]]:
    made = prepared(objective, vit)
    settings = replace(SETTINGS, clip_norm=1e9)
    result = step(made, optimizer_of(made, lr=0.0), objective, batches, settings=settings)
    return gradient(made), dict(result.terms)


def only(term: str, settings: DINOv3Settings) -> DINOv3Settings:
    """Those settings with all other terms off."""
    others = {"dino", "ibot", "koleo", "gram"} - {term}
    return replace(settings, **{name: replace(getattr(settings, name), weight=0.0) for name in others})


def assert_the_big_batch_s(settings: DINOv3Settings, pieces: int) -> None:
    objective = DINOv3(settings)
    whole, terms = gradient_of(objective, batch_of(objective, 8, vit=RANDOM), vit=RANDOM)
    parts, same_terms = gradient_of(objective, batch_of(objective, 8, pieces, vit=RANDOM), vit=RANDOM)
    assert 1e-3 < whole.norm() < 1e3  # where one term's gradient is huge, no other's would be looked at
    assert (whole - parts).norm() / whole.norm() < 2e-5
    assert terms.keys() == same_terms.keys()
    for name, value in terms.items():
        torch.testing.assert_close(same_terms[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("balance", "group"), [("sinkhorn", None), ("sinkhorn", 2), ("sinkhorn", 4), ("centering", None)]
)
def test_accumulated_gradients_are_the_big_batch_s(balance, group: int | None) -> None:
    """With every term, drop path and moved positions; KoLeo's groups within micro-batches and beyond them."""
    settings = replace(ALL_ON, balance=balance, koleo=KoLeoSettings(weight=0.5, group=group))
    for pieces in (2, 4):
        assert_the_big_batch_s(settings, pieces)


@pytest.mark.parametrize("term", ["dino", "ibot", "koleo", "gram"])
def test_each_term_s_accumulated_gradient_is_the_big_batch_s(term: str) -> None:
    assert_the_big_batch_s(only(term, ALL_ON), 4)


def test_gram_anchoring_compares_the_patches_that_were_drawn() -> None:
    objective = DINOv3(replace(ALL_ON, gram=replace(ALL_ON.gram, tokens="unmasked")))
    (batch,) = batch_of(objective, 4)
    everything = torch.arange(16).expand(8, -1)
    found = [
        float(gradient_of(objective, [replace(batch, gram_patches=chosen)])[1]["gram"])
        for chosen in (None, everything, everything.flip(1), everything[:, :5])
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    assert abs(found[3] / found[0] - 1) > 1e-3
    # Those outside the drawn ones have no say, masked or not.
    outside = batch.masked.masks.clone()
    outside[:, 5:] = ~outside[:, 5:]
    turned = replace(batch, gram_patches=everything[:, :5])
    with torch.no_grad():
        made = prepared(objective)
        seen = objective._student_global(made.student, turned, objective.settings.gram.layers)
        terms = [
            objective._gram(made, replace(turned, masked=replace(batch.masked, masks=masks)), seen, 4)
            for masks in (batch.masked.masks, outside)
        ]
    assert torch.equal(*terms)


@pytest.mark.parametrize("term", ["dino", "ibot", "koleo"])
def test_the_naive_form_is_far_from_the_big_batch(term: str) -> None:
    """Each micro-batch for itself, gradients averaged: another Sinkhorn, other neighbours."""
    objective = DINOv3(only(term, ALL_ON))
    whole, _ = gradient_of(objective, batch_of(objective, 8))
    naive = torch.stack([gradient_of(objective, [part])[0] for part in batch_of(objective, 8, 4)]).mean(dim=0)
    assert (whole - naive).norm() / whole.norm() > 0.02


def test_a_term_that_is_off_is_not_computed_and_changes_nothing_else() -> None:
    for term in ("dino", "ibot", "koleo", "gram"):
        settings = replace(ALL_ON, **{term: replace(getattr(ALL_ON, term), weight=0.0)})
        objective = DINOv3(settings)
        made = prepared(objective)
        result = step(made, optimizer_of(made), objective, batch_of(objective, 4))
        assert set(result.terms) == {"dino", "ibot", "koleo", "gram"} - {term}
        expected = sum(float(value) * objective.values(1)[f"weight_{name}"] for name, value in result.terms.items())
        assert float(result.loss) == pytest.approx(expected, rel=1e-5)


def state(*parts: Networks) -> list[Tensor]:
    return [
        parameter.detach().clone()
        for part in parts
        for network in (part.student, part.teacher, part.gram)
        if network is not None
        for parameter in network.parameters()
    ]


@pytest.mark.parametrize("where", ["global_views", "local_views", "gram_views"])
@pytest.mark.parametrize("balance", ["sinkhorn", "centering"])
def test_a_non_finite_batch_changes_nothing(where: str, balance) -> None:
    objective = DINOv3(replace(ALL_ON, balance=balance))
    made, kept = prepared(objective), objective.first_state()
    optimizer = optimizer_of(made)
    assert step(made, optimizer, objective, batch_of(objective, 4), state=kept).applied == 1.0
    before, centres = state(made), copy.deepcopy(kept)
    moments = [value.clone() for entry in optimizer.state.values() for value in entry.values()]

    (poisoned,) = batch_of(objective, 4, seed=1)
    getattr(poisoned, where)[0, 0, 0, 0] = math.inf
    assert step(made, optimizer, objective, [poisoned], state=kept).applied == 0.0

    assert all(torch.equal(a, b) for a, b in zip(before, state(made), strict=True))
    after = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    assert all(torch.equal(centres[name], kept[name]) for name in kept)
    assert step(made, optimizer, objective, batch_of(objective, 4, seed=2), state=kept).applied == 1.0


def test_the_centre_follows_the_teacher_s_logits() -> None:
    objective = DINOv3(replace(ALL_ON, balance="centering", centre_momentum=0.75))
    made, kept = prepared(objective), objective.first_state()
    (batch,) = batch_of(objective, 4)
    with torch.no_grad():
        logits = objective.observe(made, batch, objective.values(1)).cls_logits
    step(made, optimizer_of(made), objective, [batch], state=kept)
    torch.testing.assert_close(kept["dino_centre"], 0.25 * logits.mean(dim=0))
    assert kept["ibot_centre"].abs().sum() > 0


def test_student_and_teacher_start_equal_and_the_teacher_follows() -> None:
    objective = DINOv3(ALL_ON)
    made = networks(objective, 3, 3)
    made.take_gram_teacher()
    start = [parameter.detach().clone() for parameter in made.student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(start, made.teacher.parameters(), strict=True))
    gram = [parameter.clone() for parameter in made.gram.parameters()]
    step(made, optimizer_of(made), objective, batch_of(objective, 4), momentum=0.75)
    for old, new, moved in zip(start, made.student.parameters(), made.teacher.parameters(), strict=True):
        torch.testing.assert_close(moved, 0.75 * old + 0.25 * new)
    assert all(torch.equal(a, b) for a, b in zip(gram, made.gram.parameters(), strict=True))


def test_the_teacher_draws_nothing_whatever_the_student_does() -> None:
    objective = DINOv3(ALL_ON)
    made = networks(objective, vit=RANDOM)
    (batch,) = batch_of(objective, 4, vit=RANDOM)
    plain = replace(batch, global_draws=None, local_draws=None)
    values = objective.values(1)
    with torch.no_grad():
        one, other = objective.observe(made, batch, values), objective.observe(made, plain, values)
    assert torch.equal(one.cls_logits, other.cls_logits)
    assert not torch.equal(*(objective._student_cls(made.student, item) for item in (batch, plain)))


def test_the_shared_head_serves_both_terms() -> None:
    objective = DINOv3(replace(ALL_ON, ibot=IBOTSettings(head="shared")))
    made = prepared(objective)
    assert set(made.student.heads) == {"dino"}
    result = step(made, optimizer_of(made), objective, batch_of(objective, 4))
    assert {"dino", "ibot"} <= set(result.terms)


@pytest.mark.parametrize("precision", ["bf16", "bf16_weights"])
def test_low_precision_is_near_and_masters_stay_fp32(precision: str) -> None:
    objective = DINOv3(ALL_ON)
    settings = replace(SETTINGS, precision=precision)
    made = networks(objective, precision=precision)
    made.take_gram_teacher()
    low = step(made, optimizer_of(made), objective, batch_of(objective, 4, 2), settings=settings)
    plain = networks(objective)
    plain.take_gram_teacher()
    full = step(plain, optimizer_of(plain), objective, batch_of(objective, 4, 2))
    assert float(low.loss) == pytest.approx(float(full.loss), rel=0.05)
    assert {value.dtype for value in made.student_weights.state_dict().values()} == {torch.float32}


def test_every_trainable_parameter_gets_a_gradient() -> None:
    objective = DINOv3(ALL_ON)
    made = prepared(objective)
    step(made, optimizer_of(made), objective, batch_of(objective, 4))
    assert [name for name, parameter in made.student_weights.named if parameter.grad is None] == []


def test_a_few_windows_are_overfitted_with_every_term_and_the_loss_goes_on_after_a_restart() -> None:
    settings = replace(
        ALL_ON,
        prototypes=8,
        teacher_temperature=0.03,
        teacher_temperature_start=0.03,
        koleo=KoLeoSettings(weight=0.1, group=None),
        gram=GramSettings(weight=0.5),
    )
    objective = DINOv3(settings)
    made = networks(objective)
    made.take_gram_teacher()
    optimizer, batches = optimizer_of(made, lr=6e-3), batch_of(objective, 8)
    results = [step(made, optimizer, objective, batches).terms for _ in range(55)]
    first, last = ({name: float(value) for name, value in terms.items()} for terms in (results[0], results[-1]))
    assert first["dino"] == pytest.approx(math.log(8), rel=0.1)
    assert first["ibot"] == pytest.approx(math.log(8) / 2, rel=0.1)
    assert last["dino"] < 0.5 * first["dino"]
    assert last["ibot"] < 0.9 * first["ibot"]
    assert last["koleo"] < first["koleo"]

    again = networks(objective, 8, 9)
    for weights, source in (
        (again.student_weights, made.student_weights),
        (again.teacher_weights, made.teacher_weights),
    ):
        weights.load_state_dict(source.state_dict())
    again.gram_weights.load_state_dict(made.gram.state_dict())
    restored = optimizer_of(again)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    went_on = [float(step(made, optimizer, objective, batches).loss) for _ in range(2)]
    assert went_on == [float(step(again, restored, objective, batches).loss) for _ in range(2)]


@pytest.mark.parametrize(
    "objective", [MaskedAutoencoder(MAESettings()), Classification(ClassificationSettings())], ids=lambda one: one.terms
)
def test_other_objectives_learn_through_the_same_step(objective: Objective) -> None:
    made = networks(objective)
    optimizer, (term,) = optimizer_of(made, lr=6e-3), objective.terms
    losses = [
        float(step(made, optimizer, objective, batch_of(objective, 8, pieces)).terms[term]) for pieces in [1, 2, 4] * 8
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "objective", [MaskedAutoencoder(MAESettings()), Classification(ClassificationSettings())], ids=lambda one: one.terms
)
def test_other_objectives_are_exact_under_accumulation(objective: Objective) -> None:
    found = []
    for pieces in (1, 4):
        made = networks(objective)
        step(made, optimizer_of(made), objective, batch_of(objective, 8, pieces))
        found.append(gradient(made))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-5


@pytest.mark.gpu
def test_nothing_in_the_step_waits_for_the_device() -> None:
    objective = DINOv3(replace(ALL_ON, koleo=KoLeoSettings(group=None)))
    made = networks(objective)
    cpu = batch_of(objective, 8, 2)
    device = torch.device("cuda")
    made = Networks(made.student.to(device), made.teacher.to(device), "bf16")
    made.take_gram_teacher()

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if hasattr(value, "masks"):
            return type(value)(*(part.to(device) for part in vars(value).values()))
        return value

    batches = [ViewBatch(**{name: moved(value) for name, value in vars(one).items()}) for one in cpu]
    optimizer, settings = optimizer_of(made), replace(SETTINGS, precision="bf16")
    step(made, optimizer, objective, batches, settings=settings)  # libraries make their handles at first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(made, optimizer, objective, batches, settings=settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.to_host()["applied"] == 1.0
