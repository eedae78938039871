"""The report: what a reader finds in it, for runs of every state; that it loads nothing and escapes everything."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dinox_train.metrics import object_of
from dinox_train.report import Report, tail, write_report
from dinox_train.report.timeline import alarms_on, lasting
from tests.train.report_run import PNG, look, make_lines, make_run, reading, write_lines

VOID = {"meta", "img", "br", "path"}


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
        "Health",
        "Teacher entropy",
        "Feature std",
        "Effective rank",
        "Prototype use",
        "Optimizer",
        "Learning rate",
        "Gradient norm",
        "Speed",
        "Waiting for data",
        "Images per second",
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
    # In the loss, knn_z, four of health, and the gradient norm; speed shows resumptions only.
    assert page.classes("path").count("resumed") == 7 + 2
    assert page.classes("path").count("skipped") == 7
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
    assert page.classes("li").count("bad") == 4  # entropy, spread, rank, prototypes; the loss is in the verdict


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
    assert page.text.count("Not in the lines of this run.") == 8
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


def test_a_long_run_is_thinned_and_a_page_again_costs_what_is_new(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "long", make_lines(20_000, 100_000), 100_000)
    written = Report(folder)
    begin = time.process_time()
    written.write()
    # 100,000 lines in 5 s is a fifth of that for these; a slow machine gets three times as long.
    first_s = time.process_time() - begin
    assert first_s < 3
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(make_lines(1, 400)[0] | {"update": 20_001}) + "\n")
    begin = time.process_time()
    written.write()
    assert time.process_time() - begin < first_s / 2
    page = Page(folder / "report.html")
    assert "update 20,001" in page.text
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


def test_the_machine_is_shown_by_what_could_be_read(done: Path) -> None:
    samples = [reading(update, gpu_throttled=update > 300, gpu_clock_mhz=2000.0) for update in range(0, 400, 10)]
    write_lines(done / "system.jsonl", samples)
    page = report(done)
    start = page.headings.index("Machine")
    assert page.headings[start : start + 6] == [
        *("Machine", "Busy", "Temperature", "GPU clock", "Host memory"),
        "Events",
    ]
    assert "throttled in 22 % of the readings" in page.text


def test_a_broken_file_beside_the_run_is_named_and_the_rest_is_there(done: Path) -> None:
    (done / "system.jsonl").write_text("no JSON\n" + json.dumps(reading(5)) + "\n")
    (done / "monitor" / "step-00000005").mkdir(parents=True)
    (done / "monitor" / "step-00000005" / "figures.json").write_text("[1]")
    page = report(done)
    assert "system.jsonl:1: not a JSON object" in page.text
    assert "figures.json: not the figures of a monitor" in page.text
    assert not {"Machine", "Monitor"} & set(page.headings)
    assert "Healthy" in page.text


def test_alarms_stand_at_the_top_while_they_last_in_the_timeline_and_in_the_charts(tmp_path: Path) -> None:
    events = [
        {"update": 120, "event": "alarm", "alarm": "rank_low", "text": "rank_low: few directions. Lower it."},
        {"update": 180, "event": "alarm over", "alarm": "rank_low", "text": "rank_low: 12 again"},
        {"update": 200, "event": "throttling", "text": "the clock is held down"},
        {"update": 220, "event": "rollback", "text": "back to update 150"},
        {"update": 300, "event": "alarm", "alarm": "knn_z_falls", "text": "knn_z_falls: worse and worse"},
    ]
    folder = make_run(tmp_path / "run", make_lines(400, 800), 800, events)
    write_lines(folder / "system.jsonl", [reading(update) for update in range(0, 400, 10)])
    page = report(folder)
    on = [words for words in page.words if words.startswith("Since update")]
    assert on == [
        "Since update 200: throttling: the clock is held down",
        "Since update 300: alarm: knn_z_falls: worse and worse",
    ]
    assert "Worth a look: since update 200 not all is well." in page.text
    assert page.classes("div")[-5:] == ["lane alarm", "lane alarm", "lane alarm", "lane grave", "lane scale"]
    for words in ("alarm: rank_low", "alarm: knn_z_falls", "went back", "Lower it."):
        assert words in page.text, words
    # Two of the run in each of its seven charts with marks (no evaluation here is beyond), one in those of the machine.
    assert page.classes("path").count("alarm") == 2 * 7 + 3
    assert page.classes("path").count("back") == 7


def test_a_process_ends_the_concerns_of_the_one_before_and_not_its_alarms() -> None:
    alarm = {"update": 20, "event": "alarm", "alarm": "rank_low", "text": "rank_low: few"}
    events = [
        {"update": 10, "event": "throttling", "text": "the clock is held down"},
        alarm,
        {"update": 15, "event": "resumed", "text": "at update 15"},
    ]
    assert alarms_on(events) == [alarm]
    assert lasting(events, 50) == [("alarm", "alarm: rank_low", [(20, 50)]), ("throttling", "throttling", [(10, 15)])]


def test_the_digest_and_where_the_time_goes_are_shown(tmp_path: Path) -> None:
    lines = make_lines(200, 400)
    for line in lines:
        line |= {"images_per_s": 32.0, "stage_s": {"wait": 0.1, "student": 0.5, "save": 0.0}}
        line |= {"model_flops_utilisation": 0.4, "patch_similarity": 0.5, "knn_label": 0.8}
        line |= {"shortcut_accuracy": 0.3, "shortcut_chance": 0.25, "shortcut_name": "manufacturer"}
    folder = make_run(tmp_path / "run", lines, 400)
    (folder / "digest.txt").write_text("DINOX run: daily <b>\nalarm: none\n")
    page = report(folder)
    assert "DINOX run: daily <b>" in page.text
    for words in ("student 50 %", "wait 10 %", "the rest 40 %", "1 s an update", "Whether manufacturer of a scan"):
        assert words in page.text, words
    assert "save" not in page.text.split("Where the time")[1].split("Waiting for data")[0].replace("saves", "")
    expected = {"Patch similarity", "Shortcut", "Model FLOP utilisation", "Labels, told from features (knn_label)"}
    assert expected <= set(page.headings)


def test_what_a_monitor_found_is_shown_of_the_newest_and_over_time(done: Path) -> None:
    written = Report(done)
    look(done, 100, 0.3)
    written.write()
    look(done, 200, 0.7)
    page = Page(written.write())
    assert {"Monitor", "A view finds its slice", "Gram drift"} <= set(page.headings)
    assert "2 checkpoints so far, the newest of update 200. The slices are of patients that the run never" in page.text
    assert "0.700 (0.600–0.800)" in page.text
    assert "0.125 (0.600–0.800)" in page.text  # before training
    assert [a["alt"] for name, a in page.tags if name == "img"][:2] == ["pca", "pca_over_time"]
    look(done, 200, 0.6)  # looked at anew
    assert "0.600 (0.500–0.700)" in Page(written.write()).text


def test_a_page_that_is_written_again_is_the_page_of_the_files(done: Path) -> None:
    every, events = make_lines(400, 400), (done / "events.jsonl").read_text().splitlines(keepends=True)
    written = Report(done)
    write_lines(done / "metrics.jsonl", every[:0])
    for end in (0, 1, 50, 333, 400):
        write_lines(done / "metrics.jsonl", every[:end])
        (done / "events.jsonl").write_text("".join(events[: 1 + end // 200]))
        write_lines(done / "system.jsonl", [reading(update) for update in range(0, end, 7)])
        page = written.write().read_bytes()
        assert page == write_report(done).read_bytes()
    assert written.verdict().startswith("Healthy")


def test_a_process_that_resumes_reads_on(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_train.report.history.EVERY_BYTES", 100_000)
    read: list[int] = []

    def counted(path: Path, number: int, line: bytes) -> dict[str, Any]:
        read.extend([number] * (path.name == "metrics.jsonl"))
        return object_of(path, number, line)

    monkeypatch.setattr(tail, "object_of", counted)
    lines, kept = make_lines(900, 1000), done / ".report.npz"
    lines[5]["applied"], lines[6]["shortcut_name"] = False, "manufacturer"

    def page_of(end: int, first: int) -> bytes:
        """With so many lines: the page is that of the files, and no line before `first` was read for it."""
        write_lines(done / "metrics.jsonl", lines[:end])
        read.clear()
        page = write_report(done).read_bytes()
        assert read == list(range(first, end + 1))
        before = kept.read_bytes()
        kept.unlink()
        assert write_report(done).read_bytes() == page
        kept.write_bytes(before)
        return page

    page_of(600, 1)
    page_of(650, 601)
    kept_at_600 = kept.read_bytes()
    page_of(900, 601)
    assert kept.read_bytes() != kept_at_600
    page_of(700, 1)  # cut back to before what was kept, as by a rollback
    kept.write_bytes(b"damaged")
    page_of(710, 1)


def test_pictures_that_are_too_large_are_named(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_train.report.pictures.MOST_BYTES", 40)
    (done / "pictures" / "views.png").write_bytes(PNG + b"x" * 40)
    page = report(done)
    assert "views.png is too large for this page" in page.text
    assert [a["alt"] for name, a in page.tags if name == "img"] == ["patch_features", "another"]


def test_many_events_are_cut_and_said_to_be(tmp_path: Path) -> None:
    events = [{"update": 1 + n // 30, "event": f"kind {n % 40}", "text": "x" * 2000} for n in range(9_000)]
    page = report(make_run(tmp_path / "run", make_lines(300, 400), 400, events))
    assert "… 8,941 events between these are in events.jsonl …" in page.text
    assert len(page.html) < 500_000
    assert page.classes("div").count("lane plain") == 16
