"""A run from its command line: what it writes, how it resumes, what it refuses."""

import hashlib
import json
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dinox_model
from dinox_io import Batch, Loader, LoaderStalled, open_shards
from dinox_io.manifest import build_manifest, commit_set, read_manifest
from dinox_io.shard import ShardWriter, encode_volume
from dinox_train import micro_batch as micro_batch_module
from dinox_train import trainer as trainer_module
from dinox_train.__main__ import main, settled
from dinox_train.checkpoint import checkpoint_digest, list_checkpoints, open_checkpoint
from dinox_train.config import load_config
from dinox_train.fake import fake_volume, write_fake_set
from dinox_train.learner import Learner
from dinox_train.metrics import VARYING, read_lines

Train = Callable[..., int]


def lines(folder: Path) -> list[dict[str, object]]:
    """The lines of a run without what depends on the clock and the machine."""
    return [
        {key: value for key, value in line.items() if key not in VARYING}
        for line in read_lines(folder / "metrics.jsonl")
    ]


def tensors(folder: Path, update: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/step-{update:08d}"
    return {
        f"{file.stem}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_same_run(first: Path, second: Path, update: int) -> None:
    """Bit for bit: every line and every tensor of the last checkpoint."""
    assert lines(first) == lines(second)
    one, other = tensors(first, update), tensors(second, update)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_config: Path, small_set: Path) -> Path:
    """A run of 9 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["--config", str(small_config), f"data.shards={small_set}", f"run.folder={folder}"]) == 0
    return folder


def test_the_run_folder_holds_what_was_agreed(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "train.log", "heartbeat", "checkpoints", "report.html"} <= names
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-00000006", "step-00000009"]
    assert (whole / "heartbeat").read_text() == "9\n"
    assert json.loads((whole / "env.json").read_text())["filters"].startswith(("C (", "NumPy ("))
    assert {path.name for path in (whole / "pictures").iterdir()} == {"views.png", "patch_features.png"}
    assert "<html" in (whole / "report.html").read_text()
    assert "report.html: Too early to judge" in (whole / "train.log").read_text()


def test_metrics_have_one_line_an_update_with_every_field(whole: Path) -> None:
    found = read_lines(whole / "metrics.jsonl")
    assert [line["update"] for line in found] == list(range(1, 10))
    names = {
        *("update", "applied", "images", "views", "tokens", "epoch", "lr", "grad_norm", "images_per_s"),
        *("loss", "loss_dino", "loss_ibot", "loss_koleo", "loss_gram", "loss_val", "knn_z", "knn_label"),
        *("data_wait_fraction", "read_bytes", "decoded_bytes", "memory_bytes"),
        *(
            "cached_bytes",
            "copied_bytes",
            "read_s",
            "decode_s",
            "unfilter_s",
            "decoded_again",
            "loader_threads",
            "set_shares",
        ),
        *("teacher_entropy", "prototype_use", "feature_std", "effective_rank"),
    }
    for line in found:
        assert names <= line.keys()
        assert line["images"] == 4 * line["update"]
        assert line["views"] == 4 * 4 * line["update"]
        assert line["tokens"] == line["images"] * (2 * (4 + 5) + 2 * (1 + 5))
        assert (line["loss_val"] is not None) == (line["update"] in (4, 8, 9))
        assert (line["knn_z"] is not None) == (line["update"] in (4, 8, 9))
        assert line["set_shares"] == [1.0]
    assert found[-1]["decoded_bytes"] > 0


def test_a_checkpoint_is_a_model_that_encodes(whole: Path) -> None:
    model = dinox_model.load(whole / "checkpoints/step-00000009")
    hu = torch.full((1, 3, 40, 48), -850, dtype=torch.int16)
    features = dinox_model.encode(model, hu, torch.ones(1, 3))
    assert features.cls.shape == (1, 192)
    assert features.grid == (3, 3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, train: Train, accumulation: int) -> None:
    pieces = f"train.accumulation={accumulation}"
    assert train(tmp_path / "straight", pieces) == 0
    for updates in (2, 5, 9):
        assert train(tmp_path / "resumed", pieces, f"train.updates={updates}", "evaluate.every=100") == 0
    straight = [line | {"loss_val": None, "knn_z": None} for line in lines(tmp_path / "straight")]
    resumed = [line | {"loss_val": None, "knn_z": None} for line in lines(tmp_path / "resumed")]
    assert straight == resumed
    one, other = tensors(tmp_path / "straight", 9), tensors(tmp_path / "resumed", 9)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_accumulation_changes_no_figure_beyond_rounding(tmp_path: Path, train: Train, whole: Path) -> None:
    assert train(tmp_path / "pieces", "train.accumulation=4") == 0
    for one, other in zip(lines(whole), lines(tmp_path / "pieces"), strict=True):
        assert one["images"] == other["images"]
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_the_loss_goes_on_where_it_left_off_from_a_damaged_newest_checkpoint(
    tmp_path: Path, train: Train, whole: Path
) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.updates=6") == 0
    file = folder / "checkpoints/step-00000006/train/student.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert train(folder) == 0
    assert [line["loss"] for line in lines(folder)] == [line["loss"] for line in lines(whole)]
    assert "step-00000006.damaged" in {path.name for path in (folder / "checkpoints").iterdir()}
    assert "set aside" in (folder / "train.log").read_text()


def test_a_run_that_is_done_changes_nothing(whole: Path, train: Train) -> None:
    def state() -> dict[str, str]:
        files = [path for path in whole.rglob("*") if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = state()
    assert train(whole) == 0
    assert state() == before


def test_a_change_to_the_mathematics_is_refused_with_the_difference(
    whole: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(whole, "train.updates=12", "optimizer.learning_rate=0.1", "train.batch_size=8") == 2
    message = capsys.readouterr().err
    assert "optimizer.learning_rate: 0.001 -> 0.1" in message
    assert "train.batch_size: 4 -> 8" in message
    assert "run.init_from" in message


def test_init_from_takes_weights_and_nothing_else(
    whole: Path, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"run.init_from={whole / 'checkpoints/step-00000009'}"
    assert train(tmp_path / "new", start, "train.updates=1", "optimizer.learning_rate=1.0e-12") == 0
    found = lines(tmp_path / "new")
    assert [line["update"] for line in found] == [1]
    old = dinox_model.load(whole / "checkpoints/step-00000009")
    new = dinox_model.load(tmp_path / "new/checkpoints/step-00000001")
    for one, other in zip(old.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert train(tmp_path / "new", start, "train.updates=2", "optimizer.learning_rate=1.0e-12") == 0
    noted = [open_checkpoint(folder).state["began_with"] for folder in list_checkpoints(tmp_path / "new/checkpoints")]
    assert noted == [{"digest": checkpoint_digest(whole / "checkpoints/step-00000009")}] * 2
    assert open_checkpoint(whole / "checkpoints/step-00000009").state["began_with"] is None
    assert train(whole, start, "train.updates=12") == 2
    assert "another run.folder" in capsys.readouterr().err
    # Resumed without a word of it, the run still says whose weights it began with: whom those saw, it has seen.
    begun = load_config([tmp_path / "new/config.yaml"])
    resumed = begun.model_copy(update={"run": begun.run.model_copy(update={"init_from": None})})
    assert settled(resumed, begun).run.init_from == begun.run.init_from is not None


def test_the_resolved_config_is_in_the_run_and_reproduces_it(tmp_path: Path, whole: Path) -> None:
    assert main(["--config", str(whole / "config.yaml"), f"run.folder={tmp_path / 'again'}"]) == 0
    assert_same_run(whole, tmp_path / "again", 9)


def test_fake_data_needs_no_shards(tmp_path: Path, small_config: Path) -> None:
    arguments = ["--config", str(small_config), "data.shards=fake", f"run.folder={tmp_path}", "train.updates=1"]
    assert main(arguments) == 0
    assert len(lines(tmp_path)) == 1


def test_bf16_runs_and_is_another_result(tmp_path: Path, train: Train, whole: Path) -> None:
    assert train(tmp_path, "precision=bf16", "train.updates=1") == 0
    assert "bf16 asserted" in (tmp_path / "train.log").read_text()
    assert lines(tmp_path)[0]["loss"] != lines(whole)[0]["loss"]
    assert lines(tmp_path)[0]["loss"] == pytest.approx(lines(whole)[0]["loss"], rel=0.05)
    dtypes = {value.dtype for value in tensors(tmp_path, 1).values()}
    assert dtypes == {torch.float32}


def poison(monkeypatch: pytest.MonkeyPatch, updates: set[int]) -> None:
    """Make the views of the given updates (global batches from 0) not a number."""
    render = micro_batch_module.render_views

    def poisoned(
        images: torch.Tensor, plan: object, *rest: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        global_views, local_views = render(images, plan, *rest, **named)
        poisoned.calls += 1
        return (global_views * float("nan") if poisoned.calls in updates else global_views), local_views

    poisoned.calls = 0
    monkeypatch.setattr(micro_batch_module, "render_views", poisoned)


def test_a_non_finite_update_is_masked_and_told(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train(tmp_path, "train.updates=2", "checkpoint.every=1", "evaluate.every=100") == 0
    poison(monkeypatch, {1})
    assert train(tmp_path, "train.updates=3", "checkpoint.every=1", "evaluate.every=100", "checkpoint.keep_last=9") == 0
    found = lines(tmp_path)
    assert [line["applied"] for line in found] == [True, True, False]
    assert found[2]["loss"] is None
    before, after = tensors(tmp_path, 2), tensors(tmp_path, 3)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    record = json.loads((tmp_path / "masked_batches/update-00000003.json").read_text())
    assert len(record["volumes"]) == len(record["centers"]) == 4


def test_too_many_masked_updates_stop_the_run_with_code_4(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(3, 9)))
    assert train(tmp_path, "health.max_masked_updates=3", "evaluate.every=100") == 4
    assert [line["applied"] for line in lines(tmp_path)] == [True, True, False, False, False]
    assert (tmp_path / "checkpoints/step-00000005").is_dir()


def test_a_second_trainer_on_the_folder_is_refused(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinox_train.run import RunFolder

    with RunFolder(tmp_path).locked():
        assert train(tmp_path) == 1
    assert "another process trains" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["data.shards=nowhere"], "nowhere"),
        (["train.batch_size=4000"], "216"),
        (["device=cuda:7"], "device"),
        (["train.updates=0"], "train.updates"),
    ],
)
def test_what_cannot_run_is_an_error_in_words(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert train(tmp_path / "run", *arguments) in (1, 2)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert text in message


def test_a_loader_that_stalls_ends_the_run_with_code_5_and_a_checkpoint(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = trainer_module.Loader.__next__

    def stalls(self: Loader) -> Batch:
        if self.position >= 2:
            raise LoaderStalled("no batch came in 300 s")
        return take(self)

    monkeypatch.setattr(trainer_module.Loader, "__next__", stalls)
    assert train(tmp_path) == 5
    assert [line["update"] for line in lines(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints/step-00000002").is_dir()
    monkeypatch.undo()
    assert train(tmp_path, "train.updates=3") == 0


def test_damage_met_on_the_way_ends_the_run_after_a_checkpoint(
    tmp_path: Path, train: Train, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_shards(small_set) as shards, Loader(shards, batch_size=4) as loader:
        batches = [set(batch.volume.tolist()) for batch, _ in zip(loader, range(9), strict=False)]
        late = next(volume for batch in batches[3:] for volume in batch if not any(volume in b for b in batches[:3]))
        name = shards.volumes[late].id
    first = next(number for number, batch in enumerate(batches) if late in batch)

    damaged = tmp_path / "shards"
    shutil.copytree(small_set, damaged)
    shard = damaged / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        member = archive.getmember(f"{name}.hu16.zst")
    for place in range(member.offset_data, member.offset_data + member.size - 1000, 1000):
        data[place] ^= 16
    shard.write_bytes(data)

    assert train(tmp_path / "run", f"data.shards={damaged}") == 1
    said = capsys.readouterr().out
    assert name in said
    assert "shard-000000.tar" in said
    assert f"verify_shards.py {damaged} names all" in said
    assert f"--remove {name}" in said  # the patient's pseudonym, equal to the volume's in a made-up set
    # The loader reads ahead, and damage is told when it is met: not later than the batch that holds it.
    done = len(lines(tmp_path / "run"))
    assert done <= first
    assert (tmp_path / f"run/checkpoints/step-{done:08d}").is_dir()


def test_schedules_keep_the_length_of_the_first_run(tmp_path: Path, train: Train) -> None:
    """Null takes the first run's train.updates; a resumed run stops elsewhere on the same curve."""
    unset = ["schedule.updates=null", "evaluate.every=100"]
    assert train(tmp_path / "run", *unset, "train.updates=4") == 0
    assert train(tmp_path / "run", *unset, "train.updates=6") == 0
    assert train(tmp_path / "fixed", "schedule.updates=4", "evaluate.every=100", "train.updates=6") == 0
    rates = [[line["lr"] for line in lines(tmp_path / name)] for name in ("run", "fixed")]
    assert rates[0] == rates[1]
    assert rates[0][3:] == [1e-6] * 3
    assert train(tmp_path / "run", "schedule.updates=9", "train.updates=9") == 2


@pytest.mark.parametrize("accumulation", [1, 4])
def test_images_per_s_counts_updates_and_not_their_pieces(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    step = Learner.step

    def slow(self: Learner, *arguments: object) -> object:
        time.sleep(0.4)
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "step", slow)
    assert train(tmp_path, f"train.accumulation={accumulation}", "train.updates=2", "evaluate.every=100") == 0
    assert all(line["images_per_s"] < 4 / 0.4 for line in read_lines(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("left", ["train", "val"])
def test_the_test_side_is_never_opened(tmp_path: Path, train: Train, left: str) -> None:
    shards = write_fake_set(tmp_path / "shards", {0: left, 1: "test"})
    assert train(tmp_path / "run", f"data.shards={shards}", "train.updates=2", "evaluate.every=1") == 0
    assert "1 test volumes stay closed" in (tmp_path / "run/train.log").read_text()
    with Path(shards / "shard-000000.tar").open("r+b") as shard, tarfile.open(shards / "shard-000000.tar") as archive:
        member = archive.getmember(f"{fake_volume(1).id}.hu16.zst")
        shard.seek(member.offset_data)
        shard.write(bytes(member.size - 1000))  # a window of it would be an error now
    assert train(tmp_path / "run", f"data.shards={shards}", "train.updates=9", "evaluate.every=1") == 0
    assert all(line["loss_val"] is None for line in lines(tmp_path / "run"))


def test_a_set_without_a_validation_side_trains_on_all_and_reports_null(tmp_path: Path, train: Train) -> None:
    shards = write_fake_set(tmp_path / "shards", {0: "train", 1: "none"})
    assert train(tmp_path / "run", f"data.shards={shards}", "train.updates=1") == 0
    assert "all 2 volumes to train on" in (tmp_path / "run/train.log").read_text()
    assert lines(tmp_path / "run")[0]["knn_z"] is None


def test_a_set_of_test_volumes_only_is_refused(tmp_path: Path, train: Train) -> None:
    shards = write_fake_set(tmp_path / "shards", {0: "test"})
    assert train(tmp_path / "run", f"data.shards={shards}") == 2


def test_a_grown_set_is_trained_as_the_run_began(tmp_path: Path, train: Train) -> None:
    shards = write_fake_set(tmp_path / "shards", {0: "train", 1: "val"})
    assert train(tmp_path / "run", f"data.shards={shards}", "train.updates=2", "evaluate.every=100") == 0
    before = read_manifest(shards)
    writer = ShardWriter(shards / "shard-000001.tar", config_digest="test")
    added = fake_volume(2)
    writer.add(encode_volume(added))
    sides = {volume["id"]: volume["split"] for volume in before["volumes"]} | {added.id: "train"}
    grown = build_manifest(
        [writer.finish()],
        sides=sides,
        options={},
        rejected_by_code={},
        config_digest="test",
        leaks=[],
        packer="test",
        sources={"files": 0, "bytes": 0},
        previous=before,
    )
    commit_set(shards, grown)
    assert train(tmp_path / "run", f"data.shards={shards}", "train.updates=3", "evaluate.every=100") == 0
    assert "has grown since the run began" in (tmp_path / "run/train.log").read_text()
    assert json.loads((tmp_path / "run/env.json").read_text())["shards"][0]["digest"] == before["self"]
    other = write_fake_set(tmp_path / "other", {3: "train"})
    assert train(tmp_path / "run", f"data.shards={other}", "train.updates=4") == 2
