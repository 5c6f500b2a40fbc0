"""A checkpoint: a tag's directory from which a run goes on to the same bits.

::

    DIR/latest                  the newest tag, written last
    DIR/TAG/checkpoint.json     counters, schedule, what the user added
    DIR/TAG/run.journal         every step so far: with the base weights, all that is needed
    DIR/TAG/weights/            the weights themselves (not with ``"checkpoint": "scalars"``)

Written aside, synced and renamed, so that a tag is whole or not there. JSON, safetensors and our
own format only: nothing is unpickled.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_offload import files
from zo_offload.errors import CheckpointError, ReplicaError
from zo_offload.journal import Journal
from zo_offload.snapshot import write_snapshot
from zo_offload.weights import Weights

FORMAT = 1
LENGTH = struct.Struct("<Q")
LATEST = "latest"
STATE, JOURNAL, WEIGHTS = "checkpoint.json", "run.journal", "weights"


@dataclass(frozen=True)
class Checkpoint:
    """What a tag holds.

    Attributes:
        directory: Of the tag.
        journal: In memory; every step so far.
        state: What was given to :func:`save`.
        weights: Directory of a snapshot, or None.
    """

    directory: Path
    journal: Journal
    state: dict[str, Any]
    weights: Path | None

    def pack(self) -> bytes:
        """For another rank, which looks for the weights at the same place."""
        told = json.dumps([str(self.directory), self.state]).encode()
        return LENGTH.pack(len(told)) + told + self.journal.content

    @classmethod
    def unpack(cls, data: bytes) -> "Checkpoint":
        """What :meth:`pack` packed.

        Raises:
            ReplicaError: It is something else.
            JournalError: Its journal is damaged.
        """
        try:
            (size,) = LENGTH.unpack_from(data)
            name, state = json.loads(data[LENGTH.size :][:size])
            if not isinstance(name, str) or not isinstance(state, dict):
                raise TypeError(f"expected a name and an object, found {name!r:.64}")
        except (struct.error, ValueError, TypeError, RecursionError) as error:
            raise ReplicaError(
                f"rank 0 sent {len(data):,} bytes that hold no checkpoint ({error}); start the "
                "same version of zo_offload on every rank"
            ) from error
        journal = Journal.of(data[LENGTH.size + size :], f"{name}/{JOURNAL}")
        return cls(Path(name), journal, state, _weights_in(Path(name)))


def save(
    directory: Path,
    journal: Journal,
    state: Mapping[str, Any],
    weights: Weights | None,
    latest: bool = True,
) -> None:
    """Write a tag's directory, then the name of the latest.

    Args:
        directory: Of the tag, ``DIR/TAG``.
        journal: Of the run so far.
        state: JSON values.
        weights: To hold beside the journal, or None.
        latest: Whether a load without a tag is to find this one.

    Raises:
        CheckpointError: A value is not JSON, the tag's name is one of ours, or the system refuses;
            what was saved before stays.
    """
    _refuse_our_names(directory.name)
    try:
        text = json.dumps({"format": FORMAT, "state": dict(state)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: {error}; a checkpoint holds JSON only (scheduler and client_state: "
            "numbers, text, lists, objects)"
        ) from error
    try:
        with files.new_directory(directory) as aside:
            (aside / STATE).write_text(text + "\n", encoding="utf-8")
            (aside / JOURNAL).write_bytes(journal.content)
            if weights is not None:
                (aside / WEIGHTS).mkdir()
                records = journal.records
                write_snapshot(aside / WEIGHTS, weights, len(records), records.lineage())
        if latest:
            files.write_file(directory.parent / LATEST, directory.name.encode())
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot save: {error.strerror or error}"
            "; make room there, or let this user write, and save again"
        ) from error


def latest_tag(directory: Path) -> str | None:
    """The tag that a load without one means; None where there is none."""
    try:
        return checked_tag((directory / LATEST).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / LATEST}: cannot be read: {error}"
            "; name the tag: load_checkpoint(directory, tag)"
        ) from error


def checked_tag(tag: object) -> str:
    """A tag as text.

    Raises:
        CheckpointError: It is no plain name.
    """
    text = str(tag)
    if text in ("", ".", "..") or Path(text).name != text:
        raise CheckpointError(f"tag {text!r}: expected a plain name, without slashes")
    return text


def _refuse_our_names(tag: str) -> None:
    """Those that saving another tag would take away."""
    if tag == LATEST or tag.endswith((files.ASIDE, files.BEFORE)):
        raise CheckpointError(
            f"tag {tag!r}: {LATEST!r} and names that end in {files.ASIDE!r} or {files.BEFORE!r} "
            "are for files that saving makes beside; choose another"
        )


def load(directory: Path) -> Checkpoint:
    """Read a tag's directory, weights excepted.

    Raises:
        CheckpointError: It is missing or damaged.
        JournalError: Its journal is.
    """
    place = files.whole_directory(directory)
    if place is None:
        raise CheckpointError(
            f"{directory}: no such checkpoint"
            "; give the directory that was saved to, and one of its tags"
        )
    try:
        held = json.loads((place / STATE).read_text(encoding="utf-8"))
        version, state = held["format"], held["state"]
        content = (place / JOURNAL).read_bytes()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{place}: no checkpoint of zo_offload, or damaged: {type(error).__name__}: {error}"
            "; load another tag, or start the run anew"
        ) from error
    if version != FORMAT or not isinstance(state, dict):
        raise CheckpointError(
            f"{place / STATE}: format {version}, but this zo_offload reads format {FORMAT}"
            "; load it with the version that wrote it"
        )
    journal = Journal.of(content, str(place / JOURNAL))
    return Checkpoint(place, journal, state, _weights_in(place))


def _weights_in(place: Path) -> Path | None:
    return place / WEIGHTS if (place / WEIGHTS).is_dir() else None
