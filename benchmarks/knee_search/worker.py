"""One measurement in a process of its own: `python -m knee_search.worker REQUEST.json`, started by process.py.

Invariant: it ends with the process that started it, and its answer is a file that is whole or not there.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "@FOLDER"
"""In an override: the folder of the measurement."""
_PR_SET_PDEATHSIG = 1


def storage(request: dict[str, Any]) -> dict[str, Any]:
    """The storage alone; a slower one where it is asked for."""
    from knee_search import storage_rate

    _slow(request)
    return storage_rate.measure(**request["given"])


def decode(request: dict[str, Any]) -> dict[str, Any]:
    """The loader alone, on bytes that are there."""
    from knee_search import decode_rate

    _inflate(request)
    return decode_rate.measure(request["config"], request["overrides"], request["folder"], **request["given"])


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """What machine, network and set are like."""
    from knee_search import probe

    return probe.measure(request["config"], request["overrides"], request["folder"])


def compute(request: dict[str, Any]) -> dict[str, Any]:
    """The step alone, on a batch that is there."""
    from knee_search import compute_rate

    return compute_rate.measure_alone(request["config"], request["overrides"], request["folder"], **request["given"])


def beside(request: dict[str, Any]) -> dict[str, Any]:
    """The step and the loader, each alone and together."""
    from knee_search import compute_rate

    _inflate(request)
    return compute_rate.measure_beside(request["config"], request["overrides"], request["folder"], **request["given"])


def run(request: dict[str, Any]) -> dict[str, Any]:
    """A run of the trainer, as `python -m dinox_train` does it; whoever started it reads its metrics and kills it."""
    from dinox_train.__main__ import main

    _slow(request)
    _inflate(request)
    overrides = [one.replace(FOLDER, request["folder"]) for one in request["overrides"]]
    code = main(["--config", request["config"], *overrides])
    sys.exit(code or 1)  # one that ends by itself was not measured


def _slow(request: dict[str, Any]) -> None:
    if request["storage_mbps"]:
        from knee_search.slow_storage import slow_down

        slow_down(request["storage_mbps"] * 1e6)


def _inflate(request: dict[str, Any]) -> None:
    if request["inflation"] > 1 or request["copies"]:
        from knee_search.inflation import inflate_sets

        inflate_sets(request["inflation"], request["copies"])


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "probe": probe,
    "storage": storage,
    "decode": decode,
    "compute": compute,
    "beside": beside,
    "run": run,
}


def _die_with(parent: int) -> None:
    """Let the system kill this process when `parent`, which started it, dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the process that started this one is gone")


def main() -> None:
    """Measure what the request says, and write the answer."""
    faulthandler.enable()
    request = json.loads(Path(sys.argv[1]).read_text())
    _die_with(request["parent"])
    answer = KINDS[request["kind"]](request)
    file = Path(request["folder"]) / "answer.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer))
    temporary.replace(file)


if __name__ == "__main__":
    main()
