"""A power cut: what was written after the last sync is there in part, page by page, or not."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from offload.common import SIZES, created, folders, opened, read, write
from zo_offload.offload.aio import PAGE


@dataclass
class Disk:
    """Files as the disk has them: what is durable, and the pages that may still be lost."""

    images: dict[str, bytearray]
    loose: list[tuple[str, int, bytes]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        honest_write, honest_sync = os.pwritev, os.fdatasync

        def pwritev(fd: int, views: list[memoryview], offset: int) -> int:
            written = honest_write(fd, views, offset)
            data = b"".join(views)[:written]
            name = os.readlink(f"/proc/self/fd/{fd}")
            for at in range(0, written, PAGE):
                self.loose.append((name, offset + at, data[at : at + PAGE]))
            return written

        def fdatasync(fd: int) -> None:
            name, before = os.readlink(f"/proc/self/fd/{fd}"), list(self.loose)
            honest_sync(fd)
            for page in before:
                if page[0] == name:
                    self._store(page)
                    self.loose.remove(page)

        with mock.patch("os.pwritev", pwritev), mock.patch("os.fdatasync", fdatasync):
            yield

    def cut(self, chance: random.Random) -> None:
        """Write to the files what is left of them."""
        for page in self.loose:
            if chance.random() < 0.5:
                self._store(page)
        for name, image in self.images.items():
            Path(name).write_bytes(image)

    def _store(self, page: tuple[str, int, bytes]) -> None:
        name, offset, data = page
        self.images[name][offset : offset + PAGE] = data


@given(
    acts=st.lists(st.sampled_from(["sync", *SIZES, *SIZES, *SIZES]), min_size=1, max_size=25),
    count=st.integers(1, 2),
    chance=st.randoms(use_true_random=False),
)
@settings(max_examples=25)
def test_what_was_synced_is_there(acts: list, count: int, chance: random.Random):
    """No unit is older than at the last sync, none is torn, and the run goes on from there."""
    with tempfile.TemporaryDirectory() as folder:
        places = created(Path(folder, "run"), count)
        with opened(places) as store:
            for index in SIZES:
                write(store, index, step=0)
        names = [str(place / "units.bin") for place in places]
        disk = Disk({name: bytearray(Path(name).read_bytes()) for name in names})
        newest, durable = dict.fromkeys(SIZES, 0), dict.fromkeys(SIZES, 0)
        store = opened(places)
        with disk.watching():
            for step, act in enumerate(acts, 1):
                if act == "sync":
                    store.sync()
                    durable = dict(newest)
                else:
                    write(store, act, step)
                    newest[act] = step
        shutil.copytree(Path(folder, "run"), Path(folder, "cut"))
        disk.images = {name.replace("/run/", "/cut/"): image for name, image in disk.images.items()}
        disk.loose = [(name.replace("/run/", "/cut/"), at, page) for name, at, page in disk.loose]
        disk.cut(chance)
        with opened(folders(Path(folder, "cut"), count)) as after:
            assert after.missing == []
            found = {index: read(after, index) for index in SIZES}
            assert all(durable[i] <= found[i] <= newest[i] for i in SIZES)
            for index in SIZES:
                write(after, index, step=99)
        store.close()
