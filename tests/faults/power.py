"""A power cut: what was synced is there, and any part of the rest.

Of each file that has changed since it was synced, each sector of 512 bytes is old or new. Of the
names in a directory the changes since it was synced happened up to some one of them, as journaling
file systems have it: a name that is older than a sync of its directory is never lost.
"""

import os
import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.calls import CHANGES, NAMING, OPEN, SAVE, SYNCS, Call, Calls
from faults.mishaps import die, mixed

Listing = dict[str, tuple[int, bool]]  # of a directory: inode of each name, whether it is one


class Disk:
    """Watches folders, and cuts the power at a call.

    Args:
        roots: The folders; what lies in them when it begins is durable.
        at: The number of the call before which the power goes; 0 for never.
        chance: What is lost.
    """

    def __init__(self, roots: Sequence[str], at: int, chance: random.Random) -> None:
        self._roots = [Path(root).resolve() for root in roots]
        self._at = at
        self._chance = chance
        self._lock = threading.RLock()
        self._durable: dict[int, bytes] = {}  # by inode, as the next one
        self._listings: dict[int, list[Listing]] = {}
        self._held: dict[int, int] = {}  # open, so that no number of an inode is used again
        for root in self._roots:
            for path in [root, *root.rglob("*")]:
                self._synced(path)
        self.calls = Calls(roots, self._happens, CHANGES)

    def _happens(self, call: Call) -> Any:
        with self._lock:  # nothing moves while the power goes
            if call.number == self._at:
                self._cut()
                die()
            done = call.as_asked()
            path = Path(call.path)
            if call.name in SYNCS:
                self._synced(path)
            elif call.name in (*NAMING, OPEN, SAVE):
                self._renamed(path.parent)
                self._hold(path)
            return done

    def _synced(self, path: Path) -> None:
        if path.is_dir():
            self._listings[self._hold(path)] = [_listing(path)]
        elif path.is_file():
            self._durable[self._hold(path)] = path.read_bytes()

    def _renamed(self, folder: Path) -> None:
        if folder.is_dir():
            self._listings.setdefault(self._hold(folder), [{}]).append(_listing(folder))

    def _hold(self, path: Path) -> int:
        if not path.exists():
            return 0
        inode = path.stat().st_ino
        if inode not in self._held:
            self._held[inode] = os.open(path, os.O_PATH | os.O_CLOEXEC)
        return inode

    def _cut(self) -> None:
        found = {}
        for root in self._roots:
            for path in root.rglob("*"):
                if path.is_file():
                    found[path.stat().st_ino] = path.read_bytes()
        for root in self._roots:
            kept = self._tree(root, root.stat().st_ino, found)
            for path in root.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path, content in kept.items():
                if content is None:
                    path.mkdir(mode=0o700)
                else:
                    path.write_bytes(content)

    def _tree(self, folder: Path, number: int, found: dict[int, bytes]) -> dict[Path, bytes | None]:
        """What is left below a folder."""
        tree: dict[Path, bytes | None] = {}
        listing = self._chance.choice(self._listings.get(number, [{}]))
        for name, (inode, is_folder) in listing.items():
            path = folder / name
            if not is_folder:
                old = self._durable.get(inode, b"")
                tree[path] = mixed(old, found.get(inode, old), self._chance)
            else:
                tree |= {path: None, **self._tree(path, inode, found)}
        return tree


def _listing(folder: Path) -> Listing:
    return {
        entry.name: (entry.inode(), entry.is_dir(follow_symlinks=False))
        for entry in os.scandir(folder)
    }
