"""Sessions of a GPU benchmark: contestants that are alive at once and take turns, batch by batch.

A shape's bare model stays on the device and is in every session of the shape, so that every ratio
is of turns beside one another. Ours is made anew for each setting: host memory has room for one.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu_contestants import (
    EXACT,
    MASTERS,
    SPARE_BYTES,
    Bare,
    Contestant,
    Ours,
    Setting,
    compile_blocks,
    held_on,
    master_that_fits,
    planned,
)
from gpu_machine import Held, room, watched
from gpu_results import Results
from gpu_shapes import Shape, batch_of
from gpu_zo2 import zo2_of
from timing import Times, alternating

from zo_offload.telemetry import Reading

BUILD_BYTES_A_SECOND = 2e9  # of masters, until one has been made
BATCH_SECONDS = 12.0  # after which no further round of a batch begins
OTHER_SECONDS = 8.0  # of a batch: what is not a turn
SMALL_HEAD = 8192
LOSS_APART = 0.005  # of itself: the bare model's logits are bfloat16
BARE, MEZO, ZO2, MEMORY = "two bare forwards", "MeZO as published", "ZO2", "ours, in memory"

HOST = Setting("cpu")
SETTINGS = {
    "core": (
        HOST,
        Setting("cpu", head_chunk=SMALL_HEAD),
        Setting("cpu", lag=4),
        Setting("cpu", "int8:64", lag=4),
        Setting("cpu", "nf4", lag=4),
    ),
    "more": (
        Setting("cpu", "lossless12"),
        Setting("cpu", "lossless12", lag=4),
        Setting("cpu", where="device"),
        Setting("cpu", "int8:64"),
        Setting("cpu", "nf4"),
        Setting("cpu", "fp8_e4m3"),
        Setting("cpu", "fp8_e4m3", lag=4),
    ),
}
"""Of offloaded contestants, in the order in which they are worth measuring."""


@dataclass
class Asked:
    """What is asked of the sessions of a shape.

    Attributes:
        shape: Which.
        device: Where forwards run.
        results: Where figures go.
        rounds: That count.
        until: By the clock of ``time.time``.
        zo2: Folder of ZO2's code.
        site: Folder of packages for it.
        backend: Of ``torch.compile``.
    """

    shape: Shape
    device: torch.device
    results: Results
    rounds: int
    until: float
    zo2: Path | None = None
    site: Path | None = None
    backend: str = "inductor"


@dataclass
class Sessions:
    """Runs them."""

    asked: Asked
    bare: Bare | None = None
    _rate: float = BUILD_BYTES_A_SECOND
    _bare_bytes: int = 0
    _others: int = 0
    _held: Held = field(default_factory=Held)

    def core(self) -> None:
        """What is worth most."""
        self._make_bare()
        alone = self._session(MEMORY, self._in_memory)
        self._make_bare()
        for setting in SETTINGS["core"]:
            self._offloaded(setting, with_zo2=setting == HOST)
        if alone == "alone":
            self.bare = None
            gc.collect()
            self._session(MEMORY, lambda: self._in_memory(beside=False))

    def more(self) -> None:
        """The other settings."""
        self._make_bare()
        for setting in SETTINGS["more"]:
            self._offloaded(setting)

    def compiled(self) -> None:
        """The bound and ours in memory, each block compiled."""
        self._make_bare()
        self._session("compiled", self._compiled)

    # -- sessions --

    def _make_bare(self) -> None:
        """Anew: MeZO moves it."""
        self.bare = None
        gc.collect()
        before = held_on(self.asked.device)
        self.bare = Bare(self.asked.shape, self.asked.device)
        self._bare_bytes = held_on(self.asked.device) - before

    def _in_memory(self, beside: bool = True) -> str | None:
        """``"alone"`` where there is room for ours but not beside the bare model."""
        assert not beside or self.bare is not None
        setting = Setting()
        free, total = room(self.asked.device)
        master, needed = self._master(setting, free)
        if master is None:
            if beside:
                self._turns("bare and MeZO", None, [BARE, MEZO])
                if self._master(setting, total)[0] is not None:
                    return "alone"
            self._leave_out(MEMORY, f"needs {needed['device']:,} bytes, {free or 0:,} are free")
            return None
        with self._ours(setting, master) as ours:
            names = [BARE, MEZO, MEMORY] if beside else [MEMORY]
            self._turns(MEMORY, ours, names)
        return None

    def _offloaded(self, setting: Setting, with_zo2: bool = False) -> None:
        def run() -> None:
            free, _ = room(self.asked.device)
            master, needed = self._master(setting, free)
            if master is None:
                said = f"device and host need {needed['device']:,} and {needed['host']:,} bytes"
                self._leave_out(setting.name, said)
                return
            with self._ours(setting, master) as ours:
                beside = with_zo2 and self._has_room_for_zo2()
                self._turns(setting.name, ours, [BARE, setting.name], beside)
            if with_zo2 and not beside:
                self._turns(ZO2, None, [BARE], with_zo2=True)

        self._session(setting.name, run)

    def _has_room_for_zo2(self) -> bool:
        """In host memory."""
        needed = 2 * self.asked.shape.num_parameters + SPARE_BYTES
        return psutil.virtual_memory().available >= needed

    def _compiled(self) -> None:
        assert self.bare is not None
        free, _ = room(self.asked.device)
        master, needed = self._master(Setting(), free)
        if master is None:
            self._leave_out("compiled", f"needs {needed['device']:,} bytes beside the bare model")
            return
        compile_blocks(self.bare.model, self.asked.backend)
        with self._ours(Setting(), master, self.asked.backend) as ours:
            self._turns("compiled", ours, [BARE, MEMORY], suffix=", blocks compiled")

    # -- parts of a session --

    def _session(self, name: str, run: Any) -> Any:
        """Run it if there is time; what goes wrong is its own matter, while the device works."""
        shape, results = self.asked.shape, self.asked.results
        needed = shape.num_parameters * MASTERS["fp32"] / self._rate
        needed += len(shape.batches) * (BATCH_SECONDS + OTHER_SECONDS)
        left = self.asked.until - time.time()
        if left < needed:
            self._leave_out(name, f"would take about {needed:.0f} s, {max(0.0, left):.0f} are left")
            return None
        try:
            return run()
        except (Exception, SystemExit) as error:  # the latter of a process that was asked
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            results.add("failed", name=f"{shape.name}: {name}", why=why)
            if "CUDA error" in str(error):  # nothing works after it
                raise
        gc.collect()  # what failed may have left its tensors in a traceback
        return None

    def _leave_out(self, name: str, why: str) -> None:
        self.asked.results.add("left out", name=f"{self.asked.shape.name}: {name}", why=why)

    def _master(self, setting: Setting, free: int | None) -> tuple[str | None, dict[str, int]]:
        available = psutil.virtual_memory().available
        return master_that_fits(self.asked.shape, setting, free, available)

    @contextmanager
    def _ours(self, setting: Setting, master: str, backend: str | None = None) -> Iterator[Ours]:
        self._others = held_on(self.asked.device)
        with watched() as self._held:
            ours = Ours(self.asked.shape, setting, master, self.asked.device, backend=backend)
            held = self.asked.shape.num_parameters * MASTERS[master]
            self._rate = min(held / ours.build_seconds, 100 * BUILD_BYTES_A_SECOND)
            try:
                yield ours
            finally:
                ours.close()

    def _turns(
        self,
        name: str,
        ours: Ours | None,
        names: Sequence[str],
        with_zo2: bool = False,
        suffix: str = "",
    ) -> None:
        """Every batch of the shape; a line for each contestant."""
        shape, device = self.asked.shape, self.asked.device
        for number, (rows, length) in enumerate(shape.batches):
            batch = batch_of(shape, rows, length, device)
            made = self._contestants(ours, names, batch)
            losses = self._losses(ours, names, batch)
            before = ours.reading() if ours is not None else None
            with self._beside(with_zo2, (rows, length)) as other:
                turns: dict[str, Callable[[], object]] = {
                    each.name: partial(each.turn, device) for each in made
                }
                if other is not None:
                    turns[ZO2] = other.run
                times = alternating(turns, self.asked.rounds, most_seconds=BATCH_SECONDS)
                if other is not None:
                    made.append(other)
                    other.peak = other.held()
            for each in made:
                row = self._row(each, (rows, length), times, suffix)
                if ours is not None and each.name == ours.setting.name:
                    assert before is not None
                    row |= self._ours_row(ours, row, before, losses)
                self.asked.results.add("row", session=name, number=number, **row)

    def _contestants(
        self, ours: Ours | None, names: Sequence[str], batch: dict[str, torch.Tensor]
    ) -> list[Contestant]:
        made = []
        if self.bare is not None:
            known = {BARE: self.bare.two, MEZO: self.bare.mezo}
            made = [known[each](batch) for each in names if each in known]
            others = held_on(self.asked.device) - self._bare_bytes
            made = [replace(each, others=others) for each in made]
        if ours is not None:
            made.append(ours.contestant(batch, self._others))
        return made

    def _losses(
        self, ours: Ours | None, names: Sequence[str], batch: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Of the same weights, by either; they have moved by a few tiny steps at most."""
        if ours is None or self.bare is None or MEZO in names:
            return {}  # MeZO moves the bare model's
        found = {"loss": ours.loss(batch), "bare_loss": self.bare.loss(batch)}
        if ours.setting.wire.split(":")[0] in EXACT:
            apart = abs(found["loss"] - found["bare_loss"])
            found["agrees"] = apart <= LOSS_APART * abs(found["bare_loss"])
        return found

    def _row(
        self, each: Contestant, batch: tuple[int, int], times: dict[str, Times], suffix: str
    ) -> dict[str, Any]:
        seconds = times[each.name].median / each.steps
        which = {"shape": self.asked.shape.name, "batch": list(batch)}
        bare = times.get(BARE)
        forwards = bare.median if bare else self.asked.results.seconds(which, BARE)
        return {
            **which,
            "title": self.asked.shape.title,
            "contestant": each.name + suffix,
            "seconds": seconds,
            "spread": times[each.name].spread,
            "rounds": len(times[each.name].seconds),
            "steps_a_turn": each.steps,
            "tokens_per_second": batch[0] * batch[1] / seconds,
            "over_bare": times[each.name].over(bare) / each.steps if bare else None,
            "bare_fraction": forwards / seconds if forwards else None,
            "device_peak_bytes": each.peak,
        }

    def _ours_row(
        self,
        ours: Ours,
        row: dict[str, Any],
        before: tuple[int, Reading],
        losses: dict[str, Any],
    ) -> dict[str, Any]:
        steps, now = ours.reading()
        since = now.since(before[1])
        taken = steps - before[0]
        rows, length = row["batch"]
        found: dict[str, Any] = {
            "master": ours.master,
            "build_seconds": ours.build_seconds,
            "planned_bytes": {
                **ours.planned,
                **planned(ours.shape, ours.setting, ours.master, (rows, length)),
            },
            "host_peak_bytes": self._held.as_json(),
            "step_seconds": {part: value / taken for part, value in since.seconds.items()},
            "busy_seconds": {part: value / taken for part, value in since.busy.items()},
            **losses,
        }
        if ours.setting.offload == "none":
            return found
        moved = since.bytes["bus"] / taken
        return found | self._against_bounds(ours, row, moved)

    def _against_bounds(self, ours: Ours, row: dict[str, Any], moved: float) -> dict[str, Any]:
        """Bytes of a step over the rates that this machine was found to have."""
        results, setting = self.asked.results, ours.setting
        rates, kernel = results.last("rates"), ours.host_kernel
        both = setting.where == "device"
        bus = rates.get("bus_both_gbps" if both else "bus_up_gbps")
        compute = results.seconds(row, MEMORY) or results.seconds(row, BARE)
        bounds = {
            "in memory": compute,
            "bus": moved / bus / 1e9 if bus else None,
            "host kernel": _host_seconds(kernel, setting.wire, rates),
        }
        known = {name: value for name, value in bounds.items() if value is not None}
        found: dict[str, Any] = {
            "bus_bytes": moved,
            "bus_gbps": moved / row["seconds"] / 1e9 if bus else None,
            "bus_share": moved / row["seconds"] / 1e9 / bus if bus else None,
            "host_kernel": kernel,
            "bounds": bounds,
            "bound_by": None,
            "over_bound": None,
        }
        if len(known) == len(bounds):
            slowest = max(known, key=known.__getitem__)
            found |= {"bound_by": slowest, "over_bound": row["seconds"] / known[slowest]}
        return found

    @contextmanager
    def _beside(self, wanted: bool, batch: tuple[int, int]) -> Iterator["_Zo2 | None"]:
        """ZO2 with that batch, or the reason why not."""
        config = self.asked.shape.config()
        keys = ("vocab_size", "max_position_embeddings", "hidden_size", "ffn_dim",
                "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim")  # fmt: skip
        asked = {
            "values": {key: getattr(config, key) for key in keys},
            "device": str(self.asked.device),
            "rows": batch[0],
            "length": batch[1],
        }
        with ExitStack() as stack:
            other = None
            try:
                if wanted:
                    opened = zo2_of(self.asked.zo2, self.asked.site, asked)
                    program = stack.enter_context(opened)
                    other = _Zo2(
                        ZO2,
                        lambda: program.ask("step"),
                        held=lambda: program.ask("held")["device"],
                    )
            except (RuntimeError, SystemExit) as error:
                self._leave_out(f"{ZO2}, {batch[0]} x {batch[1]}", str(error))
            yield other


@dataclass
class _Zo2(Contestant):
    """In its process; it says itself what it holds."""

    held: Any = None


def _host_seconds(kernel: dict[str, float], wire: str, rates: dict[str, Any]) -> float | None:
    """Of the host's work on a step's weights."""
    update, packing = rates.get("host_update_gbps"), rates.get("pack_gweights", {}).get(wire)
    if update is None or (kernel["packed_weights"] and packing is None):
        return None
    seconds = kernel["master_bytes"] / update / 1e9
    return seconds + (kernel["packed_weights"] / packing / 1e9 if packing else 0.0)
