"""The report: what a reader finds in it, for runs of every state; that it loads nothing and escapes everything."""

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinox_train.config import to_yaml, validate
from dinox_train.report import write_report

PROTOTYPES, BATCH = 1024, 32
VOID = {"meta", "img", "br", "path"}
PNG = b"\x89PNG\r\n\x1a\n" + b"not looked at any further"


def make_lines(updates: int, total: int, *, validation: bool = True, collapsed: bool = False) -> list[dict[str, Any]]:
    """Lines as the trainer writes them, of a run that learns or of one that collapsed."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(updates, 3)).tolist()
    uniform = math.log(PROTOTYPES)
    lines = []
    for update in range(1, updates + 1):
        first, second, third = noise[update - 1]
        learnt = 0.0 if collapsed else 1 - math.exp(-5 * update / total)
        loss = uniform * (1 - 0.5 * learnt) + 0.01 * first
        evaluates = validation and update % max(1, total // 4) == 0
        lines.append(
            {
                "update": update,
                "applied": True,
                "images": update * BATCH,
                "views": update * BATCH * 10,
                "epoch": update * BATCH // 3000,
                "loss": loss,
                "loss_dino": loss,
                "loss_ibot": None,
                "loss_koleo": None,
                "loss_gram": None,
                "lr": 1e-4 * math.cos(update / total),
                "grad_norm": math.exp(0.3 * second),
                "images_per_s": 40 + third,
                "data_wait_fraction": 0.02 + 0.001 * abs(third),
                "read_bytes": 10**6,
                "decoded_bytes": 3 * 10**6,
                "memory_bytes": 3 * 2**30,
                "teacher_entropy": 1 - 0.3 * learnt,
                "feature_std": 0.001 + 0.6 * learnt,
                "effective_rank": 1 + 20 * learnt,
                "prototype_use": (1 + 40 * learnt) / PROTOTYPES,
                "loss_val": loss + 0.1 if evaluates else None,
                "knn_z": 0.8 * learnt if evaluates else None,
                "knn_label": None,
            }
        )
    return lines


def make_run(
    folder: Path,
    lines: list[dict[str, Any]],
    total: int,
    events: list[dict[str, Any]] | None = None,
    *,
    folder_name: str = "runs/chest",
) -> Path:
    """A run folder with all its files; the report is not written yet."""
    config = {
        "run": {"folder": folder_name},
        "model": {"preset": "vit_s"},
        "train": {"updates": total, "batch_size": BATCH},
        "objective": {"prototypes": PROTOTYPES},
        "evaluate": {"every": max(1, total // 4)},
    }
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(validate(config)), encoding="utf-8")
    (folder / "env.json").write_text(json.dumps({"python": "3.11.9", "packages": {"torch": "2.13.0"}, "gpu": None}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = [{"update": 0, "event": "started", "text": "at update 0"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in started + (events or [])))
    return folder


class Page(HTMLParser):
    """Parses a page strictly: every element is closed by its own end tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)
        if self.open[-1:] in (["h1"], ["h2"], ["h3"]):
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def classes(self, tag: str) -> list[str]:
        return [attributes.get("class") or "" for name, attributes in self.tags if name == tag]


def report(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    lines = make_lines(400, 400)
    lines[99] |= {"applied": False, "loss": None, "loss_dino": None, "grad_norm": None}
    events = [
        {"update": 100, "event": "masked", "text": "update 100 had a non-finite loss or gradient and was not applied"},
        {"update": 250, "event": "resumed", "text": "at update 250"},
        {"update": 400, "event": "ended", "text": "done after update 400"},
    ]
    folder = make_run(tmp_path / "chest", lines, 400, events)
    for name in ("patch_features.png", "views.png", "another.png"):
        (folder / "pictures" / name).write_bytes(PNG)
    (folder / "pictures" / "torn.png").write_bytes(b"\x89PN")
    return folder


def test_the_parts_stand_in_their_order(done: Path) -> None:
    page = report(done)
    assert page.headings == [
        "chest",
        "Learning",
        "Loss",
        "Height of a slice, told from its features (knn_z)",
        "Speed",
        "Waiting for data",
        "Images per second",
        "Health",
        "Teacher entropy",
        "Feature std",
        "Effective rank",
        "Prototype use",
        "Optimizer",
        "Learning rate",
        "Gradient norm",
        "Events",
        "Pictures",
        "How it was made",
    ]
    assert [name for name, _ in page.tags].count("svg") == 10
    assert [a["alt"] for name, a in page.tags if name == "img"] == ["views", "patch_features", "another"]


def test_a_finished_run_says_so_with_its_figures(done: Path) -> None:
    page = report(done)
    for words in (
        "done",
        "update 400 of 400",
        "vit_s",
        "Healthy",
        "3.0 GiB",
        "2.13.0",
        "resumed",
        "update 250",
        "12,800",
    ):
        assert words in page.text, words
    assert "1 of 400 updates were not applied: 100." in page.text
    assert page.classes("path").count("resumed") == 1
    assert page.classes("path").count("skipped") == 2  # in the loss and in the gradient norm
    assert "prototypes: 1024" in page.text  # the configuration


def test_a_stopped_run_says_why_and_a_running_one_how_far_it_is(tmp_path: Path) -> None:
    events = [{"update": 150, "event": "ended", "text": "by signal 15 after update 150"}]
    stopped = report(make_run(tmp_path / "stopped", make_lines(150, 400), 400, events))
    assert "stopped" in stopped.text
    assert "update 150 of 400 · by signal 15 after update 150" in stopped.text
    events += [{"update": 150, "event": "resumed", "text": "at update 150"}]
    running = report(make_run(tmp_path / "running", make_lines(180, 400), 400, events))
    assert "running" in running.text
    assert "update 180 of 400" in running.text


def test_a_collapsed_run_is_called_so(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", make_lines(300, 400, collapsed=True), 400))
    assert "This run does not learn. The loss sits at ln K = 6.93" in page.text
    assert "verdict bad" in page.classes("p")
    assert page.classes("li").count("bad") == 3  # entropy, spread, rank; the loss is in the verdict


def test_a_single_line_and_an_empty_folder_make_a_page(tmp_path: Path) -> None:
    one = report(make_run(tmp_path / "one", make_lines(1, 400), 400))
    assert "Too early to judge" in one.text
    assert "The first evaluation comes at update 100." in one.text
    assert "verdict bad" not in one.classes("p")
    (tmp_path / "empty").mkdir()
    empty = report(tmp_path / "empty")
    assert "No update is done yet" in empty.text
    assert [name for name, _ in empty.tags].count("svg") == 0


def test_without_a_validation_side_the_page_says_why_there_is_no_curve(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", make_lines(200, 400, validation=False), 400))
    assert "the shards hold no validation side" in page.text
    assert "knn_z" not in page.text
    assert "loss on validation" not in page.text


def test_fields_that_are_missing_everywhere_leave_the_rest_alone(tmp_path: Path) -> None:
    lines = [{"update": line["update"], "loss": line["loss"]} for line in make_lines(200, 400)]
    page = report(make_run(tmp_path / "run", lines, 400))
    assert page.text.count("Not in the lines of this run.") == 4
    assert "The loss fell from" in page.text


def test_a_torn_last_line_is_ignored(done: Path) -> None:
    whole = report(done).html
    with (done / "metrics.jsonl").open("a") as file:
        file.write('{"update": 401, "lo')
    assert report(done).html == whole


def test_the_page_is_a_function_of_the_files(done: Path) -> None:
    first = write_report(done).read_bytes()
    assert write_report(done).read_bytes() == first
    names = sorted(path.name for path in done.iterdir())
    assert names == ["config.yaml", "env.json", "events.jsonl", "metrics.jsonl", "pictures", "report.html"]


def test_nothing_is_loaded_and_no_script_runs(done: Path) -> None:
    page = report(done)
    assert "http" not in page.html.replace("http-equiv", "")
    assert "//" not in re.sub(r"base64,[^\"]*", "", page.html).replace("<!--", "")
    assert "@import" not in page.html
    assert "url(" not in page.html
    names = {name for name, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "audio", "video", "base", "form"}
    for _, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset")]
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    policy = next(a["content"] for name, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_whatever_stands_in_a_file_stays_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(2)>&amp;'
    events = [{"update": 1, "event": evil, "text": evil}]
    name = "<b onclick=x>&"
    folder = make_run(tmp_path / name, make_lines(3, 400), 400, events, folder_name=evil)
    (folder / "env.json").write_text(json.dumps({evil: {evil: evil}}))
    (folder / "pictures" / '"><script>.png').write_bytes(PNG)
    page = report(folder)
    assert not {"script", "b onclick=x"} & {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert page.headings[0] == name
    assert page.text.count(evil) >= 4  # configuration, event, its text, environment


def test_a_long_run_is_thinned_and_quick(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", make_lines(20_000, 100_000), 100_000)
    begin = time.process_time()
    page = report(folder)
    # 100,000 lines in 5 s is a fifth of that for these; a slow machine gets three times as long.
    assert time.process_time() - begin < 3
    assert len(page.html) < 600_000
    curves = [a["d"] or "" for name, a in page.tags if name == "path" and "first" in (a.get("class") or "")]
    assert max(len(curve.split("L")) for curve in curves) <= 1000
    assert min(len(curve.split("L")) for curve in curves) > 100


def test_a_broken_line_in_the_middle_is_named(done: Path) -> None:
    text = (done / "metrics.jsonl").read_text().splitlines()
    text[6] = text[6][:40]
    (done / "metrics.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:7"):
        write_report(done)


def test_a_configuration_of_another_version_is_shown_all_the_same(done: Path) -> None:
    with (done / "config.yaml").open("a") as file:
        file.write("a_key_of_the_future: 3\n")
    page = report(done)
    assert "a_key_of_the_future: 3" in page.text
    assert "update 400" in page.text
