"""Two runs at once, full disks, failing syncs, kill -9."""

import errno
import os
import signal
import stat
import subprocess
import sys

import pytest
from limits import at_most

from zo_offload.errors import JournalError
from zo_offload.journal import Journal, files
from zo_offload.journal import journal as journal_module

APPENDER = """
import sys
from zo_offload.journal import Journal, Probe, Record
with Journal.open(sys.argv[1], {"seed": 7}) as journal:
    while True:
        step = journal.next_step
        journal.append(Record(step, (Probe(0, 0.5, 1e-6),), (0.7, 0.6), eps=1e-3, lr=1e-6))
        print(step, flush=True)
"""

FORKER = """
import os, signal, sys
from zo_offload.journal import Journal
journal = Journal.open(sys.argv[1], {"seed": 7})
if os.fork() == 0:
    print("worker lives", flush=True)
    sys.stdin.read()  # until the test ends
    os._exit(0)
signal.pause()
"""


def system_error(number: int):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_second_run_is_refused_until_the_first_ends(path, header):
    with Journal.open(path, header):
        with pytest.raises(JournalError, match="another run has this journal"):
            Journal.open(path, header)
        assert len(Journal.read(path).records) == 0
    Journal.open(path, header).close()


def test_a_run_that_creates_at_the_same_time_is_refused(path, header, monkeypatch):
    def interrupted_by_a_rival(source, target):
        with pytest.raises(JournalError, match="another run has this journal"):
            Journal.open(path, header | {"seed": 8})
        rename(source, target)

    rename = os.rename
    monkeypatch.setattr(os, "rename", interrupted_by_a_rival)
    Journal.open(path, header).close()
    assert Journal.read(path).header.fields == header


def test_what_a_crash_left_aside_does_not_matter(path, header):
    aside = path.with_name("run.journal.new")
    aside.write_bytes(b"half a header" * 1000)
    aside.chmod(0o644)
    Journal.open(path, header).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not aside.exists()
    assert len(Journal.read(path).records) == 0


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_run(path):
    command = [sys.executable, "-c", FORKER, str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "worker lives\n"
        run.kill()
        run.wait()
        Journal.open(path, {"seed": 7}).close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failed_write_can_be_tried_again(path, header, make_record, monkeypatch, number):
    with Journal.open(path, header) as journal:
        journal.append(make_record(0))
        size = path.stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", system_error(number))
            words = f"cannot append step 1, 128 bytes at {size}: {os.strerror(number)}"
            with pytest.raises(JournalError, match=words):
                journal.append(make_record(1))
        assert journal.next_step == 1
        journal.append(make_record(1))
    assert len(Journal.read(path).records) == 2


def test_a_short_write_is_taken_back(path, header, make_record, monkeypatch):
    pwrite = os.pwrite
    with Journal.open(path, header) as journal:
        journal.append(make_record(0))
        size = path.stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:40], at))
            with pytest.raises(JournalError, match="wrote 40 of 128 bytes"):
                journal.append(make_record(1))
        assert path.stat().st_size == size
        assert journal.next_step == 1


def test_a_short_write_that_stays_is_repaired_by_opening(path, header, make_record, monkeypatch):
    pwrite = os.pwrite
    journal = Journal.open(path, header)
    journal.append(make_record(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:40], at))
        patch.setattr(os, "ftruncate", system_error(errno.EIO))
        with pytest.raises(JournalError, match="cannot cut a partly written record, step 1"):
            journal.append(make_record(1))
    with pytest.raises(JournalError, match="reopen the journal"):
        journal.append(make_record(1))
    journal.close()
    with Journal.open(path, header) as journal:
        assert journal.next_step == 1


def test_a_torn_tail_that_cannot_be_cut_off_stays(path, header, make_record, monkeypatch):
    with Journal.open(path, header) as journal:
        journal.append(make_record(0))
    torn = path.read_bytes() + b"\0" * 40
    path.write_bytes(torn)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", system_error(errno.EIO))
        words = f"^{path}: cannot cut off a torn tail of 40 bytes: Input/output error; look at its"
        with pytest.raises(JournalError, match=words):
            Journal.open(path, header)
    assert path.read_bytes() == torn
    with Journal.open(path, header) as journal:  # nor is the lock kept
        assert journal.next_step == 1


def test_a_disk_that_fails_is_named():
    """The memory of a process is a regular file to the system, which cannot be read at 0."""
    path = "/proc/self/mem"
    words = f"^{path}: cannot read the journal: Input/output error; look at its disk and its perm"
    with pytest.raises(JournalError, match=words):
        Journal.read(path)


def test_an_interrupted_append_can_be_tried_again(path, header, make_record, monkeypatch):
    pwrite = os.pwrite

    def interrupted(*args):
        pwrite(*args)
        raise KeyboardInterrupt

    with Journal.open(path, header) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.append(make_record(0, num_probes=2))
        journal.append(make_record(0))
        journal.append(make_record(1))
    assert list(Journal.read(path).records) == [make_record(0), make_record(1)]


def test_a_full_disk_leaves_a_valid_journal(path, header, make_record):
    with Journal.open(path, header) as journal, at_most(path.stat().st_size + 532):
        for step in range(4):
            journal.append(make_record(step))
        with pytest.raises(JournalError, match=r"step 4.* wrote 20 of 128 bytes"):
            journal.append(make_record(4))
    assert len(Journal.read(path).records) == 4


def test_a_full_disk_creates_no_journal(path, header, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", system_error(errno.ENOSPC))
        with pytest.raises(JournalError, match="cannot create the journal: No space left"):
            Journal.open(path, header)
    assert not path.exists()
    Journal.open(path, header).close()


def test_after_a_failed_sync_nothing_is_appended(path, header, make_record, monkeypatch):
    journal = Journal.open(path, header)
    journal.append(make_record(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", system_error(errno.EIO))
        with pytest.raises(JournalError, match=r"cannot sync .*Input/output error"):
            journal.sync()
    with pytest.raises(JournalError, match="reopen the journal"):
        journal.append(make_record(1))
    journal.close()
    Journal.open(path, header).close()


def test_sync_comes_by_itself_after_a_second(path, header, make_record, monkeypatch):
    now, synced = [100.0], []
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    with Journal.open(path, header) as journal, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: synced.append(journal.next_step))
        for step, now[0] in enumerate([100.5, 101.0, 101.1, 101.5, 102.2]):
            journal.append(make_record(step))
    assert synced == [2, 4], "in the appends at 101.1 and 102.2"


def test_closing_syncs_and_creating_syncs_file_and_directories(tmp_path, header, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    path = tmp_path / "new" / "run.journal"
    journal = Journal.create(path, header)
    assert synced == [str(tmp_path), f"{path}.new", str(path.parent)]
    journal.close()
    assert synced[3:] == [str(path)]


def test_a_read_only_directory_is_named(tmp_path, header, monkeypatch):
    monkeypatch.setattr(files.os, "open", system_error(errno.EACCES))
    path = tmp_path / "run.journal"
    with pytest.raises(JournalError, match=f"{path}: cannot create the journal: Permission denied"):
        Journal.open(path, header)


def test_a_directory_or_pipe_is_not_a_journal(tmp_path, header):
    os.mkfifo(tmp_path / "pipe")
    for open_it in (Journal.read, lambda path: Journal.open(path, header)):
        with pytest.raises(JournalError, match="not a regular file"):
            open_it(tmp_path / "pipe")
        with pytest.raises(JournalError, match=r"directory|not a regular file"):
            open_it(tmp_path)


def test_kill_9_loses_no_step_that_append_returned_from(path):
    acknowledged = -1
    for _ in range(3):
        command = [sys.executable, "-c", APPENDER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for _ in range(200):
                acknowledged = int(run.stdout.readline())
            run.send_signal(signal.SIGKILL)
            acknowledged = int(([str(acknowledged), *run.stdout.read().split()])[-1])
        assert len(Journal.read(path).records) > acknowledged
    with Journal.open(path, {"seed": 7}) as journal:
        assert [record.step for record in journal.records] == list(range(journal.next_step))


def test_a_live_writer_is_read(path):
    command = [sys.executable, "-c", APPENDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for _ in range(50):
            acknowledged = int(run.stdout.readline())
            assert len(Journal.read(path).records) > acknowledged
        run.kill()
