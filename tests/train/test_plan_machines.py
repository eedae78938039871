"""Plans for machines: the predecessors' measured points, the shipped configurations, days, costs and warnings."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_train.config import Config, load_config, validate
from dinox_train.learner import make_objective, vit_config
from dinox_train.plan import StagePlan, flops_of, plan_stage
from dinox_train.plan_costs import checkpoint_bytes, disk_of, free_bytes, kilowatt_hours, set_bytes
from dinox_train.plan_days import Offer, offers, offers_in_words, peak_of
from dinox_train.plan_machines import MACHINES, Machine, Unmeasured, tflops_of, this_machine
from dinox_train.plan_report import machine_for, plan_lines, room_for
from dinox_train.plan_speed import stage_speed
from dinox_train.plan_traffic import launches_of
from dinox_train.plan_warnings import warnings_of
from dinox_train.platform import facts as platform_facts
from dinox_train.platform.bandwidth import Bandwidth
from dinox_train.platform.kept import Kept
from dinox_train.platform.products import Measured
from dinox_train.platform.start import products_named
from dinox_train.prototype_counts import with_prototypes
from dinox_train.sections import PlanSection
from dinox_train.span import Span, lasting
from dinox_train.stages import Stage, stages_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("tiny_preset")
SMALL: dict[str, Any] = {
    "device": "cpu",
    "model": {"preset": "vit_ti"},
    "views": {"global_size": 64, "local_size": 32, "num_local": 2},
    "objective": {"prototypes": 64, "head_hidden": 64, "head_bottleneck": 32},
    "train": {"updates": 100, "batch_size": 256},
}


def images_per_s(config: Config, machine: Machine) -> Span:
    """Of the plan, without its memory."""
    config = with_prototypes(config)
    vit, objective = vit_config(config), make_objective(config)
    plan = StagePlan(Stage(1, 1, None, config), 1, flops_of(config, vit, objective), 0, {})
    return stage_speed(plan, vit, machine).images_per_s


# --------------------------------------------------------------------------- what others measured

# DINO-X (timlawrenz/DINO-X) on Strix Halo, patches of 14, views of 224, the whole of each block computed again. Its
# tuner timed one view, teacher and student, with an error squared for a loss: two of those are an image here. Its
# trainer's rates are divided by the accumulation that it counted in: two views, 0.73 to 0.75 and 0.84 images/s, and
# they are of fp32, since its commands left --amp out.
OTHERS = {
    "ViT-L, tuner, 23.5 views/s in bf16": ("strix_halo", "vit_l", "bf16", 4 * 48, 4, 23.5 / 2),
    "ViT-G, tuner, 5.4 views/s in bf16": ("strix_halo", "vit_g", "bf16", 8 * 32, 8, 5.4 / 2),
    "ViT-L, trainer of July, in fp32": ("strix_halo", "vit_l", "fp32", 256, 64, 0.73),
    "ViT-L, trainer of May, in fp32": ("strix_halo", "vit_l", "fp32", 256, 32, 0.84),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_predecessors_points_lie_in_the_plans_span(name: str) -> None:
    machine, preset, precision, batch, accumulation, measured = OTHERS[name]
    config = validate(
        {
            "precision": precision,
            "model": {"preset": preset, "patch_size": 14},
            "views": {"global_size": 224, "local_size": 98, "num_local": 0},
            "objective": {"ibot": {"weight": 0.0}, "koleo": {"weight": 0.0}, "prototypes": 8192},
            "train": {"batch_size": batch, "accumulation": accumulation},
            "execution": {"activation_checkpointing": "block"},
        }
    )
    span = images_per_s(config, MACHINES[machine].machine(precision))
    assert span.low < measured < span.high, span
    assert span.high < (8 if precision == "bf16" else 16) * span.low, "a span that says something"


def test_dinov3s_own_rate_lies_in_the_span_of_an_h100() -> None:
    """ViT-L on 32 H100, 64 images each, about 14 hours: 159 images/s a GPU (README of facebookresearch/dinov3).

    That is wall time: data, evaluations, checkpoints and the exchange between GPUs are in it, and not in a plan.
    """
    config = validate(
        {
            "precision": "bf16",
            "model": {"preset": "vit_l", "drop_path": 0.3},
            "objective": {"prototypes": 65536, "ibot": {"prototypes": 65536}},
            "train": {"batch_size": 64},
            "execution": {"compile": "blocks"},
        }
    )
    span = images_per_s(config, MACHINES["h100"].machine("bf16"))
    assert 0.9 * span.low < 159 < span.high, span


def test_the_true_rate_of_a_run_that_lost_its_precision_is_no_bf16_rate() -> None:
    """What the plan is for: 0.73 images/s is far below what bf16 can do there, and says that something is wrong."""
    config = validate(
        {
            "precision": "bf16",
            "model": {"preset": "vit_l"},
            "views": {"num_local": 0},
            "objective": {"ibot": {"weight": 0.0}},
            "train": {"batch_size": 256, "accumulation": 64},
            "execution": {"activation_checkpointing": "block"},
        }
    )
    assert images_per_s(config, MACHINES["strix_halo"].machine("bf16")).low > 2 * 0.84


# --------------------------------------------------------------------------- shipped configurations


def verdict_of(repository: Path, model: str, hardware: str, *overrides: str) -> str:
    files = [repository / "configs" / f"{model}.yaml", repository / "configs" / "hardware" / f"{hardware}.yaml"]
    config = load_config(files, (*overrides, f"plan.machine={hardware}"))
    assert config.train.batch_size >= 256 or overrides
    return plan_lines(config)[-1]


@pytest.mark.parametrize(
    ("model", "hardware", "gib"),
    [
        pytest.param("vit_s", "rtx_4090", 24, marks=pytest.mark.fault),  # each takes ten seconds: the whole rehearsal
        pytest.param("vit_b", "rtx_4090", 24, marks=pytest.mark.fault),
        ("vit_l", "rtx_4090", 24),
        ("vit_g", "strix_halo", 96),
    ],
)
def test_each_shipped_configuration_fits_its_hardware(repository: Path, model: str, hardware: str, gib: int) -> None:
    last = verdict_of(repository, model, hardware)
    assert last.startswith("verdict: fits: "), last
    assert f"of {gib} GiB" in last


@pytest.mark.fault
@pytest.mark.parametrize(("model", "hardware", "batch"), [("vit_l", "rtx_4090", 64), ("vit_g", "strix_halo", 128)])
def test_views_of_512_fit_at_64_to_128_images(repository: Path, model: str, hardware: str, batch: int) -> None:
    last = verdict_of(
        repository, model, hardware, "views.global_size=512", f"train.batch_size={batch}",
        f"train.accumulation={batch // 4}",
    )  # fmt: skip
    assert last.startswith("verdict: fits: "), last


# --------------------------------------------------------------------------- machines


def test_the_names_are_those_of_the_section() -> None:
    names = get_args(get_args(PlanSection.model_fields["machine"].annotation)[0])
    assert names == tuple(MACHINES)
    for one in MACHINES.values():
        assert one.sources[0].startswith("ceiling: ")
        for precision in ("fp32", "bf16", "bf16_weights"):
            machine = one.machine(precision)
            assert 0 < machine.reached.low < machine.reached.high <= 1
            assert 0 < machine.copied.low < machine.copied.high <= 1


def test_a_named_machine_brings_its_memory_unless_the_configuration_says_it() -> None:
    named = SMALL | {"plan": {"machine": "h200"}}
    assert room_for(validate(named)).words == "139 GiB of H200 SXM"
    assert room_for(validate(named | {"execution": {"memory_gib": 10.0}})).words.startswith("10 GiB")


def product(name: str, inputs: int, outputs: int, seconds: float, library: str = "default") -> Measured:
    return Measured(name, "forward", library, 1000, inputs, outputs, 1, seconds)


def test_the_rate_of_products_is_that_of_all_by_the_faster_library() -> None:
    slow, fast = product("a", 100, 100, 2e-3), product("a", 100, 100, 1e-3, "other")
    assert tflops_of([slow, fast]) == pytest.approx(fast.tflops)
    other = product("b", 300, 100, 6e-3)
    # 4e8 operations of both in 1 + 6 ms
    assert tflops_of([slow, fast, other]) == pytest.approx(8e7 / 7e-3 / 1e12)


def test_this_machine_is_read_from_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOX_CACHE", str(tmp_path))
    config = with_prototypes(validate(SMALL))
    vit, stages = vit_config(config), stages_of(config)
    found = this_machine(CPU, vit, stages, "fp32")
    assert isinstance(found, Unmeasured)
    assert "dinox_train.platform tune" in found.words
    lines = plan_lines(config)
    assert any(line.startswith("speed: not known: nothing was measured") for line in lines)
    assert not list(tmp_path.iterdir()), "a plan writes nothing"

    kept = Kept(platform_facts.find(CPU))
    kept.put("bandwidth", asdict(Bandwidth(host=10.0)))
    kept.put("products 1x1 rows 5 float32", [asdict(product("a", 100, 100, 1e-3))])
    near = this_machine(CPU, vit, stages, "fp32")
    assert isinstance(near, Machine)
    assert "of another network" in near.sources[0]
    assert isinstance(this_machine(CPU, vit, stages, "bf16"), Unmeasured), "products of another dtype say nothing"
    from dinox_train.kernel_choice import product_rows

    name = products_named(vit, product_rows(vit, stages, torch.float32), torch.float32)
    kept.put(name, [asdict(product("a", 100, 100, 1e-3))])
    exact = this_machine(CPU, vit, stages, "fp32")
    assert isinstance(exact, Machine)
    assert (exact.tflops, exact.gb_per_s) == (pytest.approx(0.02), 10.0)
    assert exact.reached.high / exact.reached.low < near.reached.high / near.reached.low
    lines = plan_lines(config)
    assert any("images/s" in line for line in lines)
    assert lines[-1].startswith("verdict: fits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_here_is_not_guessed() -> None:
    config = validate(SMALL | {"device": "cuda"})
    found = machine_for(config, vit_config(config))
    assert isinstance(found, Unmeasured)
    assert "plan.machine=strix_halo" in found.words


# --------------------------------------------------------------------------- speed


machines = st.sampled_from(list(MACHINES))


@settings(max_examples=10)
@given(machines, st.sampled_from(["fp32", "bf16", "bf16_weights"]), st.sampled_from([0, 4]))
def test_spans_are_in_order_and_more_work_takes_longer(name: str, precision: str, num_local: int) -> None:
    machine = MACHINES[name].machine(precision)
    few, many = (
        images_per_s(
            validate(SMALL | {"precision": precision, "views": SMALL["views"] | {"num_local": views}}), machine
        )
        for views in (num_local, num_local + 4)
    )
    assert 0 < few.low < few.high
    assert many.low <= few.low, "equal where kernels are launched one by one, and as many"
    assert many.high < few.high


def test_gram_anchoring_counts_from_its_start() -> None:
    gram = {"objective": SMALL["objective"] | {"gram": {"weight": 1.0, "start": 50}}}
    machine = MACHINES["h100"].machine("fp32")
    config = with_prototypes(validate(SMALL | gram))
    (stage,) = stages_of(config)
    plan = plan_stage(config, stage)
    speed = stage_speed(plan, vit_config(config), machine)
    assert plan.gram_updates == 50
    share = 1 - 0.5 * plan.gram_flops / plan.flops.total
    assert speed.total_s.low == pytest.approx(100 * share * speed.update_s.low)


def test_times_read_as_people_say_them() -> None:
    assert lasting(Span(30, 45)) == "30.0 to 45.0 s"
    assert lasting(Span(86400, 3 * 86400)) == "1 to 3 days"
    assert lasting(Span(4e7, 9e7)) == "1.3 to 2.9 years"
    assert Span(2.0, 4.0).under(8.0) == Span(2.0, 4.0)


# --------------------------------------------------------------------------- days


def test_days_say_what_fits() -> None:
    config = with_prototypes(validate(SMALL | {"train": {"updates": 1000, "batch_size": 256, "accumulation": 8}}))
    machine = MACHINES["rtx_4090"].machine("fp32")
    found = [one for one in offers(config, machine, 2.0, None, lambda peak: 0) if one.preset in ("vit_ti", "vit_s")]
    by_size = [one.updates.low for one in found if one.preset == "vit_s"]
    assert [one.size for one in found if one.preset == "vit_ti"] == [64, 224, 384, 512]
    assert by_size == sorted(by_size, reverse=True)
    assert {one.piece for one in found} == {8}


def test_what_is_offered_starts_the_kernels_of_all_its_pieces() -> None:
    config = with_prototypes(validate(SMALL | {"train": {"updates": 1000, "batch_size": 64, "accumulation": 8}}))
    machine = replace(MACHINES["h200"].machine("fp32"), launch_s=1.0)  # so slow that nothing else counts
    [offer] = [one for one in offers(config, machine, 2.0, None, lambda peak: 0)
               if (one.preset, one.size) == ("vit_ti", 64)]  # fmt: skip
    kernels = launches_of(config, vit_config(config), make_objective(config))
    assert offer.piece == 8
    assert offer.updates.low == pytest.approx(2 * 86400 / kernels)


def test_what_is_offered_names_the_pieces_that_it_has() -> None:
    config = with_prototypes(validate(SMALL | {"train": {"updates": 1000, "batch_size": 36}}))  # not in pieces of 8
    found = offers(config, MACHINES["h200"].machine("fp32"), 2.0, None, lambda peak: 0)
    assert {one.piece for one in found} == {1}


def test_offers_in_words() -> None:
    config = validate(SMALL | {"train": {"updates": 100}})
    offered = [
        Offer("vit_s", 224, 8, Span(200, 400)),
        Offer("vit_b", 224, 1, Span(60, 120)),
        Offer("vit_l", 224, 8, Span(10, 20)),
        Offer("vit_g", 512, None, Span(1, 2)),
    ]
    assert [one.verdict(100) for one in offered] == ["yes", "perhaps", "no", "does not fit into the memory"]
    lines = offers_in_words(config, 14, offered)
    assert lines[0].startswith("in 14 days")
    assert lines[-1] == "  the largest that fits surely: vit_s at 224"
    assert "none fits surely; vit_b at 224 does 60 updates at least" in offers_in_words(config, 14, offered[1:])[-1]


def test_the_peak_is_that_of_all_blocks() -> None:
    tree = SMALL | {"model": {"preset": "vit_s"}, "train": {"batch_size": 64, "accumulation": 4}}
    config = with_prototypes(validate(tree))
    full = plan_stage(config, stages_of(config)[0]).peak
    assert peak_of(config) == pytest.approx(full, rel=0.01)


def test_the_verdict_says_when_the_days_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_train.plan_report.offers", lambda *_: [])
    few = SMALL | {"plan": {"machine": "h100", "days": 1e-7}}
    assert plan_lines(validate(few))[-1].startswith("verdict: does not fit into 1e-07 days, only into the memory")


def test_the_verdict_says_when_it_takes_more_than_a_year() -> None:
    tree = SMALL | {"plan": {"machine": "strix_halo"}, "train": {"updates": 2 * 10**9, "batch_size": 2048}}
    assert plan_lines(validate(tree))[-1].startswith("verdict: does not work, as it takes more than a year")


# --------------------------------------------------------------------------- costs


def test_a_checkpoint_has_the_planned_size(tmp_path: Path) -> None:
    from dinox_model import Preprocess
    from dinox_train.checkpoint import save_checkpoint
    from dinox_train.learner import Learner

    config = with_prototypes(validate(SMALL | {"train": {"updates": 1, "batch_size": 4}}))
    learner = Learner(config, Preprocess(), CPU)
    for group in learner.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()  # the moments are there from now on
    folder = save_checkpoint(tmp_path, 1, teacher=learner.teacher.backbone, tensors=learner.tensors(), state={})
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    planned = checkpoint_bytes(vit_config(config), make_objective(config))
    assert planned == pytest.approx(size, rel=0.05)


def test_disk_counts_what_stays(tmp_path: Path) -> None:
    tree = SMALL | {"checkpoint": {"every": 10, "keep_last": 2, "keep_every": 50}, "run": {"folder": str(tmp_path)}}
    config = with_prototypes(validate(tree))
    disk = disk_of(config, vit_config(config), make_objective(config))
    assert disk.kept == 2 + 2 + 1
    assert disk.total > 5 * disk.checkpoint
    before = free_bytes(config)
    assert before > 0
    short = validate(tree | {"train": {"updates": 10, "batch_size": 256}})
    assert disk_of(short, vit_config(short), make_objective(config)).kept == 2, "one, and one that is being written"


def test_the_size_of_a_set_that_is_here(small_set: Path) -> None:
    here = validate(SMALL | {"data": {"shards": str(small_set)}})
    manifest = json.loads((small_set / "manifest.json").read_text())
    assert set_bytes(here) == sum(shard["size"] for shard in manifest["shards"])
    two = ({"path": str(small_set)}, {"path": str(small_set)})
    assert set_bytes(validate(SMALL | {"data": {"shards": two}})) == 2 * (set_bytes(here) or math.nan)
    for elsewhere in ("nowhere", "s3://bucket/set", "fake"):
        assert set_bytes(validate(SMALL | {"data": {"shards": elsewhere}})) is None


def test_energy_is_power_times_time() -> None:
    machine = MACHINES["h200"].machine("bf16")
    hour = Span(3600.0, 7200.0)
    assert kilowatt_hours(validate(SMALL), machine, hour) == Span(0.4, 1.4)
    assert kilowatt_hours(validate(SMALL | {"plan": {"watts": 1000.0}}), machine, hour) == Span(1.0, 2.0)


# --------------------------------------------------------------------------- warnings


def warned(**more: Any) -> str:
    config = with_prototypes(validate(SMALL | more))
    vit = vit_config(config)
    plans = [
        StagePlan(
            stage, stage.updates_until(config.train.updates), flops_of(config, vit, make_objective(config)), 0, {}
        )
        for stage in stages_of(config)
    ]
    return "\n".join(warnings_of(config, vit, plans, Span(1.0, 2.0), here=False))


def test_a_sound_run_is_not_warned_of() -> None:
    assert warned(checkpoint={"every": 50}) == ""


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"train": {"updates": 100, "batch_size": 32}}, "batches below 256"),
        ({"schedule": {"warmup_updates": 100}}, "schedule.warmup_updates is 100"),
        ({"optimizer": {"backbone_frozen_updates": 500}}, "optimizer.backbone_frozen_updates is 500"),
        ({"objective": {"prototypes": 2**20}}, "objective.prototypes is 1,048,576 for 512 samples"),
        ({"objective": SMALL["objective"] | {"gram": {"weight": 1.0, "start": 200}}}, "objective.gram.start is 200"),
        ({"stages": ({"updates": 200}, {})}, "stage 2 has no update"),
        ({"checkpoint": {"every": 50000}}, "checkpoint.every is 50,000"),
        ({"train": {"updates": 40_000_000, "batch_size": 256}}, "more than a year"),
    ],
)
def test_what_cannot_work_is_warned_of(more: dict[str, Any], said: str) -> None:
    assert said in warned(**more)


def test_a_full_disk_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_train.plan_warnings.free_bytes", lambda config: 1000)
    config = with_prototypes(validate(SMALL | {"run": {"folder": str(tmp_path)}}))
    found = warnings_of(config, vit_config(config), [], None, here=True)
    assert any("the disk of run.folder has 0.0 GiB" in line for line in found)
