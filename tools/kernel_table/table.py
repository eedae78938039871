"""The compile table on disk: `docs/kernels_table.json` (a row a line, so that a change can be read) and the tables that
`docs/kernels.md` shows of it, between two marks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinox_model.kernels.architecture import ARCHITECTURES
from kernel_table.proof import Row, named

SCHEMA, VERSION = "dinox-compile-table", 1
BEGIN, END = "<!-- compile table: begin -->", "<!-- compile table: end -->"


def spelled(triton: str, rows: Sequence[Row]) -> str:
    """The JSON file's text."""
    lines = ",\n".join(json.dumps(row, sort_keys=True) for row in rows)
    head = f'{{"schema": "{SCHEMA}", "version": {VERSION}, "triton": "{triton}", "rows": [\n'
    return f"{head}{lines}\n]}}\n"


def read(file: Path) -> tuple[str, list[Row]]:
    """Triton's version and the rows. ValueError: it is no compile table of this version."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or (content.get("schema"), content.get("version")) != (SCHEMA, VERSION):
        raise ValueError(f"{file} is no compile table of version {VERSION}: make it anew with tools/compile_kernels.py")
    return content["triton"], content["rows"]


def differences(then: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """A line for each row that is new, gone, or not what it was. Both from the same Triton."""
    before, after = ({named(row): row for row in rows} for rows in (then, now))
    said = [f"{name}: in the table, but no longer shipped" for name in before.keys() - after.keys()]
    said += [f"{name}: not in the table" for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        said += [f"{name}: {changed}" for changed in _changes(_figures(before[name]), _figures(after[name]))]
    return sorted(said)


def _figures(row: Row) -> dict[str, Any]:
    return {"instead": row.get("instead"), "tiles": row.get("tiles"), **row.get("compiled", {})}


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]


def documented(document: str, triton: str, rows: Sequence[Row]) -> str:
    """`document` with what stands between the marks made anew. ValueError: it has no marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/kernels.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n{_markdown(triton, rows)}\n{END}{after}"


def _markdown(triton: str, rows: Sequence[Row]) -> str:
    compiled = sum("compiled" in row for row in rows)
    lines = [f"Triton {triton}: {compiled} launches compiled, {sum('instead' in row for row in rows)} replaced.", ""]
    lines += ["| kernel | " + " | ".join(ARCHITECTURES) + " |", "| --- |" + " --- |" * len(ARCHITECTURES)]
    for (kernel, dtype, width), group in _grouped(rows).items():
        name = " ".join([kernel, dtype, *([] if width is None else [f"d{width}"])])
        cells = [_cell([row for row in group if row["arch"] == arch]) for arch in ARCHITECTURES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, int | None], list[Row]]:
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"], row["head_dim"]), []).append(row)
    return groups


def _cell(rows: Sequence[Row]) -> str:
    """The worst of the launches that differ only in their facts."""
    if any("compiled" not in row and "instead" not in row for row in rows):
        return "**does not compile**"
    others = sorted({f"→ {row['instead']}" for row in rows if "instead" in row})
    figures = [row["compiled"] for row in rows if "compiled" in row]
    if not figures:
        return ", ".join(others)
    spills, registers = (max(one[name] for one in figures) for name in ("spills", "registers"))
    shared = max(one["shared_bytes"] for one in figures) / 1024
    matrix = sorted({_instruction(name) for one in figures for name in one["matrix"]})
    return ", ".join([f"{registers} r {spills} s {shared:.3g} K", *matrix, *others])


def _instruction(name: str) -> str:
    """v_wmma_f32_16x16x16_bf16 -> wmma, HGMMA.64x64x16.F32.BF16 -> HGMMA."""
    return name.removeprefix("v_").split("_")[0].split(".")[0]
