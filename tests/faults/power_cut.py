"""A power cut at any moment: every call that orders writes is recorded, and the disk after each of them rebuilt.

What a disk promises is little: a file holds what it held at its last fsync, a name is in its folder if the folder was
synced since; the rest may be there or not. `Recorder` keeps, before each such call, what is promised and what may be
there besides; `Moment.write` makes a folder of one of them.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, bytes | None]
"""Path below the root to content; None: a folder."""
CALLS = ("fsync", "fdatasync", "rename", "replace", "unlink", "rmdir", "mkdir")


@dataclass(frozen=True)
class Moment:
    """Before one call: the least that is on the disk, and the most with which content that was never synced is torn."""

    call: str
    promised: Tree
    torn: Tree
    zeroed: Tree
    whole: Tree

    def write(self, tree: Tree, folder: Path) -> None:
        folder.mkdir()
        for name, content in sorted(tree.items()):
            if content is None:
                (folder / name).mkdir(parents=True, exist_ok=True)
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)

    @property
    def variants(self) -> tuple[Tree, ...]:
        return self.promised, self.torn, self.zeroed, self.whole


class Recorder:
    """Watches a folder from its creation. Inodes stay open, so that none is used a second time."""

    def __init__(self, root: Path) -> None:
        self.root, self.moments = root, list[Moment]()
        self._kept: dict[int, int] = {}
        self._content: dict[int, bytes] = {}
        """What was synced of a file."""
        self._names: dict[int, dict[str, tuple[int, bool]]] = {}
        """What was synced of a folder: names, their inodes, and whether they are folders."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            try:
                yield
                self._note("end")
            finally:
                for descriptor in self._kept.values():
                    os.close(descriptor)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **named: Any) -> Any:
            path = None
            if name in ("fsync", "fdatasync"):
                path = Path(f"/proc/self/fd/{args[0]}").resolve()
            self._note(f"{name} {path or args[0]}")
            result = call(*args, **named)
            if path is not None:
                self._synced(args[0], path)
            return result

        return watched

    def _synced(self, descriptor: int, path: Path) -> None:
        inode = os.fstat(descriptor).st_ino
        if path.is_dir():
            entries = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
            self._names[inode] = entries
        else:
            self._content[inode] = path.read_bytes()

    def _note(self, call: str) -> None:
        promised, torn, zeroed, whole = Tree(), Tree(), Tree(), Tree()
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            try:
                inode = path.stat().st_ino
                if inode not in self._kept:
                    self._kept[inode] = os.open(path, os.O_RDONLY)
                content = None if path.is_dir() else path.read_bytes()
            except FileNotFoundError:
                continue
            whole[name] = content
            synced = self._content.get(inode, b"")
            if content is None or content == synced:
                torn[name] = zeroed[name] = content
                continue
            begin = synced if content.startswith(synced) else b""
            torn[name] = content[: (len(begin) + len(content)) // 2]
            zeroed[name] = begin + bytes(len(content) - len(begin))
        self._walk(self.root.stat().st_ino, "", promised)
        self.moments.append(Moment(call, promised, torn, zeroed, whole))

    def _walk(self, folder: int, prefix: str, tree: Tree) -> None:
        for name, (inode, is_folder) in self._names.get(folder, {}).items():
            tree[prefix + name] = None if is_folder else self._content.get(inode, b"")
            if is_folder:
                self._walk(inode, f"{prefix}{name}/", tree)
