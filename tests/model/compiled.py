"""One network compiled into a `.pt2`, once a session: compiling takes most of the time of the tests that need one."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import dinox_model
from dinox_model import Preprocess, VisionTransformer
from dinox_model.__main__ import main
from dinox_model.export import check_compiler
from dinox_model.package import PackageError
from tests.model.foreign_weights import SMALL, perturbed

SIZE = (48, 64)
PREPROCESS = Preprocess(level_hu=40.0, width_hu=400.0, mean=0.4, std=0.3, depth=3, step=1)


@dataclass(frozen=True)
class Compiled:
    """A network, its folder, and the folder of its export."""

    model: VisionTransformer
    network: Path
    folder: Path

    @property
    def path(self) -> Path:
        """Of the package."""
        return self.folder / "model.pt2"


_made: list[Compiled] = []


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Made by the command itself. Skips where there is no C++ compiler."""
    if not _made:
        try:
            check_compiler()
        except PackageError as error:
            pytest.skip(str(error))
        model = perturbed(SMALL)
        model.preprocess = PREPROCESS
        folder = tmp_path_factory.mktemp("compiled")
        dinox_model.save(model, folder / "network")
        command = ["export", str(folder / "network"), "--format", "pt2", "--size", "48,64"]
        assert main([*command, "--output", str(folder / "pt2")]) == 0
        _made.append(Compiled(model, folder / "network", folder / "pt2"))
    return _made[0]
