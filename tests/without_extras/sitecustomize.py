"""Makes the packages of the extras look as if they were not installed, in every Python process that has this folder on
its path: `DINOX_WITHOUT_EXTRAS=1` (tests/conftest.py).
"""

import sys

EXTRAS = {"gdcm", "jpeg_ls", "moto", "obstore", "openjpeg", "pylibjpeg", "tensorboard", "trackio", "triton", "wandb"}
EXTRAS |= {"webdataset"}


class Blocker:
    """Finds the extras first, and says that they are not there."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r} (tests without the extras)", name=name)


sys.meta_path.insert(0, Blocker())  # type: ignore[arg-type]
