"""Direct I/O: what was written comes back, counted and checked; every refusal is one clear line."""

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zo_offload.errors import StoreError
from zo_offload.offload import direct, disk
from zo_offload.offload.aio import PAGE, Aio
from zo_offload.offload.direct import DirectFile, Piece
from zo_offload.offload.disk import aligned, allocate
from zo_offload.ops import crc32c

SMALL = Aio(block_size=2 * PAGE, queue_depth=3)
FILE_BYTES = 40 * PAGE


def files(folder: Path, count: int = 1, num_bytes: int = FILE_BYTES) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"stripe{i}" for i in range(count)]
    allocate(paths, num_bytes)
    return paths


def filled(num_bytes: int, start: int = 0) -> torch.Tensor:
    """Bytes to write, ``start`` bytes after a page's begin."""
    data = aligned(num_bytes + start)[start:]
    data.copy_(torch.randint(1, 256, (num_bytes,), dtype=torch.uint8))
    return data


@pytest.fixture(scope="module")
def striped(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Files for one, two and three stripes."""
    return [files(tmp_path_factory.mktemp(f"{count}"), count) for count in (1, 2, 3)]


@given(
    sizes=st.lists(st.integers(0, 6 * PAGE + 9), min_size=1, max_size=3),
    count=st.integers(0, 2),
    blocks=st.integers(1, 5),
    stripe=st.integers(1, 5),
    start=st.sampled_from([0, 0, 1, 64]),
)
@settings(max_examples=40)
def test_what_was_written_is_read(striped, sizes, count, blocks, stripe, start):
    """Of any length, at any address, whatever the transfers and stripes."""
    aio, offsets, end = Aio(block_size=blocks * PAGE), [], 0
    for size in sizes:
        offsets.append(end)
        end += (size // PAGE + 2) * PAGE
    given_data = [filled(size, start) for size in sizes]
    paths = striped[count]
    file = DirectFile(paths, aio, writable=True, stripe_bytes=stripe * PAGE)
    written = file.write([Piece(*each) for each in zip(offsets, given_data, strict=True)])
    assert written.result() == [crc32c(each) for each in given_data]
    file.close()
    again = DirectFile(paths, Aio(block_size=PAGE), stripe_bytes=stripe * PAGE)
    found = [aligned(size + start)[start:] for size in sizes]
    read = again.read([Piece(*each) for each in zip(offsets, found, strict=True)])
    assert read.result() == written.result()
    assert all(torch.equal(*pair) for pair in zip(found, given_data, strict=True))
    assert again.bytes_read == file.bytes_written == sum(disk.padded(size) for size in sizes)
    again.close()


def test_memory_around_a_piece_is_left_alone(tmp_path: Path):
    file = DirectFile(files(tmp_path), SMALL, writable=True)
    file.write_now(Piece(0, filled(3 * PAGE)))
    room = torch.full_like(aligned(3 * PAGE), 7)
    file.read_now(Piece(0, room[100 : PAGE + 200]))
    assert (room[:100] == 7).all()
    assert (room[PAGE + 200 :] == 7).all()
    assert (room[100 : PAGE + 200] != 7).any()
    file.close()


def test_zeros_follow_to_the_page(tmp_path: Path):
    (path,) = files(tmp_path)
    file = DirectFile([path], SMALL, writable=True)
    file.write_now(Piece(0, filled(2 * PAGE)))
    file.write_now(Piece(0, filled(10)))
    file.sync()
    assert path.read_bytes()[10:PAGE] == bytes(PAGE - 10)
    file.close()


def test_stripes_take_turns(tmp_path: Path):
    paths = files(tmp_path, 2)
    file = DirectFile(paths, SMALL, writable=True, stripe_bytes=PAGE)
    data = torch.cat([torch.full((PAGE,), i, dtype=torch.uint8) for i in range(4)])
    file.write([Piece(0, data)]).result()
    assert [path.read_bytes()[: 2 * PAGE : PAGE] for path in paths] == [b"\0\2", b"\1\3"]
    assert file.where(3 * PAGE) == (paths[1], PAGE)
    file.close()


def test_files_are_private_and_have_their_room(tmp_path: Path):
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == FILE_BYTES
    assert path.stat().st_blocks * 512 >= FILE_BYTES


@pytest.mark.parametrize("num_bytes", [0, 1, PAGE, 3 * PAGE + 5, 2 << 20, (5 << 20) + 7])
def test_buffers_begin_at_a_page(num_bytes: int):
    buffer = aligned(num_bytes)
    assert buffer.shape == (num_bytes,)
    assert buffer.data_ptr() % PAGE == 0
    assert not buffer.any()


def test_too_large_a_buffer_is_refused():
    with pytest.raises(StoreError, match="host memory: no 1,152,921,504,606,846,976 bytes for"):
        aligned(1 << 60)


def without_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no direct I/O."""
    honest = fcntl.fcntl

    def refused(fd: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return honest(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refused)


def test_without_direct_the_cache_is_used_and_dropped(tmp_path, monkeypatch, caplog):
    without_direct(monkeypatch)
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: dropped.append(given[1:]))
    (path,) = files(tmp_path)
    with caplog.at_level(logging.WARNING):
        file = DirectFile([path], SMALL, writable=True)
    (message,) = caplog.messages
    assert message.startswith(f"{path}: this file system has no direct I/O")
    data, found = filled(3 * PAGE + 1), aligned(3 * PAGE + 1)
    file.write([Piece(0, data)]).result()
    file.sync()
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)]
    file.read([Piece(0, found)]).result()
    assert torch.equal(found, data)
    assert sorted(dropped[1:]) == [(at, 2 * PAGE, os.POSIX_FADV_DONTNEED) for at in (0, 2 * PAGE)]
    file.close()


def test_shared_memory_serves():
    """A tmpfs, direct or not as the kernel has it."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm")
    path = shm / f"zo-offload-{os.getpid()}"
    allocate([path], FILE_BYTES)
    try:
        file = DirectFile([path], SMALL, writable=True)
        data, found = filled(5 * PAGE), aligned(5 * PAGE)
        file.write([Piece(PAGE, data)]).result()
        file.sync()
        file.read([Piece(PAGE, found)]).result()
        file.close()
    finally:
        path.unlink()
    assert torch.equal(found, data)


def test_short_transfers_go_on(tmp_path, monkeypatch):
    """A signal or a busy device may end a call early, not at a page either."""
    for name in ("preadv", "pwritev"):
        honest: Callable[..., int] = getattr(os, name)

        def one(fd, views, offset, honest=honest):
            return min(honest(fd, [views[0][: 2 * PAGE]], offset), PAGE + 100)

        monkeypatch.setattr(os, name, one)
    file = DirectFile(files(tmp_path), Aio(block_size=8 * PAGE), writable=True)
    data, found = filled(7 * PAGE + 3), aligned(7 * PAGE + 3)
    file.write([Piece(0, data)]).result()
    file.read([Piece(0, found)]).result()
    assert torch.equal(found, data)
    file.close()


def test_a_file_cut_short_is_named(tmp_path: Path):
    (path,) = files(tmp_path)
    file = DirectFile([path], SMALL, writable=True)
    os.truncate(path, 3 * PAGE + 100)
    message = f"{path}: read 4,196 of 8,192 bytes at offset 8,192: the file has 12,388; it was cut"
    with pytest.raises(StoreError, match=message):
        file.read([Piece(0, aligned(4 * PAGE))]).result()
    with pytest.raises(StoreError, match="read 0 of 4,096 bytes at offset 163,840"):
        file.read([Piece(FILE_BYTES, aligned(PAGE))]).result()
    file.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_refused_writes_are_named(tmp_path, monkeypatch, number):
    """And the rest of the request is not tried."""
    (path,) = files(tmp_path)
    file = DirectFile([path], SMALL, writable=True)

    def refused(*given: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", refused)
    message = f"{path}: cannot write 8,192 bytes at offset .*{os.strerror(number)}; "
    with pytest.raises(StoreError, match=message) as caught:
        file.write([Piece(0, filled(4 * PAGE))]).result()
    assert str(caught.value).endswith(disk.MENDS[number])
    assert "\n" not in str(caught.value)
    file.close()


def test_a_full_device_is_named(monkeypatch):
    """The system's own answer: no space."""
    monkeypatch.setattr(direct, "open_direct", lambda path, _: (os.open(path, os.O_WRONLY), False))
    file = DirectFile([Path("/dev/full")], SMALL, writable=True)
    with pytest.raises(StoreError, match=r"/dev/full: cannot write .*No space left.*free some"):
        file.write([Piece(0, filled(PAGE))]).result()
    file.close()


def test_a_request_settles_when_its_memory_is_free(tmp_path, monkeypatch):
    """A failing transfer does not give memory back that another one still fills."""
    (path,) = files(tmp_path)
    file = DirectFile([path], SMALL, writable=True)
    failed, going = threading.Event(), threading.Event()
    honest = os.preadv

    def uneven(fd: int, views: list[memoryview], offset: int) -> int:
        if offset == 0:
            going.wait()
            failed.set()
            raise OSError(errno.EIO, "Input/output error")
        going.set()
        failed.wait()
        return honest(fd, views, offset)

    monkeypatch.setattr(os, "preadv", uneven)
    released = []
    future = file.read(
        [Piece(0, aligned(4 * PAGE))], release=lambda: released.append(file.bytes_read)
    )
    with pytest.raises(StoreError, match="Input/output error; the disk fails"):
        future.result()
    assert released == [2 * PAGE]  # the other half had arrived
    assert not future.cancel()
    file.close()


def test_a_failing_finish_fails_the_request(tmp_path: Path):
    file = DirectFile(files(tmp_path), SMALL, writable=True)

    def refuse(crcs: list[int]) -> None:
        raise StoreError("damaged")

    with pytest.raises(StoreError, match="damaged"):
        file.read([Piece(0, aligned(PAGE))], refuse).result()
    assert file.read([]).result() == []
    file.close()


def test_a_failed_sync_is_named(tmp_path, monkeypatch):
    paths = files(tmp_path, 2)
    file = DirectFile(paths, SMALL, writable=True)
    honest, second = os.fdatasync, os.stat(paths[1]).st_ino

    def failing(fd: int) -> None:
        if os.fstat(fd).st_ino == second:
            raise OSError(errno.EIO, "Input/output error")
        honest(fd)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(StoreError, match=f"{paths[1]}: cannot sync it: Input/output error"):
        file.sync()
    file.close()


def test_missing_and_odd_files_are_refused(tmp_path: Path):
    with pytest.raises(StoreError, match=r"absent: cannot open it: No such file.*moved"):
        DirectFile([tmp_path / "absent"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="pipe: not a regular file"):
        DirectFile([tmp_path / "pipe"])


def test_too_little_space_is_said_before_anything_is_made(tmp_path: Path):
    paths = [tmp_path / "a", tmp_path / "b"]
    found = os.statvfs(tmp_path)
    wanted = (found.f_bavail * found.f_frsize * 3 // 4) // PAGE * PAGE  # each would fit alone
    with pytest.raises(StoreError, match=f"{2 * wanted:,} bytes are needed, [0-9,]+ are free; "):
        allocate(paths, wanted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_space_that_goes_meanwhile_leaves_nothing_behind(tmp_path, monkeypatch, number):
    honest, made = os.posix_fallocate, []

    def second_fails(fd: int, start: int, length: int) -> None:
        made.append(fd)
        if len(made) == 2:
            raise OSError(number, os.strerror(number))
        honest(fd, start, length)

    monkeypatch.setattr(os, "posix_fallocate", second_fails)
    with pytest.raises(StoreError, match=f"b: cannot create a file.*{os.strerror(number)}"):
        allocate([tmp_path / "a", tmp_path / "b"], PAGE)
    assert not list(tmp_path.iterdir())


def test_without_preallocation_files_are_sparse(tmp_path, monkeypatch):
    def unsupported(*given: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    (path,) = files(tmp_path)
    assert path.stat().st_size == FILE_BYTES


def test_threads_are_depth_times_parallelism_within_reason():
    assert Aio().num_threads == 8
    assert Aio(queue_depth=2, intra_op_parallelism=3).num_threads == 6
    assert Aio(queue_depth=1024).num_threads == 64
