"""What reads bytes of others, a table: some inputs as they should be, and how each is read.

The only answers are what was read, and an error of ours.
"""

import json
import struct
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cli.common import TEMPLATE
from safetensors.torch import save

from faults import exports
from zo_offload import checkpoint
from zo_offload.config import load_json, parse_config
from zo_offload.converted import read_converted
from zo_offload.errors import ConfigError, LostRankError
from zo_offload.journal import Journal, Probe, Record
from zo_offload.journal.header import HEADER, HEADER_BYTES
from zo_offload.journal.record import BODY, BODY_OFFSET, MARKER
from zo_offload.mask import check_mask, read_mask
from zo_offload.metrics import Metrics
from zo_offload.offload.manifest import (
    geometry_for,
    manifest_run,
    read_clean,
    read_manifests,
    write_manifests,
)
from zo_offload.offload.sealed import write_sealed
from zo_offload.offload.slot import CRC_AT, Identity, SlotHeader, StoredUnit, parse
from zo_offload.ops import crc32c
from zo_offload.replica import Replica
from zo_offload.replica.booked import Booked
from zo_offload.replica.sums import Sums
from zo_offload.replica.told import as_failure, as_told
from zo_offload.run import read_summary
from zo_offload.run_directory import holds
from zo_offload.snapshot import _load, read_snapshot
from zo_offload.tasks.own import read_task
from zo_offload.tasks.prompt import Prompt
from zo_offload.tasks.reader import read_examples
from zo_offload.tasks.rows import read_rows


@dataclass(frozen=True)
class Parser:
    """One reader.

    Attributes:
        samples: Inputs as they should be.
        read: Given the bytes and an empty folder.
        seal: Makes checksums right again, so that what is behind them is reached.
        is_json: Whether values may be exchanged in it.
    """

    samples: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], Any]
    seal: Callable[[bytes], bytes] | None = None
    is_json: bool = False


RUN = {"seed": 7, "lag": 0, "update": {"type": "sgd"}}
IDENTITY = Identity("ab" * 16, "cd" * 32, "bf16")
UNITS = [StoredUnit(0, "layers.0", 5000, 100, "11" * 32)]


def in_a_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def write_and_read(data: bytes, folder: Path) -> Any:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return write_and_read


def written(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]


# -- journal --


def journals() -> list[bytes]:
    journal = Journal.memory(RUN)
    for step in range(3):
        probes = tuple(Probe(p, 0.5 + p, 1e-6) for p in range(2))
        journal.append(Record(step, probes, (0.7, 0.6), eps=1e-3, lr=1e-6))
    rewound = Journal.of(journal.content, "x")
    rewound.rewind(1)
    return [journal.content, rewound.content]


def read_journal(data: bytes, folder: Path) -> None:
    path = folder / "run.journal"
    path.write_bytes(data)
    Journal.of(data, "x")
    with Journal.open(path, RUN) as journal:
        records = journal.records
        list(records)
        records.coefficients(0, len(records))
        records.lineage()
        metrics = Metrics(folder / "metrics.csv", records)
        metrics.close()


def seal_journal(data: bytes) -> bytes:
    out = bytearray(data)
    if len(out) < HEADER_BYTES:
        return data
    end = HEADER_BYTES + HEADER.unpack_from(out)[3]
    crc = zlib.crc32(out[HEADER_BYTES:end], zlib.crc32(out[: HEADER.size]))
    struct.pack_into("<I", out, HEADER.size, crc)
    at = out.find(MARKER, end)
    while 0 <= at <= len(out) - BODY_OFFSET - BODY.size:
        (length,) = struct.unpack_from("<I", out, at + BODY_OFFSET)
        body = zlib.crc32(out[at + BODY_OFFSET : at + length], crc)
        struct.pack_into("<I", out, at + len(MARKER), body)
        at = out.find(MARKER, at + 1)
    return bytes(out)


# -- stores --


def slots() -> list[bytes]:
    header = SlotHeader(IDENTITY, 0, "11" * 32, 0, 9, 99, 5000, 100, 1, 2, 8192)
    return [header.pack().numpy().tobytes()]


def read_slot(data: bytes, folder: Path) -> Any:
    return parse(data.ljust(4096, b"\0")[:4096])


def seal_slot(data: bytes) -> bytes:
    block = bytearray(data.ljust(4096, b"\0")[:4096])
    crc = crc32c(torch.frombuffer(bytearray(block[:CRC_AT]), dtype=torch.uint8))
    struct.pack_into("<I", block, CRC_AT, crc)
    return bytes(block)


def seal_json(data: bytes) -> bytes:
    """As ``write_sealed`` does, with whatever the content is."""
    try:
        sealed = json.loads(data)
        text = json.dumps(sealed["content"], sort_keys=True, separators=(",", ":")).encode()
        sealed["crc32c"] = crc32c(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        return json.dumps(sealed).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        return data


def manifests() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        write_manifests([Path(folder)], geometry_for(1, UNITS, 2, 4096), IDENTITY, UNITS)
        return [(Path(folder) / "store.json").read_bytes()]


def read_manifest(path: Path) -> None:
    manifest_run(path)
    read_manifests([path.parent], IDENTITY, UNITS)


def bases() -> list[bytes]:
    record = {
        "sha256": "ab" * 32, "unit": "block", "master": "fp32", "forward": ["float32"],
        "packed": [], "frozen": 0, "parameters": {"w": [[2, 2], "float32"]}, "squares": {"w": 1.5},
        "folders": [], "files": {"ambient.safetensors": [10, 11]},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_sealed(Path(folder) / "base.json", 2, record)
        return [(Path(folder) / "base.json").read_bytes()]


# -- snapshots, checkpoints, masks --


def snapshots() -> list[bytes]:
    files = [["unit-00001-of-00001.safetensors", 10, "ab" * 32, 3]]
    whole = {"format": 3, "step": 4, "lineage": "ab" * 32, "frozen": "", "files": files}
    return [json.dumps(whole).encode()]


def tensors() -> list[bytes]:
    return [save({"w": torch.ones(2, 3), "b": torch.arange(4)}, {"format": "pt"})]


def masks() -> list[bytes]:
    origin = {"method": "gradient", "scope": "global", "share": 0.1, "candidates": 9}
    chosen = {"w.indices": torch.tensor([1, 5]), "w.scores": torch.tensor([0.5, 2.0])}
    return [save(chosen, {"zo_offload mask 1": json.dumps(origin)})]


def read_a_mask(path: Path) -> None:
    check_mask(path, read_mask(path), {"w": (2, 3)})


def read_checkpoint(data: bytes, folder: Path) -> None:
    (folder / "checkpoint.json").write_bytes(data)
    (folder / "run.journal").write_bytes(journals()[0])
    checkpoint.load(folder)


def unpack_checkpoint(data: bytes, folder: Path) -> None:
    checkpoint.Checkpoint.unpack(data)


def packed_checkpoints() -> list[bytes]:
    journal = Journal.of(journals()[0], "x")
    return [checkpoint.Checkpoint(Path("/tag"), journal, {"a": 1}, None).pack()]


# -- runs --

ASKED = {"steps": 6, "model": "m", "config": {"zeroth_order": {"journal": {"path": None}}}}
SUMMARY = {
    "journal": "j", "steps": 6, "accuracy_before": 0.5, "accuracy_after": 0.6, "loss_before": 1.0,
    "loss_after": None, "model_parameters": 3, "model_bytes": 12, "peak_device_bytes": 1,
    "host_bytes": 2, "rank_bytes_per_step": None, "noise_over_signal": None,
}  # fmt: skip
METRICS = (
    b"step,loss,lr,projected_grad,seconds,accuracy,dev_loss\n"
    b"0,0.650000,1e-06,0.5,0.1,0.5,0.693147\n1,0.650000,1e-06,0.5,0.1,,\n3,,,,,0.6,0.5\n"
)


def read_run(data: bytes, folder: Path) -> None:
    (folder / "journal").mkdir()
    (folder / "journal" / "run.journal").touch()
    (folder / "run.json").write_bytes(data)
    holds(folder, ASKED)


def read_metrics(data: bytes, folder: Path) -> None:
    (folder / "metrics.csv").write_bytes(data)
    records = Journal.of(journals()[0], "x").records
    metrics = Metrics(folder / "metrics.csv", records)
    metrics.evaluations()
    metrics.close()


# -- what a user writes --

CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "ZO", "params": {"lr": 1e-6}},
    "zeroth_order": {
        "seed": 3, "eps": 1e-3, "probes": 2, "estimator": "spsa", "direction": "rademacher",
        "trainable": {"mode": "full"}, "update": {"type": "adam", "window": 5, "lag": 1},
        "offload_param": {"device": "nvme", "nvme_path": "/x"}, "device_budget": "8GiB",
        "replica": {"check_interval": 5}, "journal": {"path": None, "snapshot_interval": 5},
    },
}  # fmt: skip
TASK = {
    "name": "mine", "template": "{text} It was", "labels": [" bad", " good"], "label": "label",
    "metric": "accuracy", "separator": "\n", "examples": {"train": 3, "dev": 2},
    "splits": {"train": "train.jsonl", "dev": "dev.jsonl"},
}  # fmt: skip
TOML = b'template = "{text} It was"\nlabels = [" bad", " good"]\n[splits]\ntrain = "t.jsonl"\n'
ROWS = b'{"sentence": "a film", "label": 1}\n{"sentence": "b", "label": "great"}\n'


def read_prompt(data: bytes, folder: Path) -> None:
    Prompt(TEMPLATE, data.decode("utf-8", "replace"))


def read_template(data: bytes, folder: Path) -> None:
    Prompt(data.decode("utf-8", "replace"), " bad, good")


# -- other ranks --


class Told:
    """A link on which certain bytes arrive, and then nothing more."""

    bytes_sent = 0
    timeout = 1.0

    def __init__(self, rank: int, data: bytes) -> None:
        self.rank, self.world_size, self._data = rank, 2, data

    def receive(self, peer: int, size: int) -> bytes:
        if len(self._data) < size:
            raise LostRankError("its connection is closed")
        part, self._data = self._data[:size], self._data[size:]
        return part

    def send(self, peer: int, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


BOOKED = Booked.of(["+", "-"], [[(1.5, 1.0), (2.5, 3.0)]])


def read_booked(data: bytes, folder: Path) -> None:
    Replica(Told(0, data)).mean(BOOKED, 3)


def read_sums(data: bytes, folder: Path) -> None:
    Replica(Told(1, data)).mean(BOOKED, 3)


def read_shared(data: bytes, folder: Path) -> None:
    Replica(Told(1, data)).share(bytes)


def shared() -> list[bytes]:
    told = b"\x01" + as_told(ConfigError("no"))
    return [struct.pack("<Q", 4) + b"\0abc", struct.pack("<Q", len(told)) + told,
            as_failure(ConfigError("no"))]  # fmt: skip


PARSERS = {
    "journal": Parser(journals, read_journal, seal_journal),
    "slot header": Parser(slots, read_slot, seal_slot),
    "store manifest": Parser(manifests, in_a_file("store.json", read_manifest), seal_json, True),
    "clean mark": Parser(
        written({"sequence": 3, "life_bytes": 4096}),
        in_a_file("clean", lambda path: read_clean(path.parent)),
        is_json=True,
    ),
    "converted base": Parser(
        bases, in_a_file("base.json", lambda path: read_converted(path.parent)), seal_json, True
    ),
    "snapshot manifest": Parser(
        snapshots, in_a_file("weights.json", lambda path: read_snapshot(path.parent)), is_json=True
    ),
    "snapshot tensors": Parser(tensors, in_a_file("unit.safetensors", _load)),
    "mask": Parser(masks, in_a_file("mask.safetensors", read_a_mask)),
    "checkpoint": Parser(written({"format": 1, "state": {"a": 1}}), read_checkpoint, is_json=True),
    "latest tag": Parser(
        written(b"global_step3\n", b"../x"),
        in_a_file("latest", lambda path: checkpoint.latest_tag(path.parent)),
    ),
    "checkpoint of a rank": Parser(packed_checkpoints, unpack_checkpoint),
    "run.json": Parser(written(ASKED, {**ASKED, "steps": 7}), read_run, is_json=True),
    "summary.json": Parser(written(SUMMARY), in_a_file("summary.json", read_summary), is_json=True),
    "metrics.csv": Parser(written(METRICS), read_metrics),
    "config": Parser(
        written(CONFIG),
        in_a_file("ds.json", lambda path: parse_config(load_json(path))),
        is_json=True,
    ),
    "task in JSON": Parser(written(TASK), in_a_file("task.json", read_task), is_json=True),
    "task in TOML": Parser(written(TOML), in_a_file("task.toml", read_task)),
    "examples, TSV": Parser(
        written(b"sentence\tlabel\na film\t1\nb\tgreat\n"), in_a_file("d.tsv", read_examples)
    ),
    "examples, JSONL": Parser(written(ROWS), in_a_file("d.jsonl", read_examples), is_json=True),
    "rows, CSV": Parser(
        written(b'a,b\n"x, y",1\n'), in_a_file("d.csv", lambda path: list(read_rows(path)))
    ),
    "rows, JSON": Parser(
        written({"data": [{"a": 1}]}, ROWS),
        in_a_file("d.json", lambda path: list(read_rows(path))),
        is_json=True,
    ),
    "labels": Parser(written(b" bad, good", b'[" a", " b"]'), read_prompt, is_json=True),
    "template": Parser(written(TEMPLATE.encode(), b"{a} {{b}} {mask}"), read_template),
    "sums of rank 0": Parser(lambda: [Sums([1.5, 2.5], [2.0, 4.0]).pack(2)], read_sums),
    **{
        f"{name}, reported": Parser(
            written(content), exports.of_a_run(name, exports.shown), is_json=content[:1] == b"{"
        )
        for name, content in exports.FILES.items()
    },
    "journal, reported": Parser(journals, exports.of_a_run("journal", exports.shown), seal_journal),
    **{
        f"{name}, on a card": Parser(
            written(exports.FILES[name]), exports.of_a_run(name, exports.carded), is_json=True
        )
        for name in ("run.json", "summary.json")
    },
    "delta": Parser(exports.indices, exports.of_a_delta("delta.json"), is_json=True),
    "tensors of a delta": Parser(
        lambda: [exports.delta()["delta-00001.safetensors"]],
        exports.of_a_delta("delta-00001.safetensors"),
    ),
    "losses of a rank": Parser(lambda: [BOOKED.pack(3), BOOKED.pack(3, (1, 2))], read_booked),
    "shared by rank 0": Parser(shared, read_shared),
}
