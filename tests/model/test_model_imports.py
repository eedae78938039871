"""The network runs on a machine that has torch and numpy and nothing else of ours or of PyPI's."""

import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = textwrap.dedent(
    """
    import importlib.metadata, re, sys
    import torch, numpy

    # What torch itself needs may be imported by torch at any time.
    needed, todo = {"torch", "numpy", "functorch", "torchgen"}, ["torch", "numpy"]
    while todo:
        for line in importlib.metadata.requires(todo.pop()) or []:
            name = re.match(r"[A-Za-z0-9_.-]+", line).group()
            if "extra ==" not in line and name.lower().replace("-", "_") not in needed:
                needed.add(name.lower().replace("-", "_"))
                try:
                    importlib.metadata.requires(name)
                    todo.append(name)
                except importlib.metadata.PackageNotFoundError:
                    pass

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in needed or top == "dinox_model":
                return None
            raise ModuleNotFoundError(f"{name} is not torch, numpy or the standard library", name=name)

    sys.meta_path.insert(0, Blocker())
    import dinox_model
    model = dinox_model.build(dinox_model.ViTConfig(width=16, num_layers=1, num_heads=1, mlp_hidden=16))
    features = dinox_model.encode(model, numpy.zeros((1, 3, 20, 20), dtype=numpy.int16), numpy.ones((1, 3)))
    dinox_model.PrototypeHead(16, 8, 4, 12)(features.cls)
    assert not {"safetensors", "dinox_io", "dinox_train"} & set(sys.modules)
    try:
        dinox_model.save(model, "never-written")
    except ModuleNotFoundError as error:
        print("blocked:", error.name)
    """
)


def test_torch_and_numpy_are_enough(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "blocked: safetensors", "the blocker must work, and safetensors is what save needs"
    assert list(tmp_path.iterdir()) == []
