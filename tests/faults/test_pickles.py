"""F42: nothing that would have to be unpickled is read, also where its name and its hash are right."""

import ast
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from dinox_train.checkpoint import MANIFEST

pytestmark = pytest.mark.usefixtures("tiny_preset")


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("name", ["train/student.safetensors", "model.safetensors"])
def test_a_pickle_in_a_checkpoint_with_a_forged_manifest_never_runs(
    tmp_path: Path, train: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    assert train(run, "train.updates=1", "evaluate.windows=2") == 0
    checkpoint = run / "checkpoints/step-00000001"
    data = pickle.dumps(Trap(victim))
    (checkpoint / name).write_bytes(data)
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del manifest["self"]
    text = json.dumps(manifest, sort_keys=True, indent=1).encode()
    manifest["self"] = hashlib.sha256(text).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=1))

    capsys.readouterr()
    assert train(run) == 1
    assert name.rpartition("/")[2] in capsys.readouterr().err
    assert not victim.exists()
    pickle.loads(data)  # noqa: S301 (our own: it would have)
    assert victim.exists()


def test_no_module_unpickles_or_evaluates(repository: Path) -> None:
    found = []
    for package in ("dinox_io", "dinox_model", "dinox_train", "tools"):
        for file in sorted((repository / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                found += [f"{file.name}:{getattr(node, 'lineno', 0)} {what}" for what in unsafe(node)]
    assert found == []


def unsafe(node: ast.AST) -> list[str]:
    """Names of what a node uses and must not."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names if name.name.partition(".")[0] in ("pickle", "marshal", "shelve")]
    if isinstance(node, ast.ImportFrom):
        return [str(node.module)] if node.module in ("pickle", "marshal", "shelve") else []
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    return [called] if called in ("eval", "exec", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load") else []
