"""Runs contenders in another interpreter, round by round, as harness.Worker asks: `serve.py MODULE ARGUMENTS`.

MODULE is a file of this folder with `contenders(**arguments) -> {name: Setup}`, `versions() -> {package: version}` and,
if it has tables to make, `tables(**arguments) -> {name: function that returns JSON}`. One JSON object a line on stdin:
{"do": "list"}, {"do": "table", "name"}, {"do": "prepare", "name", "round_s"}, {"do": "round", "name"}; one in answer on
stdout, {"error"} where it failed.

Invariant: standard library only; what a package prints goes to stderr, so that stdout holds answers alone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from timing import TimedRun


class _Server:
    def __init__(self, module: Any, arguments: dict[str, Any]) -> None:
        self._versions = module.versions()
        self._setups = module.contenders(**arguments)
        self._tables = module.tables(**arguments) if hasattr(module, "tables") else {}
        self._ready: dict[str, TimedRun] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        match request:
            case {"do": "list"}:
                names = {"contenders": list(self._setups), "tables": list(self._tables)}
                return {"versions": self._versions, **names}
            case {"do": "table", "name": name}:
                return {"table": self._tables[name]()}
            case {"do": "prepare", "name": name, "round_s": round_s}:
                prepared = self._setups[name]()
                self._ready[name] = TimedRun(prepared.run, before=prepared.before)
                self._ready[name].warm_up(round_s)
                return {"facts": prepared.facts}
            case {"do": "round", "name": name}:
                return self._ready[name].round()._asdict()
        return {"error": f"unknown request {request}"}


def main() -> None:
    """Answer until stdin ends."""
    if len(sys.argv) != 3:
        wanted = set(sys.argv[1:]) & {"-h", "--help"}
        print(__doc__, file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    server = _Server(importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]))
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:  # whatever a peer raises is its answer; the others go on
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
