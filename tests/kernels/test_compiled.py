"""Kernels compiled for GPUs that are not here: that reading machine code sees what it should, on a kernel of known
make; that a part of the table is what compiling gives; and the tool round it (all of the table: `.ci/run`).
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compile_kernels
import pytest
from kernel_table import table
from kernel_table.cells import Cell, everywhere, shipped
from kernel_table.proof import Row, faulty, prove, row_of
from kernel_table.search import bound, candidates

from dinox_model.kernels.compiled import Compiled, compile_launch
from dinox_model.kernels.language import INTERPRETED, triton
from tests.kernels.matrix_product import product_launch

NEEDS_INTERPRETER = False
pytestmark = pytest.mark.skipif(triton is None, reason="Triton is not installed (the extra [kernels])")
GOOD = Compiled(
    spills=0, registers=64, shared_bytes=65536, private_bytes=0, matrix={"v_wmma": 1}, loads=1, wide_loads=1,
    narrow_loads=0, shared_loads=0, hot_loop={},
)  # fmt: skip
COMPILE = """
import json, sys
from dataclasses import asdict
from dinox_model.kernels.compiled import compile_launch
from tests.kernels.matrix_product import product_launch
for arch, given in json.load(sys.stdin):
    launch = product_launch(**given)
    compiled = compile_launch(launch, arch)
    print(json.dumps({**asdict(compiled), "faults": compiled.faults(launch, arch)}))
"""


def compiled_apart(repository: Path, cache: Path, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The cases compiled in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", COMPILE]
    ran = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_what_is_read_from_machine_code(repository: Path, tmp_path: Path) -> None:
    instructions = {"gfx1151": "v_wmma", "gfx942": "v_mfma", "sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    small = {"size": 32, "warps": 2}
    cases = [(arch, {} if arch in ("sm_90", "sm_100") else small) for arch in instructions]
    cases += [("gfx1151", {"aligned": False}), ("sm_80", {"size": 128, "warps": 1})]
    *good, narrow, large = compiled_apart(repository, tmp_path, cases)
    for arch, one in zip(instructions, good, strict=True):
        assert all(name.startswith(instructions[arch]) for name in one["matrix"]), arch
        assert one["matrix"]
        assert one["registers"] > 16
        assert one["shared_bytes"] >= 32 * 32 * 2
        assert one["faults"] == []
        assert one["wide_loads"] == one["loads"] > 0
        assert bool(one["hot_loop"]) == arch.startswith("gfx")
        assert sum(one["matrix"].values()) >= one["hot_loop"].get("matrix", 0)
    assert narrow["narrow_loads"] == narrow["loads"] > 0
    assert narrow["spills"] > 0
    assert narrow["faults"] == [
        f"{narrow['spills']} spills",
        "no 128-bit loads",
        f"{narrow['loads']} loads of 16 bits or less",
    ]
    assert large["spills"] > 0
    assert large["faults"] == [f"{large['spills']} spills"]


@pytest.mark.parametrize(
    ("changes", "arch", "faults"),
    [
        ({}, "gfx1151", []),
        ({"shared_bytes": 65537}, "gfx1151", ["65537 bytes of shared memory, 65536 are there"]),
        ({"shared_bytes": 65537}, "sm_90", []),
        ({"spills": 2}, "gfx1151", ["2 spills"]),
        ({"matrix": {}}, "gfx1151", ["no matrix instructions"]),
        ({"wide_loads": 0}, "gfx1151", ["no 128-bit loads"]),
        ({"narrow_loads": 3}, "gfx1151", ["3 loads of 16 bits or less"]),
    ],
)
def test_the_rule(changes: dict[str, Any], arch: str, faults: list[str]) -> None:
    assert replace(GOOD, **changes).faults(product_launch(), arch) == faults
    elementwise = replace(GOOD, **changes).faults(product_launch(uses_dot=False), arch)
    assert elementwise == [one for one in faults if "shared" in one]


@pytest.mark.skipif(not INTERPRETED, reason="this process compiles")
def test_a_process_that_interprets_is_refused() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_launch(product_launch(), "sm_90")


def test_what_a_launch_must_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinox_model.kernels.compiled.INTERPRETED", False)
    names = ["left", "right", "out", "inner", "stride_left", "stride_right", "stride_out", "M", "N", "K"]
    launch = product_launch(function=SimpleNamespace(arg_names=names))
    with pytest.raises(ValueError, match="'sm_91' is none of gfx1151"):
        compile_launch(launch, "sm_91")
    with pytest.raises(ValueError, match="doesn't say left, right"):
        compile_launch(replace(launch, signature={}, aligned=()), "sm_90")
    with pytest.raises(ValueError, match="names outer, which it doesn't take"):
        compile_launch(replace(launch, aligned=("outer",)), "sm_90")


def sample() -> list[Cell]:
    """For each kernel, its first launch in bf16 (or in what it has), on Strix Halo and on an H100."""
    cells = sorted(everywhere(), key=lambda cell: (cell.kernel, cell.dtype != "bf16", cell.head_dim or 0))
    firsts = {(cell.kernel, cell.arch): cell for cell in reversed(cells) if cell.arch in ("gfx1151", "sm_90")}
    return list(firsts.values())


def test_a_part_of_the_table_is_what_compiling_gives(repository: Path) -> None:
    cells = sample()
    rows = prove(cells, 1, lambda row: None)
    assert faulty(rows) == []
    then, before = table.read(repository / "docs" / "kernels_table.json")
    if then == triton.__version__:
        names = set(map(str, cells))
        assert table.differences([row for row in before if table.named(row) in names], rows) == []


def test_the_table_has_every_launch_and_no_fault(repository: Path) -> None:
    _, rows = table.read(repository / "docs" / "kernels_table.json")
    assert [table.named(row) for row in rows] == list(map(str, everywhere()))
    assert faulty(rows) == []
    for row in rows:
        cell = Cell(row["kernel"], row["arch"], row["dtype"], row["head_dim"], tuple(sorted(row["facts"].items())))
        assert ("compiled" in row) == (cell in shipped(row["arch"])), cell


def test_the_document_shows_the_table(repository: Path) -> None:
    document = (repository / "docs" / "kernels.md").read_text("utf-8")
    version, rows = table.read(repository / "docs" / "kernels_table.json")
    assert table.documented(document, version, rows) == document


def row(**changes: Any) -> Row:
    cell = {"kernel": "product", "arch": "sm_90", "dtype": "bf16", "head_dim": 64, "facts": {"causal": True}}
    return {**cell, "tiles": {"num_warps": 4}, "compiled": {"spills": 0}, "faults": [], **changes}


def test_differences_of_two_tables() -> None:
    name = "sm_90 product bf16 head_dim 64 causal"
    assert table.differences([row()], [row()]) == []
    assert table.differences([row()], []) == [f"{name}: in the table, but no longer shipped"]
    assert table.differences([], [row()]) == [f"{name}: not in the table"]
    assert table.differences([row()], [row(compiled={"spills": 3})]) == [f"{name}: spills was 0, is 3"]
    assert table.differences([row()], [row(tiles={"num_warps": 8})]) == [
        f"{name}: tiles was {{'num_warps': 4}}, is {{'num_warps': 8}}"
    ]


def test_a_cell_that_nothing_covers_is_a_fault() -> None:
    lost = row_of(Cell("no_such_kernel", "sm_90", "bf16", None))
    assert faulty([lost]) == [
        "sm_90 no_such_kernel bf16: not shipped here, and tiles.json does not say what runs instead"
    ]


def test_candidates_of_a_search_and_their_bound() -> None:
    launch = product_launch(tiles=replace(product_launch().tiles, sizes={"BLOCK_M": 64, "K": 64}))
    tried = list(candidates(launch, "amd"))
    assert len(tried) == len(set(map(repr, tried))) == 4 * 2 * 2
    assert all(one.sizes["K"] == 64 for one in tried)
    assert bound({"matrix": 2, "vector": 32, "transcendental": 4, "shared": 8, "memory": 8}) == 0.5


class FakeCompiler:
    """Stands in the tool for children that compile: sources by cell, and which were compiled."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cells = [Cell("product", arch, "bf16", 64) for arch in ("gfx1151", "sm_90")]
        self.source = dict.fromkeys(self.cells, "0123")
        self.spills = dict.fromkeys(self.cells, 0)
        self.compiled: list[Cell] = []
        self.most = 99
        self.table = folder / "table.json"
        (folder / "kernels.md").write_text(f"# Kernels\n{table.BEGIN}\n{table.END}\n")
        for name, value in {
            "TABLE": self.table,
            "DOCUMENT": folder / "kernels.md",
            "everywhere": lambda: iter(self.cells),
            "sources": lambda cells, processes: [self.source[cell] for cell in cells],
            "prove": self.prove,
        }.items():
            monkeypatch.setattr(compile_kernels, name, value)

    def prove(self, cells: list[Cell], processes: int, tell: object, seconds: float) -> list[Row]:
        self.compiled = cells[: self.most]
        return [
            {
                **asdict(cell),
                "facts": {},
                "source": self.source[cell],
                "tiles": {},
                "compiled": {"spills": self.spills[cell], "registers": 9, "shared_bytes": 0, "matrix": {}},
                "faults": [f"{self.spills[cell]} spills"] * (self.spills[cell] > 0),
            }
            for cell in self.compiled
        ]


def test_only_what_changed_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCompiler(tmp_path, monkeypatch)
    first, second = fake.cells
    fake.most = 1  # the time is up
    assert compile_kernels.main([]) == 1
    assert "1 launches are not in the table yet" in capsys.readouterr().out
    assert compile_kernels.main([]) == 0
    assert fake.compiled == [second]
    assert "| product bf16 d64 | 9 r 0 s 0 K |" in (tmp_path / "kernels.md").read_text()
    assert compile_kernels.main([]) == 0
    assert fake.compiled == []
    fake.source[first], fake.spills[first] = "4567", 3
    assert compile_kernels.main([]) == 1
    assert fake.compiled == [first]
    assert "gfx1151 product bf16 head_dim 64: 3 spills" in capsys.readouterr().out
    assert compile_kernels.main([]) == 1  # what breaks the rule is not kept
    assert fake.compiled == [first]


def test_check_takes_what_changed_first_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeCompiler(tmp_path, monkeypatch)
    first, second = fake.cells
    compile_kernels.main([])
    assert compile_kernels.main(["--check"]) == 0
    assert set(fake.compiled) == {first, second}
    fake.source[second], fake.spills[second], fake.most = "4567", 2, 1
    assert compile_kernels.main(["--check", "--minutes", "1"]) == 1
    assert fake.compiled == [second]
    said = capsys.readouterr().out
    assert "1 launches from the same source as in the table were not compiled again" in said
    assert "sm_90 product bf16 head_dim 64: spills was 0, is 2" in said
    fake.most, fake.source[second] = 0, "89ab"
    assert compile_kernels.main(["--check"]) == 1
    assert "changed, and no time was left to compile it" in capsys.readouterr().out
    fake.most, fake.source[second], fake.spills[second] = 99, "0123", 0
    fake.cells.pop()
    assert compile_kernels.main(["--check"]) == 1
    assert "sm_90 product bf16 head_dim 64: in the table, but no longer shipped" in capsys.readouterr().out
    monkeypatch.setattr(compile_kernels.triton, "__version__", "0.1")
    assert compile_kernels.main(["--check"]) == 0
    assert "only the rule is checked" in capsys.readouterr().out


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_kernels.main(["--kernel", "no_such"]) == 2
    assert capsys.readouterr().err == "error: no kernel is shipped under this name, dtype and head_dim\n"
    with pytest.raises(SystemExit):
        compile_kernels.main(["--search"])
    assert "--search needs --kernel" in capsys.readouterr().err
