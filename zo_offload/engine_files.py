"""What an engine leaves on disk and goes on from: journal, snapshots, checkpoints, plain models."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from zo_offload import alike, checkpoint, resume
from zo_offload.errors import CheckpointError, ConfigError
from zo_offload.export.single_file import write_model
from zo_offload.journal import Journal
from zo_offload.journal.header import as_stored
from zo_offload.loader import Loader
from zo_offload.snapshot import Series
from zo_offload.step import Stepper, StepResult
from zo_offload.window import Window

logger = logging.getLogger(__name__)


class SavesAndLoads:
    """The part of the engine that knows of files. Rank 0 writes; every rank calls."""

    stepper: Stepper
    module: Any
    optimizer: Any
    lr_scheduler: Any
    training_dataloader: Any
    global_steps: int
    global_samples: int
    micro_steps: int
    last_result: StepResult | None
    train_batch_size: Callable[[], int]
    gradient_accumulation_steps: Callable[[], int]
    scheduler_name: Callable[[], str | None]
    scheduler_params: Callable[[], Mapping[str, Any] | None]
    _window: Window
    _repeating_loader: Iterator[Any] | None
    _snapshots: Series | None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a plain Hugging Face directory of the current weights, in the forward's dtype.

        Of a ``PeftModel`` its adapter, in files of the ``peft`` library.

        Args:
            directory: Made where it is missing. Of several ranks the first writes, and the others
                return at once.

        Raises:
            ModelError: The model has no ``save_pretrained``.
        """
        stepper = self.stepper
        stepper.guard.refuse_ended()
        if stepper.replica.is_first:
            stepper.trainable.save(stepper.model, stepper.weights, Path(directory))

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "model.safetensors",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the weights, as the forward computes with them, into one safetensors file.

        Args:
            save_dir: Made where it is missing.
            save_filename: Its suffix becomes ``.safetensors``: no pickle is written.
            exclude_frozen_parameters: Leave out what does not move.

        Returns:
            True: it is written when every rank has come here.
        """
        self.stepper.guard.refuse_ended()
        if self.stepper.replica.is_first:
            path = (Path(save_dir) / save_filename).with_suffix(".safetensors")
            write_model(path, self.stepper.weights, not exclude_frozen_parameters)
        self.stepper.replica.wait_for_all()
        return True

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Literal[True]:
        """Write ``save_dir/tag``, from which a run goes on to the same bits; all ranks call this.

        Args:
            save_dir: Holds the tags and ``latest``.
            tag: A plain name (default: ``global_step`` and the number of steps taken).
            client_state: JSON values, which :meth:`load_checkpoint` gives back.
            save_latest: Whether a load without a tag is to find this one.
            exclude_frozen_parameters: Accepted; what does not move is in the base weights too.

        Raises:
            CheckpointError: A value is not JSON, or the system refuses. Earlier tags stay.
        """
        self.stepper.guard.refuse_ended()
        if self._window.is_open:
            logger.warning("save_checkpoint: micro-batches since the last step are not saved")
        tag = checkpoint.checked_tag(f"global_step{self.global_steps}" if tag is None else tag)
        stepper = self.stepper
        whole = stepper.config.journal.checkpoint == "weights"

        def save() -> bytes:
            state = self._state() | {"client_state": dict(client_state or {})}
            weights = stepper.weights if whole else None
            checkpoint.save(Path(save_dir) / tag, stepper.journal, state, weights, save_latest)
            return b""

        stepper.replica.share(save)
        return True

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: object = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Stand exactly where a tag was saved, wherever this engine stands; all ranks call this.

        Args:
            load_dir: Holds the tags.
            tag: Which (default: what ``latest`` names).
            load_module_strict: Accepted; the weights must fit.
            load_optimizer_states: Whether learning rate and weight decay are taken over.
            load_lr_scheduler_states: Whether the scheduler's place is.
            load_module_only: Take the weights alone, as the base of a run that begins.
            custom_load_fn: Refused.

        Returns:
            The tag's directory and its client state; ``(None, None)`` where nothing was saved.

        Raises:
            CheckpointError: The tag is missing or damaged. Nothing was changed.
            JournalError: It belongs to another run.
        """
        if custom_load_fn is not None:
            raise ConfigError("custom_load_fn: weights live in a store; there is no state dict")
        found = self._read_checkpoint(Path(load_dir), tag)
        if found is None:
            logger.warning("%s: no %s here; nothing was loaded", load_dir, checkpoint.LATEST)
            return None, None
        self._window = self.stepper.new_window(self.gradient_accumulation_steps())
        if load_module_only:
            self._begin_with(found)
        else:
            resume.rewind(self.stepper, found.journal, found.weights, self._snapshots)
            self._take_state(found.state, load_optimizer_states, load_lr_scheduler_states)
        return str(found.directory), found.state["client_state"]

    def continue_journal(self, path: str | Path) -> None:
        """Take over the steps that a journal holds, and append to it; counters and schedule follow.

        Rank 0 holds the file; the others learn of its steps. Snapshots are kept beside it.

        Args:
            path: A journal of the same base weights and settings, or a new one. No step may have
                been taken.

        Raises:
            JournalError: It belongs to another run, or another run has it open.
        """
        if self.stepper.step:
            raise ConfigError(
                f"{path}: a journal is taken up before the first step, and {self.stepper.step} "
                "were taken; make a new engine"
            )
        stepper, header = self.stepper, self.stepper.journal.header.fields
        opened: list[Journal] = []

        def open_file() -> bytes:
            opened.append(Journal.open(path, header))
            return opened[0].content

        content = stepper.replica.share(open_file)
        journal = opened[0] if opened else Journal.of(content, str(path))
        stepper.follow(journal, persists=True)
        options = stepper.config.journal
        self._snapshots = Series(
            Path(f"{path}.snapshots").absolute(), options.snapshot_interval, options.keep_snapshots
        )
        resume.recover(stepper, self._snapshots)
        self._count(stepper.step)
        if self.lr_scheduler is not None:
            for _ in range(self.global_steps):
                self.optimizer.step()
                self.lr_scheduler.step()

    def _keep_snapshot(self) -> None:
        """After a step: the weights, where they are due and this rank writes."""
        stepper, series = self.stepper, self._snapshots
        if series is None or not stepper.replica.is_first or not series.is_due(stepper.step):
            return
        stepper.journal.sync()  # what a snapshot carries must not be lost behind it
        series.write(stepper.weights, stepper.step, stepper.journal.records.lineage())

    def _count(self, steps: int) -> None:
        """Set what DeepSpeed counts to a number of steps taken."""
        self.global_steps = steps
        self.global_samples = steps * self.train_batch_size()
        self.micro_steps = steps * self.gradient_accumulation_steps()
        if isinstance(self.training_dataloader, Loader):
            self.training_dataloader.consumed = self.global_samples
        self._repeating_loader = None
        self.last_result = None

    def _state(self) -> dict[str, Any]:
        """What a tag says beside the journal."""
        scheduler = self.lr_scheduler
        return {
            "global_steps": self.global_steps,
            "global_samples": self.global_samples,
            "optimizer": [
                {key: group[key] for key in ("lr", "weight_decay") if key in group}
                for group in self.optimizer.param_groups
            ],
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }

    def _read_checkpoint(self, directory: Path, tag: object) -> checkpoint.Checkpoint | None:
        """A tag as rank 0 has it; other ranks look for its weights under the same name."""
        read: list[checkpoint.Checkpoint] = []

        def load() -> bytes:
            name = checkpoint.latest_tag(directory) if tag is None else checkpoint.checked_tag(tag)
            if name is None:
                return b""
            read.append(checkpoint.load(directory / name))
            return read[0].pack()

        told = self.stepper.replica.share(load)
        if not told:
            return None
        return read[0] if read else checkpoint.Checkpoint.unpack(told)

    def _begin_with(self, found: checkpoint.Checkpoint) -> None:
        """A checkpoint's weights as the base of a run that begins."""
        stepper = self.stepper
        if stepper.step or stepper.journal.path is not None:
            raise CheckpointError(
                f"{found.directory}: load_module_only is for an engine without steps and without "
                f"journal.path; this one has taken {stepper.step} steps"
            )
        resume.begin_with(stepper, found.journal, found.weights)
        self._agree()

    def _take_state(self, state: Mapping[str, Any], optimizer: bool, scheduler: bool) -> None:
        self._count(self.stepper.step)
        self.global_samples = int(state["global_samples"])
        if isinstance(self.training_dataloader, Loader):
            self.training_dataloader.consumed = self.global_samples
        if scheduler and self.lr_scheduler is not None and state["scheduler"] is not None:
            self.lr_scheduler.load_state_dict(state["scheduler"])
        if optimizer:
            for group, held in zip(self.optimizer.param_groups, state["optimizer"], strict=False):
                group.update(held)

    def _agree(self) -> None:
        """Begin a record in memory, and refuse ranks that would not compute the same bits."""
        header = self.stepper.bit_header()
        self.stepper.follow(Journal.memory(header))
        replica = self.stepper.replica
        base = {"SHA-256": str(header["base_sha256"])}
        replica.refuse_differences("the base weights", base, "load the same checkpoint")
        mend = "start every rank with the same JSON and the same version"
        replica.refuse_differences("the settings", self._settings(header), mend)

    def _settings(self, header: Mapping[str, Any]) -> dict[str, str]:
        """Everything that decides what a step does to the weights, but the scalars."""
        group = self.optimizer.param_groups[0]
        scheduler = {"type": self.scheduler_name(), "params": self.scheduler_params()}
        batches = (self.train_batch_size(), self.gradient_accumulation_steps())
        return {
            **alike.of_block(self.stepper.config),
            "optimizer.params.lr": repr(float(group["lr"])),
            "optimizer.params.weight_decay": repr(float(group.get("weight_decay", 0.0))),
            **alike.flat(scheduler, "scheduler"),
            "train_batch_size, gradient_accumulation_steps": str(batches),
            **alike.flat(as_stored(header), "journal"),
        }
