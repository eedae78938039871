"""docs/faults.md: every fault of a run stands in the table, and the tests that it names exist."""

import re
from pathlib import Path


def test_the_table_names_tests_that_exist(repository: Path) -> None:
    text = (repository / "docs/faults.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^\| (F\d\d) ", text, re.MULTILINE)
    assert numbers == [f"F{number}" for number in (*range(21, 46), 48)]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\(", (repository / file).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []
