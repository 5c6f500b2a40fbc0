"""Go on from what was saved: a journal's end, or a tag, wherever the weights stand now.

Weights that are behind are brought forward by replay, which every visit does by itself. Weights
that are ahead, or on another line of history, cannot be taken back by arithmetic to the same bits:
they are put in place from a snapshot.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from zo_offload.errors import CheckpointError, JournalError
from zo_offload.journal import Journal
from zo_offload.journal.header import differences
from zo_offload.momentum import from_header
from zo_offload.snapshot import Series, Snapshot, read_snapshot
from zo_offload.step import Stepper
from zo_offload.windowed import history_of

logger = logging.getLogger(__name__)


def rewind(
    stepper: Stepper, target: Journal, weights: Path | None, series: Series | None = None
) -> None:
    """Stand where a journal ends: its steps become this run's, in a branch of their own.

    Args:
        stepper: Stands anywhere, on the same base weights and settings.
        target: A checkpoint's journal.
        weights: A snapshot of the weights at its end, or None.
        series: The run's own snapshots, or None.

    Raises:
        JournalError: It belongs to another run.
        CheckpointError: The weights are ahead and there is no snapshot, or it is damaged. Nothing
            was changed.
    """
    _refuse_another_run(stepper, target)
    journal = stepper.journal
    shared = journal.records.shared_steps(target.records)
    snapshot = _snapshot_for(stepper, target, shared, weights, series)
    stepper.weights.forget_fetched()
    if shared < journal.next_step:
        journal.rewind(shared)
    for record in target.records[shared:]:
        journal.append(replace(record, branch=journal.branch))
    _go_along(journal, target.records.stream)
    if snapshot is not None:
        snapshot.restore(stepper.weights)
    stepper.guard.ended = None  # weights are where the journal is


def _go_along(journal: Journal, stream: int) -> None:
    """Let the next step go along the directions that it would have gone along there."""
    if journal.records.stream > stream:
        journal.rewind(journal.next_step)
    while journal.records.stream < stream:
        journal.rewind(journal.next_step, rolled_back=True)


def begin_with(stepper: Stepper, source: Journal, weights: Path | None) -> None:
    """Make a checkpoint's weights the base of a run that has taken no step.

    Args:
        stepper: Of that run.
        source: The checkpoint's journal.
        weights: Its snapshot.

    Raises:
        CheckpointError: It holds none, or they are damaged or of another model; or its masters lag
            and cannot be brought to its last step here.
    """
    if weights is None:
        raise CheckpointError(
            f"the checkpoint's {source.next_step} steps are scalars only, without weights to take "
            'alone; load it without load_module_only, or save it with "checkpoint": "weights"'
        )
    snapshot = read_snapshot(weights)
    snapshot.check(stepper.weights)
    snapshot.check_frozen(stepper.weights)
    theirs, ours = source.header.fields, stepper.journal.header.fields
    _check_mask(weights, theirs, ours)
    behind = any(unit.carries < snapshot.step for unit in snapshot.units)
    by_factors = "low_rank" in (_mode(theirs), _mode(ours))  # matrices carry what a grid says
    momentum = from_header(theirs.get("update"))
    if behind or by_factors:
        deciding = ["direction", "scales", "master", "trainable"]
        deciding += ["update", "lag"] if momentum is not None else []  # steps of a grid are joined
        for name in deciding:
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"{weights}: its masters may lag behind its {snapshot.step} steps, which need "
                    f"the {name} of its run; use that run's settings, or export it and begin there"
                )
    snapshot.restore(stepper.weights)
    stepper.weights.rebase(history_of(source.records, int(theirs.get("seed", 0)), momentum))


def _mode(header: Mapping[str, Any]) -> str | None:
    return header.get("trainable", {}).get("mode")


def _check_mask(weights: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Values of chosen weights say nothing of their places: that is for the mask to do."""
    masks = [header.get("trainable", {}).get("mask") for header in (theirs, ours)]
    if masks[0] != masks[1]:
        raise CheckpointError(
            f"{weights}: its weights were chosen by another mask; use the same, or export it and "
            "begin there"
        )


def recover(stepper: Stepper, series: Series) -> None:
    """After a journal was taken over: put its newest snapshot in place, which saves a replay."""
    found = next(usable(stepper, series, stepper.step), None)
    if found is not None:
        found.restore(stepper.weights, behind_only=True)


def _snapshot_for(
    stepper: Stepper, target: Journal, shared: int, weights: Path | None, series: Series | None
) -> Snapshot | None:
    if weights is not None:
        snapshot = read_snapshot(weights)
        held = (snapshot.step, snapshot.lineage)
        if held != (target.next_step, target.records.lineage()):
            raise CheckpointError(
                f"{weights}: holds the weights of step {snapshot.step} of "
                f"another history than the {target.next_step} steps of the journal beside it"
                "; load another tag, or without weights"
            )
        snapshot.check(stepper.weights)
        return snapshot
    held = stepper.weights
    carried = max(held.carried(unit) for unit in held.map.everything)
    surplus = any(
        held.carried(unit) > held.goal(unit, target.next_step) for unit in held.map.everything
    )
    if carried <= shared and not surplus:
        return None
    snapshot = next(usable(stepper, series, shared), None) if series is not None else None
    if snapshot is None:
        raise CheckpointError(
            f"the checkpoint's {target.next_step} steps share {shared} with this run, whose "
            f"weights carry {carried} already, and it holds scalars only; load it into a new "
            'engine on the base weights, or save with "checkpoint": "weights"'
        )
    return snapshot


def usable(stepper: Stepper, series: Series, last_step: int) -> Iterator[Snapshot]:
    """The run's own snapshots up to a step, newest first; damaged ones are passed over."""
    records = stepper.journal.records
    for step in series.steps():
        if step > last_step:
            continue
        try:
            snapshot = series.read(step)
            if snapshot.lineage == records.lineage(step):
                snapshot.check(stepper.weights)
                yield snapshot
        except CheckpointError as error:
            logger.warning("%s; an older one or replay takes its place", error)


def _refuse_another_run(stepper: Stepper, target: Journal) -> None:
    ours = stepper.journal.header.fields
    found = next(differences(target.header.fields, ours), None)
    if found is not None:
        raise JournalError(
            f"the checkpoint belongs to another run: {found}; use its base weights and settings"
        )
