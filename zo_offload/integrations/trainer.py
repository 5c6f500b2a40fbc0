"""Lets what calls ``deepspeed.initialize`` drive our engine: the stock ``transformers.Trainer``.

``transformers`` and ``accelerate`` look ``deepspeed.initialize`` up when they need an engine, and
DeepSpeed offers no registry. So, on request, a function stands in for it that looks into the JSON:
with an enabled ``zeroth_order`` block the engine is ours, without one nothing is different.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from functools import wraps
from typing import Any

from zo_offload import launched
from zo_offload.config import BLOCK, ZOConfig, is_object, load_json, parse_config
from zo_offload.errors import ConfigError
from zo_offload.trainable.detect import is_peft_model

_theirs: Callable[..., Any] | None = None
_until_uninstalled = ExitStack()


def install() -> None:
    """Stand in for ``deepspeed.initialize``; call it before the Trainer is made. Again: nothing.

    Under ``mpirun`` and ``srun`` the ranks are told apart here, before the Trainer looks for them.
    On a CPU DeepSpeed compiles nothing from here on: accelerate starts the process group itself,
    and a collective of DeepSpeed's own, which nothing here uses, would take a minute.

    Example::

        zo_offload.install()
        trainer = Trainer(args=TrainingArguments(deepspeed="ds.json", ...), ...)
        trainer.train()
    """
    import deepspeed

    from zo_offload import engine, process_group

    global _theirs
    if _theirs is not None:
        return
    _until_uninstalled.enter_context(process_group.no_native_ops())
    if launched.by_mpi() or launched.by_srun():
        process_group.init_distributed()
    theirs = _theirs = deepspeed.initialize

    @wraps(theirs)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        if _wants_ours(args, kwargs):
            block = parse_config(_config_of(args, kwargs))
            _refuse_new_adapter(block, *args[1:2], kwargs.get("model"))
            _refuse_shared_batches(block)
            _refuse_unseen_ranks()
            return engine.initialize(*args, **kwargs)
        return theirs(*args, **kwargs)

    deepspeed.initialize = initialize


def uninstall() -> None:
    """Put ``deepspeed.initialize`` back; engines that were made go on."""
    import deepspeed

    global _theirs
    if _theirs is not None:
        deepspeed.initialize = _theirs
        _theirs = None
        _until_uninstalled.close()


def _wants_ours(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the JSON of a call has our block, enabled; a faulty one is ours to refuse.

    Example:
        >>> _wants_ours((), {"config_params": {"zeroth_order": {}}})
        True
        >>> _wants_ours((), {"config": {"zeroth_order": {"enabled": False}}})
        False
        >>> _wants_ours((), {"config": {"zeroth_ordr": {}}})
        True
    """
    config = _config_of(args, kwargs)
    if not is_object(config):
        return False
    if BLOCK not in config:
        return bool(get_close_matches(BLOCK, map(str, config), n=1, cutoff=0.85))
    block = config[BLOCK]
    return not is_object(block) or block.get("enabled", True) is not False


def _config_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    config = kwargs.get("config") or kwargs.get("config_params")
    if config is None:
        config = getattr(args[0] if args else kwargs.get("args"), "deepspeed_config", None)
    return load_json(config) if isinstance(config, str) else config


def _refuse_new_adapter(block: ZOConfig, *models: Any) -> None:
    """The Trainer evaluates and saves the model that it was given, which must be the whole.

    Raises:
        ConfigError: The engine would put another one around it.
    """
    if block.trainable.mode == "peft" and not any(is_peft_model(model) for model in models):
        raise ConfigError(
            f'{BLOCK}.trainable.mode: "peft" in the JSON wraps the model, but a Trainer goes on '
            "with the one that it was given; write "
            "Trainer(model=get_peft_model(model, config), ...)"
        )


def _refuse_shared_batches(block: ZOConfig) -> None:
    """The Trainer's loader deals a micro-batch to one process.

    Raises:
        ConfigError: Several are to run lanes of the same.
    """
    parallel = block.replica.probe_parallel
    if parallel > 1:
        raise ConfigError(
            f"{BLOCK}.replica.probe_parallel: {parallel} ranks would share each micro-batch, and a "
            "Trainer's loader gives every rank its own; write 1, or train with "
            "zo_offload.initialize and train_batch()"
        )


def _refuse_unseen_ranks() -> None:
    """Where there is no accelerator, accelerate may take each of several ranks for the only one.

    Raises:
        ConfigError: It does. Every rank would train on the same data.
    """
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return
    seen, started = state.PartialState().num_processes, launched.num_ranks()
    if seen != started:
        raise ConfigError(
            f"accelerate: sees {seen} rank(s), and {started} were started; without a GPU write "
            "TrainingArguments(use_cpu=True), or accelerate.PartialState(cpu=True) before a loop's "
            "Accelerator is made"
        )
