"""Pictures of a set of shards for people to look at: a contact sheet a volume, and pages of random windows."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def _writable(path: Path) -> bool:
    """Whether a folder can be written to, or made."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _give_matplotlib_a_folder() -> None:
    """Before matplotlib is imported: it warns, in every process, where it cannot write to the home folder."""
    if "MPLCONFIGDIR" in os.environ:
        return
    try:
        home = Path.home()
    except RuntimeError:  # nobody's home is known
        home = Path("/nonexistent")
    places = (("XDG_CONFIG_HOME", home / ".config"), ("XDG_CACHE_HOME", home / ".cache"))
    if all(_writable(Path(os.environ.get(name) or default) / "matplotlib") for name, default in places):
        return
    folder = tempfile.mkdtemp(prefix="preview-matplotlib-")
    os.environ["MPLCONFIGDIR"] = folder  # workers inherit it
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


_give_matplotlib_a_folder()
