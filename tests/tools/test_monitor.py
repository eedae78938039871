"""monitor.py on a run of nine updates: figures counted by hand, the same bytes again, damage, rotation, other sets."""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monitor
import numpy as np
import pytest
import torch
from monitoring import sheets, snapshots
from monitoring.choice import choose
from monitoring.protocol import SEED, VIEW_POSITION, Sizes, view_settings
from PIL import Image

import dinox_model
from dinox_io import open_shards
from dinox_model import attention_maps
from dinox_train.__main__ import main as train
from dinox_train.checkpoint import open_checkpoint, save_checkpoint
from dinox_train.data import open_dataset
from dinox_train.fake import write_fake_set
from dinox_train.health import effective_rank, feature_std, patch_similarity
from dinox_train.report.monitored import Monitored
from dinox_train.sections import DataSection
from dinox_train.views import draw_views, render_views, render_whole_slices
from tests.train.conftest import small_config, small_set, tiny_preset  # noqa: F401 (fixtures)

STEPS = (3, 6, 9)
SMALL = ("--slices", "3", "--gallery", "16")
Monitor = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    small_config: Path,  # noqa: F811
    small_set: Path,  # noqa: F811
    tiny_preset: None,  # noqa: F811
) -> Path:
    """Nine updates, a checkpoint after each third; Gram anchoring from the fifth on."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}", "evaluate.every=9"]
    gram = ["objective.gram.weight=1", "objective.gram.start=4"]
    assert train([*words, *gram, "checkpoint.keep_last=9", "evaluate.windows=4"]) == 0
    return folder


def plain_sheet(path: Path, lines: Any, names: Any, texts: Any = None, *, tile_inches: float) -> None:
    """In the place of matplotlib, which takes most of a small look's time: all that a sheet is made of."""
    tiles = [np.asarray(tile, np.float32).tobytes() for line in lines for tile in line]
    path.write_bytes(repr((names, texts, tile_inches)).encode() + b"".join(tiles))


def aside(patch: pytest.MonkeyPatch) -> None:
    """This process stays what it is."""
    patch.setattr(monitor, "step_aside", lambda threads: None)
    patch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture(scope="module")
def looked(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the monitor writes of the whole run."""
    output = tmp_path_factory.mktemp("looks") / "monitor"
    with pytest.MonkeyPatch.context() as patch:
        aside(patch)
        patch.setattr(sheets, "save_sheet", plain_sheet)
        assert monitor.main([str(trained), "--once", "--output", str(output), *SMALL]) == 0
    return output


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Monitor:
    """`watch(run, …)`: exit code, and all that was said."""
    aside(monkeypatch)
    monkeypatch.setattr(sheets, "save_sheet", plain_sheet)

    def run(*words: object) -> tuple[int, str]:
        code = monitor.main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that may be harmed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def figures(output: Path, step: int) -> dict[str, Any]:
    return json.loads((output / f"step-{step:08d}" / "figures.json").read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 16
    file.write_bytes(data)


# ------------------------------------------------------------------------------------------ what is written


def test_the_run_is_only_read(run: Path, watch: Monitor) -> None:
    before = contents(run)
    code, said = watch(run, "--once", *SMALL)
    assert code == 0
    after = contents(run)
    assert {name: data for name, data in after.items() if not name.startswith("monitor/")} == before
    names = {name.removeprefix("monitor/") for name in after if name.startswith("monitor/")}
    each = {f"step-{step:08d}/{name}" for step in STEPS for name in ("figures.json", "attention.png", "pca.png")}
    kept = {f"step-{step:08d}/maps.safetensors" for step in STEPS} | {
        "first.safetensors",
        "newest.safetensors",
        "before.safetensors",
    }
    assert names == each | kept | {
        "slices.json",
        "baseline.json",
        "attention_over_time.png",
        "pca_over_time.png",
        "over_time.json",
    }
    assert "3 slices in pictures; retrieval among 16 slices" in said
    assert "patients that are held out" in said
    assert said.count("mrr ") == 3
    code, said = watch(run, "--once")
    assert (code, contents(run)) == (0, after)
    assert "nothing new" in said


def test_equal_inputs_give_equal_bytes(trained: Path, looked: Path, watch: Monitor, tmp_path: Path) -> None:
    assert watch(trained, "--once", "--output", tmp_path / "again", *SMALL)[0] == 0
    assert contents(tmp_path / "again") == contents(looked)


def test_what_the_figures_depend_on(looked: Path, trained: Path, small_set: Path) -> None:  # noqa: F811
    found = figures(looked, 6)
    with open_shards(small_set) as shards:
        assert found["sets"] == [shards.digest]
        sides = {volume.patient: volume.split for volume in shards.volumes}
    expected = {"update": 6, "updates": 9, "side": "val", "held_out": True, "own_set": True, "device": "cpu"}
    expected |= {"dtype": "fp32", "view_pixels": 32, "picture_pixels": 64}
    assert expected.items() <= found.items()
    manifest = json.loads((trained / "checkpoints" / "step-00000006" / "MANIFEST.json").read_bytes())
    assert found["checkpoint"]["digest"] == manifest["self"]
    chosen = json.loads((looked / "slices.json").read_bytes())["slices"]
    assert len(chosen) == 3
    assert {sides[row["patient"]] for row in chosen} == {"val"}
    assert len({row["patient"] for row in chosen}) == 3


def test_gram_drift_is_from_those_it_names(looked: Path) -> None:
    drifts = [figures(looked, step)["gram_drift"] for step in STEPS]
    assert [(drift["first"] or {}).get("update") for drift in drifts] == [None, 3, 3]
    assert [(drift["previous"] or {}).get("update") for drift in drifts] == [None, 3, 6]
    assert [drift["gram_teacher"] is None for drift in drifts] == [True, False, False]
    assert drifts[1]["first"]["rms"] == drifts[1]["previous"]["rms"] > 0
    assert drifts[2]["first"]["rms"] > drifts[2]["previous"]["rms"] > 0


def test_pictures_are_pictures(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aside(monkeypatch)
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert monitor.main([str(run), "--once", *SMALL]) == 0
    step = "step-00000009"
    for name in (f"{step}/attention", f"{step}/pca", "attention_over_time", "pca_over_time"):
        with Image.open(run / "monitor" / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 10


# ------------------------------------------------------------------------------------------ by hand


@pytest.fixture
def by_hand(trained: Path, small_set: Path) -> Iterator[SimpleNamespace]:  # noqa: F811
    """The parts of a look at update 6, without the monitor's own."""
    folder = trained / "checkpoints" / "step-00000006"
    with open_shards(small_set) as shards:
        yield SimpleNamespace(model=dinox_model.load(folder), folder=folder, shards=shards)


def window(by: SimpleNamespace, volume: str, center: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    record = next(one for one in by.shards.volumes if one.id == volume)
    hu = torch.from_numpy(by.shards.read_window(record, center, 3, 1))[None]
    return hu, np.array([record.shape[1:]]), np.array([record.spacing_mm])


def test_embeddings_and_retrieval_by_hand(by_hand: SimpleNamespace, looked: Path, trained: Path) -> None:
    model, settings = by_hand.model, view_settings(32)
    config = open_checkpoint(by_hand.folder).state["config"]
    with_set = DataSection(shards=config["data"]["shards"])
    choice = choose(open_dataset(with_set, trained, None, print), with_set, Sizes.of(32), looked, 3, 16)
    queries, gallery, row = [], [], 0
    for run in choice.runs:
        for number, place in enumerate(run):
            hu, sizes, spacing = window(by_hand, place.stack.id, place.center)
            plan = draw_views(
                settings, seed=SEED, position=VIEW_POSITION, rows=np.array([row]), sizes=sizes, spacing_mm=spacing
            )
            both, _ = render_views(hu, plan, settings, model.preprocess.mean, model.preprocess.std)
            with torch.no_grad():
                one, other = model(both).cls
            queries += [one] if number == 1 else []
            gallery.append(other)
            row += 1
    found = figures(looked, 6)
    stacked = torch.stack(gallery)
    assert found["feature_std"] == pytest.approx(float(feature_std(stacked)), rel=1e-4)
    assert found["effective_rank"] == pytest.approx(float(effective_rank(stacked)), rel=1e-4)
    assert found["mean_norm"] == pytest.approx(float(stacked.norm(dim=1).mean()), rel=1e-4)
    places = []
    for number, query in enumerate(queries):
        cosine = torch.cosine_similarity(query[None].double(), stacked.double())
        places.append(1 + int((cosine > cosine[4 * number + 1]).sum()))
    retrieval = found["retrieval"]
    assert (retrieval["gallery"], retrieval["queries"], retrieval["neighbours"]) == (16, 4, 3)
    assert retrieval["top1"]["value"] == np.mean([place == 1 for place in places])
    assert retrieval["mrr"]["value"] == pytest.approx(np.mean([1 / place for place in places]))
    assert [retrieval[name]["chance"] for name in ("top1", "top5", "near1")] == [1 / 16, 5 / 16, 4 / 16]


def test_attention_and_patches_by_hand(by_hand: SimpleNamespace, looked: Path) -> None:
    model, found = by_hand.model, figures(looked, 6)
    shares, similar = [], []
    for row in json.loads((looked / "slices.json").read_bytes())["slices"]:
        hu, sizes, _ = window(by_hand, row["volume"], row["slice"])
        shown = render_whole_slices(hu, sizes, 64, model.preprocess)
        with torch.no_grad():
            (maps,) = attention_maps(model, shown)
            similar.append(float(patch_similarity(model(shown).patches)))
        shares.append(maps.from_cls[0].sum(dim=(1, 2)).numpy())
    assert found["attention"]["to_patches_by_head"] == pytest.approx(np.mean(shares, axis=0), rel=1e-4)
    assert found["patch_similarity"] == pytest.approx(np.mean(similar), rel=1e-3)


def test_baselines_are_the_network_before_it_learnt_and_the_pixels(looked: Path) -> None:
    before, *later = [figures(looked, step)["baseline"] for step in STEPS]
    assert later == [before, before]
    assert before["random"]["feature_std"] != figures(looked, 3)["feature_std"]
    assert before["pixels"]["retrieval"]["gallery"] == 16


# ------------------------------------------------------------------------------------------ going on


def test_only_new_checkpoints_are_looked_at(run: Path, looked: Path, watch: Monitor, tmp_path: Path) -> None:
    later = [run / "checkpoints" / f"step-{step:08d}" for step in (6, 9)]
    for folder in later:
        folder.rename(tmp_path / folder.name)
    assert watch(run, "--once", *SMALL)[0] == 0
    before = contents(run / "monitor")
    for folder in later:
        (tmp_path / folder.name).rename(folder)
    code, said = watch(run, "--once")
    assert (code, said.count("mrr ")) == (0, 2)
    assert contents(run / "monitor") == contents(looked)
    assert all(contents(looked)[name] == before[name] for name in before if name.startswith(("step-", "slices")))


def test_a_look_that_was_cut_short_is_done_again(run: Path, looked: Path, watch: Monitor) -> None:
    shutil.copytree(looked, run / "monitor")
    (run / "monitor" / "step-00000009" / "figures.json").unlink()
    code, said = watch(run, "--once")
    assert (code, said.count("mrr ")) == (0, 1)
    assert contents(run / "monitor") == contents(looked)


def test_another_checkpoint_of_the_same_update_is_new(run: Path, looked: Path, watch: Monitor) -> None:
    shutil.copytree(looked, run / "monitor")
    old = run / "checkpoints" / "step-00000009"
    model, state = dinox_model.load(old), open_checkpoint(old).state
    with torch.no_grad():
        model.cls_token.fill_(float("nan"))  # a network that nothing can be said of is no error
    shutil.rmtree(old)
    save_checkpoint(run / "checkpoints", 9, teacher=model, tensors={}, state=state)
    code, said = watch(run, "--once")
    assert (code, said.count("update 9:")) == (0, 1)
    found = figures(run / "monitor", 9)
    assert (found["feature_std"], found["retrieval"], found["patch_similarity"]) == (None, None, None)
    assert found["gram_drift"]["previous"] == {"update": 6, "rms": None} or found["gram_drift"]["previous"] is None


def test_what_a_rollback_undid_stays_and_is_compared_with_nothing(run: Path, looked: Path, watch: Monitor) -> None:
    shutil.copytree(looked, run / "monitor")
    old = run / "checkpoints" / "step-00000006"
    model, state = dinox_model.load(old), open_checkpoint(old).state
    for step in (6, 9):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    found = Monitored()
    assert found.read(run / "monitor") == []
    assert [one["update"] for one in found.figures] == [3]
    assert [path.parent.name for _, path in found.pictures] == ["step-00000003"] * 2  # those over time show 6 and 9
    save_checkpoint(run / "checkpoints", 9, teacher=model, tensors={}, state=state | {"update": 9, "went_back_to": [3]})
    code, said = watch(run, "--once")
    assert (code, said.count("update 9:"), said.count("mrr ")) == (0, 1, 1)
    again = figures(run / "monitor", 9)
    assert again["went_back_to"] == [3]
    assert [again["gram_drift"][name]["update"] for name in ("first", "previous")] == [3, 3]
    assert (run / "monitor" / "step-00000006" / "figures.json").is_file()
    drawn = json.loads((run / "monitor" / "over_time.json").read_bytes())["looks"]
    assert drawn == [[step, figures(run / "monitor", step)["checkpoint"]["digest"]] for step in (3, 9)]
    assert b"update 6" not in (run / "monitor" / "pca_over_time.png").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-00000003")  # rotated away
    found.read(run / "monitor")
    assert [one["update"] for one in found.figures] == [3, 9]
    assert [name for name, _ in found.pictures] == ["pca", "attention", "pca_over_time", "attention_over_time"]


def test_other_choices_are_refused_where_some_were_made(run: Path, looked: Path, watch: Monitor) -> None:
    shutil.copytree(looked, run / "monitor")
    (run / "monitor" / "step-00000009" / "figures.json").unlink()
    code, said = watch(run, "--once", "--slices", "2")
    assert (code, "holds looks of another slices" in said) == (2, True)
    assert watch(run, "--once", "--gallery", "8")[0] == 2


def test_one_monitor_an_output(run: Path, watch: Monitor) -> None:
    (run / "monitor").mkdir()
    with (run / "monitor" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, said = watch(run, "--once")
    assert code == 1
    assert "another monitor writes here" in said


# ------------------------------------------------------------------------------------------ damage and rotation


def test_a_damaged_checkpoint_is_told_and_passed_over(run: Path, watch: Monitor) -> None:
    spoil(run / "checkpoints" / "step-00000006" / "model.safetensors")
    before = contents(run / "checkpoints")
    code, said = watch(run, "--once", *SMALL)
    assert code == 3
    assert "update 6: damaged, left out" in said
    assert "model.safetensors is not what was written" in said
    assert figures(run / "monitor", 9)["gram_drift"]["previous"]["update"] == 3
    assert not (run / "monitor" / "step-00000006").exists()
    assert contents(run / "checkpoints") == before  # it is the trainer's to set it aside


@pytest.mark.parametrize("when", ["verified", "loaded", "its Gram teacher is read"])
def test_a_checkpoint_that_is_rotated_away_while_it_is_read(
    when: str, run: Path, watch: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = run / "checkpoints" / "step-00000006"

    def rotating(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any) -> Any:
            if gone.exists() and gone.name in str(words[0]):
                shutil.rmtree(gone.rename(gone.with_name(f".{gone.name}.tmp")))
            return function(*words)

        return call

    if when == "verified":
        monkeypatch.setattr(snapshots, "open_checkpoint", rotating(open_checkpoint))
    elif when == "loaded":
        monkeypatch.setattr(dinox_model, "load", rotating(dinox_model.load))
    else:
        teacher = snapshots.Opened.gram_teacher
        monkeypatch.setattr(snapshots.Opened, "gram_teacher", rotating(teacher))
    code, said = watch(run, "--once", *SMALL)
    assert code == 0
    assert "update 6: rotated away" in said
    assert not (run / "monitor" / "step-00000006" / "figures.json").exists()
    assert figures(run / "monitor", 9)["update"] == 9


def test_it_waits_where_memory_is_short(run: Path, watch: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    code, said = watch(run, "--once", *SMALL)
    assert code == 1
    assert "update 3 waits: a look takes 0.3 GiB of memory" in said


# ------------------------------------------------------------------------------------------ sets


def test_the_same_set_at_another_path(run: Path, looked: Path, watch: Monitor, small_set: Path) -> None:  # noqa: F811
    moved = Path(shutil.copytree(small_set, run.parent / "elsewhere"))
    assert watch(run, "--once", "--shards", moved, *SMALL)[0] == 0
    assert contents(run / "monitor") == contents(looked)


def test_another_set_is_refused_unless_it_is_named_so(run: Path, looked: Path, watch: Monitor) -> None:
    for step in (3, 6):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    other = write_fake_set(run.parent / "other", dict.fromkeys(range(20, 23), "train"))
    code, said = watch(run, "--once", "--shards", other, *SMALL)
    assert code == 2
    assert "it is another set" in said
    assert "--other-set looks through another set all the same" in said
    code, said = watch(run, "--once", "--shards", other, "--other-set", *SMALL)
    assert code == 0
    assert "patients that are NOT held out: there is no validation side" in said
    found = figures(run / "monitor", 9)
    assert (found["own_set"], found["held_out"], found["side"]) == (False, False, "all")
    with open_shards(other) as shards:
        assert found["sets"] == [shards.digest]
    (run / "monitor" / "step-00000009" / "figures.json").unlink()
    code, said = watch(run, "--once")
    assert code == 2
    assert "give another --output" in said
    words = [run, "--once", "--shards", other, other, "--other-set", "--output", run.parent / "two", "--slices", "1"]
    code, said = watch(*words)
    assert code == 0
    assert "the side has no more than 144 slices in runs of 4" in said


def test_a_run_that_goes_on_with_another_set(run: Path, looked: Path, watch: Monitor) -> None:
    shutil.copytree(looked, run / "monitor")
    old = run / "checkpoints" / "step-00000009"
    model, state = dinox_model.load(old), open_checkpoint(run / "checkpoints" / "step-00000006").state
    shutil.rmtree(old)
    (run / "monitor" / "step-00000006" / "figures.json").unlink()  # so that a set is open before it is another one
    save_checkpoint(run / "checkpoints", 9, teacher=model, tensors={}, state=state | {"shards": [["0" * 64, 1.0]]})
    code, said = watch(run, "--once")
    assert code == 2
    assert "update 9: the run went on with another set" in said


def test_as_many_sets_as_the_run_has(run: Path, watch: Monitor, small_set: Path) -> None:  # noqa: F811
    code, said = watch(run, "--once", "--shards", small_set, small_set)
    assert code == 2
    assert "names 2 sets, and the run has 1" in said


def test_a_damaged_set_is_an_error(run: Path, watch: Monitor, small_set: Path) -> None:  # noqa: F811
    moved = Path(shutil.copytree(small_set, run.parent / "spoilt"))
    shard = moved / "shard-000000.tar"
    data = np.frombuffer(shard.read_bytes(), np.uint8).copy()
    data[::97] ^= 1
    shard.write_bytes(data.tobytes())
    code, said = watch(run, "--once", "--shards", moved, *SMALL)
    assert (code, "error: " in said) == (1, True)


# ------------------------------------------------------------------------------------------ the process


def test_wrong_usage(run: Path, watch: Monitor, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = (["--other-set"], ["--gallery", "10"], ["--once", "--every", "3"], ["--threads", "0"])
    for words in ([run.parent / "nowhere"], *([run, *words] for words in wrong)):
        with pytest.raises(SystemExit) as ended:
            watch(*words)
        assert ended.value.code == 2
    capsys.readouterr()
    if not torch.cuda.is_available():
        assert watch(run, "--once", "--device", "cuda")[0] == 2


def test_a_network_without_cls_is_shown_by_its_patches(run: Path, watch: Monitor) -> None:
    old = run / "checkpoints" / "step-00000009"
    trained, state = dinox_model.load(old), open_checkpoint(old).state
    model = dinox_model.build(replace(trained.config, cls_token=False), seed=1)
    model.preprocess = trained.preprocess
    shutil.rmtree(run / "checkpoints")
    save_checkpoint(run / "checkpoints", 9, teacher=model, tensors={}, state=state)
    assert watch(run, "--once", *SMALL)[0] == 0
    found = figures(run / "monitor", 9)
    assert (found["embedding"], found["attention"]["of"]) == ("mean of patches", "patches")
    assert found["retrieval"] is not None
