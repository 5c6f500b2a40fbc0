"""The directory of a run: whose it is, and that one process works in it at a time."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from zo_offload import files, telemetry
from zo_offload.errors import ConfigError

FOUND = ("find_lr.json", "find_lr.png")
"""What a search for the learning rate leaves, beside which a run may begin."""


def what_is_asked(
    options: Mapping[str, Any], config: Mapping[str, Any], digests: Mapping[str, str]
) -> dict[str, Any]:
    """What makes a run this run and not another; where it goes is not part of it.

    Args:
        options: Of the command.
        config: The JSON.
        digests: Of what the options name.
    """
    asked = {**options, "config": config, **digests}
    del asked["output"]
    return json.loads(json.dumps(asked))


def holds(directory: Path, asked: Mapping[str, Any]) -> bool:
    """Whether the directory holds this run; False where it holds none.

    Raises:
        ConfigError: It cannot be used, holds another run, or what is no run.
    """
    record = directory / "run.json"
    try:
        entries = {path.name for path in directory.iterdir()} if directory.exists() else set()
        text = record.read_bytes() if record.name in entries else None
    except OSError as error:
        raise ConfigError(
            f"--output: cannot use {directory}: {error.strerror}"
            "; give a directory that this user may read and write"
        ) from error
    if text is None:
        if entries - {files.LOCK, record.name + files.ASIDE, *FOUND}:
            raise ConfigError(
                f"--output: {directory} is not empty and holds no run; choose another"
            )
        _refuse_journal(asked, directory)
        return False
    try:
        held = json.loads(text)
        journal = journal_path(held["config"], directory)
        with suppress(PermissionError):  # others may look at the run, if not at that
            journal.exists()  # or its name is none
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
        held, journal = None, journal_path({}, directory)
    if held is None and journal.exists():
        raise ConfigError(f"{record}: damaged; restore it, or choose another --output")
    if held == asked:
        return True
    if held is None or not _has_learnt(held, journal, directory):
        _refuse_journal(asked, directory)
        return False
    raise ConfigError(
        f"--output: {directory} holds another run: {next(_differences(held, asked))}; "
        "give the same command, or another --output"
    )


def _has_learnt(held: Mapping[str, Any], journal: Path, directory: Path) -> bool:
    """A run by backprop has no journal, and keeps what it found in its metrics."""
    return (directory / "metrics.csv" if held.get("first_order") else journal).exists()


def _refuse_journal(asked: Mapping[str, Any], directory: Path) -> None:
    path = journal_path(asked["config"], directory)
    if path.exists() and not asked.get("first_order"):  # which has none
        raise ConfigError(
            f"zeroth_order.journal.path: {path} exists already, from another run; choose another"
        )


def _differences(held: Any, asked: Any, path: str = "") -> Iterator[str]:
    if isinstance(held, dict) and isinstance(asked, dict):
        for key in {**asked, **held}:
            below = f"{path}.{key}" if path else key
            yield from _differences(held.get(key), asked.get(key), below)
    elif held != asked:
        yield f"{path} was {json.dumps(held)}, is now {json.dumps(asked)}"


@contextmanager
def claimed(directory: Path, asked: Mapping[str, Any]) -> Iterator[None]:
    """Make the directory this run's, and hold it alone meanwhile."""
    with ExitStack() as stack:
        try:
            files.make_directory(directory)
            stack.enter_context(files.locked(directory))
            if not holds(directory, asked):  # asked again: now nobody else writes here
                for name in ("metrics.csv", telemetry.NAME):
                    (directory / name).unlink(missing_ok=True)
                files.write_file(directory / "run.json", as_json(asked))
        except BlockingIOError:
            raise ConfigError(
                f"--output: another process is at work in {directory}; "
                "wait for it, or choose another"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"--output: cannot write {directory}: {error.strerror}"
                "; give a directory that this user may write"
            ) from error
        yield


def journal_path(config: Mapping[str, Any], directory: Path) -> Path:
    """Where a run's journal is: the JSON says, or in its directory."""
    path = ((config.get("zeroth_order") or {}).get("journal") or {}).get("path")
    return Path(path) if path else directory / "journal" / "run.journal"


def as_json(value: Any) -> bytes:
    """A file's content."""
    return (json.dumps(value, indent=1) + "\n").encode()
