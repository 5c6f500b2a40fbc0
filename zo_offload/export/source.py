"""What can be exported: a run's directory, a checkpoint's tag, or a delta that was exported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo_offload import checkpoint
from zo_offload.config import load_json
from zo_offload.errors import ConfigError
from zo_offload.export.delta import INDEX
from zo_offload.run_directory import journal_path


@dataclass(frozen=True)
class Source:
    """Where trained weights come from.

    Attributes:
        directory: Of the run, or of the tag.
        base: Model that it began with, where that is known.
        journal: Its record; None where backprop trained.
        config: Its JSON, where that is known.
        model: What it has exported itself, where it is finished.
        run: What was asked for (``run.json``); of a tag nothing.
        summary: What was found (``summary.json``); of a run that was stopped nothing.
    """

    directory: Path
    base: str | None
    journal: Path | None
    config: Mapping[str, Any] | None = None
    model: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


def is_delta(directory: Path) -> bool:
    """Whether a delta was exported to a directory.

    Example:
        >>> is_delta(Path("no/such/directory"))
        False
    """
    return (directory / INDEX).is_file()


def find_source(directory: Path, base: str | None = None) -> Source:
    """What a directory holds.

    Args:
        directory: Of a run; of a tag; or of several tags, of which the latest is taken.
        base: Takes the place of the model that the run names.

    Raises:
        ConfigError: It holds nothing that was trained, or nothing yet.
        CheckpointError: The tag is missing.
    """
    if (directory / "run.json").is_file():
        return _of_run(directory, base)
    tag = checkpoint.latest_tag(directory) if directory.is_dir() else None
    place = directory if tag is None else directory / tag
    if (place / checkpoint.STATE).is_file():
        return Source(place, base, place / checkpoint.JOURNAL)
    raise ConfigError(
        f"{directory}: holds no run (run.json), no checkpoint ({checkpoint.STATE}) and no delta "
        f"({INDEX}); give the --output of zo-offload train, or the directory of a tag"
    )


def _of_run(directory: Path, base: str | None) -> Source:
    run = load_json(directory / "run.json")
    try:
        model, config = str(run["model"]), dict(run["config"])
        journal: Path | None = journal_path(config, directory)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{directory / 'run.json'}: damaged ({type(error).__name__}: {error}); restore it"
        ) from error
    summary = directory / "summary.json"
    done = summary.is_file() and (directory / "model").is_dir()
    if journal is not None and not journal.is_file():
        journal = None
    if not done and journal is None:
        raise ConfigError(f"{directory}: the run has taken no step yet, or kept none; train first")
    return Source(
        directory, base or model, journal, config, directory / "model" if done else None, run,
        load_json(summary) if done else {},
    )  # fmt: skip
