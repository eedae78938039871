"""Packs every case of the ground truth alone and prints what happened as a Markdown table; exit code 1 if any is wrong.

    python -m tests.io.case_table SHARED_DATA > cases.md

SHARED_DATA is the folder of expected.json.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.io.ground_truth import behaves, packed


def main(shared_data: Path) -> int:
    """Print the table; 0 if every case behaves as its `expect` says."""
    print("| case | expect | what happened | files | as expected |\n|---|---|---|---|---|")
    wrong = 0
    for case in json.loads((shared_data / "expected.json").read_text())["cases"]:
        with tempfile.TemporaryDirectory() as folder:
            digests, files, exit_code = packed(case, shared_data, Path(folder) / "out")
        right = behaves(case, digests, files, exit_code)
        wrong += not right
        happened = [f"`{digest[:12]}`" for digest in digests] + [f"{code} ({count})" for code, count in files.items()]
        verdict = "yes" if right else "**NO**"
        print(
            f"| {case['id']} | {case['expect']} | {', '.join(happened)} | {case['n_files']} | {verdict} |", flush=True
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "expected.json").is_file():
        sys.exit("usage: python -m tests.io.case_table SHARED_DATA (the folder of expected.json)")
    sys.exit(main(Path(sys.argv[1])))
