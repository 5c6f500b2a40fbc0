"""A model card out of what a run has recorded: no line says what no file of the run does."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zo_offload.export.source import Source
from zo_offload.journal import Journal
from zo_offload.report.found import number

OF_TASK = ("task", "data", "template", "labels", "train", "dev", "objective")
PATHS = ("task", "data", "train", "dev")
LIBRARIES = ("zo_offload", "torch", "transformers", "peft", "safetensors")
TITLES = {
    "hf": "a Hugging Face model",
    "adapter": "an adapter of peft",
    "delta": "the difference to its base (delta.json)",
}
Rows = Iterator[tuple[str, Any]]


def card(source: Source, kind: str, notes: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        source: Of the weights.
        kind: Format of the export.
        notes: Further rows, which the export itself knows.
    """
    journal = None if source.journal is None else Journal.read(source.journal)
    groups = {
        "Training": [*_of_run(source), *_of_journal(source, journal)],
        "Results": list(_of_summary(source.summary)),
        "Files": [("format", TITLES[kind]), *notes.items(), *_versions()],
    }
    parts = [_front(source, kind), f"# {_title(source)}\n"]
    for name, rows in groups.items():
        shown = [(key, value) for key, value in rows if value not in (None, "", {})]
        if shown:
            lines = [f"| {key} | {_shown(value)} |" for key, value in shown]
            parts.append("\n".join([f"## {name}\n", "| | |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts).encode("utf-8", errors="replace").decode()


def applied(text: str) -> str:
    """A delta's card, once it is a model again."""
    return text.replace(TITLES["delta"], TITLES["hf"])


def _front(source: Source, kind: str) -> str:
    """What the hub reads; a base that is a directory means nothing there."""
    lines = [f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"]
    if source.base is not None and not _is_there(source.base):
        lines.append(f"base_model: {json.dumps(source.base)}")
    return "\n".join(["---", *lines, "---", ""])


def _title(source: Source) -> str:
    base = _named(source.base) or "A model"
    by = "backprop" if source.run.get("first_order") else "forward passes only"
    return f"{base}, fine-tuned with {by}"


def _of_run(source: Source) -> Rows:
    run, config = source.run, source.config or {}
    yield "base", _named(source.base)
    for name in OF_TASK:
        yield name, _named(run.get(name)) if name in PATHS else run.get(name)
    yield "examples a step", config.get("train_batch_size")
    yield "backprop (AdamW)", run.get("first_order")
    yield "optimizer", config.get("optimizer")
    yield "trainable", (config.get("zeroth_order") or {}).get("trainable")


def _of_journal(source: Source, journal: Journal | None) -> Rows:
    if journal is None:
        yield "steps", source.summary.get("steps")
        return
    fields, records = journal.header.fields, journal.records
    yield "steps", journal.next_step
    asked = source.run.get("steps")
    if asked is not None and asked != journal.next_step:
        yield "steps asked for", asked
    if journal.next_step:
        first, last = records[0].lr, records[len(records) - 1].lr
        yield "learning rate", f"{first:.6g}, at the last step {last:.6g}"
    for name in ("estimator", "probes", "eps", "direction", "update", "seed", "master", "wire"):
        yield name, fields.get(name)
    yield "forward", ", ".join(fields.get("forward", ())).replace("torch.", "")
    yield "base weights (sha256)", fields.get("base_sha256")
    yield "journal (sha256)", hashlib.sha256(journal.content).hexdigest()


def _of_summary(summary: Mapping[str, Any]) -> Rows:
    metric = summary.get("metric")
    for name, key in ((metric, "accuracy"), ("loss", "loss")):
        before, after = (summary.get(f"{key}_{when}") for when in ("before", "after"))
        found = number(before), number(after)
        if found[0] is not None and found[1] is not None:
            yield f"{name} before", f"{found[0]:.4f}"
            yield f"{name} after", f"{found[1]:.4f}"


def _versions() -> Rows:
    yield "exported with", ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def _named(path: Any) -> Any:
    """Without the folders above, which are nobody's business; an id is whole."""
    return Path(path).name if isinstance(path, str) and _is_there(path) else path


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # too long for a name
        return False


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")
