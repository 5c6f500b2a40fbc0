"""Standing in for deepspeed.initialize: only where the JSON asks for it, and not for ever."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from engine.common import config, net

import zo_offload
from zo_offload import launched
from zo_offload.errors import ConfigError


@pytest.fixture
def installed() -> Iterator[None]:
    zo_offload.install()
    zo_offload.install()  # again: nothing
    yield
    zo_offload.uninstall()


@pytest.mark.usefixtures("installed")
def test_a_json_with_our_block_makes_our_engine(tmp_path: Path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config()))
    given: dict[str, Any]
    for given in ({"config": str(path)}, {"config_params": config()}):
        engine, *_ = deepspeed.initialize(model=net(), **given)
        assert type(engine).__name__ == "ZOEngine"
        engine.destroy()
    arguments = SimpleNamespace(deepspeed_config=str(path))
    engine, *_ = deepspeed.initialize(arguments, net())
    assert type(engine).__name__ == "ZOEngine"
    engine.destroy()


@pytest.mark.usefixtures("installed")
def test_ranks_that_share_a_micro_batch_are_refused():
    given = config(zeroth_order={"replica": {"probe_parallel": 2}})
    with pytest.raises(ConfigError, match=r"probe_parallel: 2 ranks .* a Trainer's loader gives"):
        deepspeed.initialize(model=net(), config=given)


@pytest.mark.usefixtures("installed")
def test_ranks_that_accelerate_does_not_see_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Each would train on all the data."""
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator()
    monkeypatch.setattr(launched, "num_ranks", lambda: 2)
    with pytest.raises(ConfigError, match=r"accelerate: sees 1 rank.*, and 2 .*use_cpu=True"):
        deepspeed.initialize(model=net(), config=config())
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("installed")
def test_nothing_is_compiled_while_it_is_installed():
    """DeepSpeed asks this table before it compiles a collective for CPUs."""
    assert deepspeed.ops.__dict__["__compatible_ops__"] == {"deepspeed_shm_comm": False}
    zo_offload.uninstall()
    assert "deepspeed_shm_comm" not in deepspeed.ops.__dict__.get("__compatible_ops__", {})


@pytest.mark.parametrize("block", [None, {"enabled": False}])
def test_without_it_deepspeed_is_called(monkeypatch: pytest.MonkeyPatch, block: dict | None):
    monkeypatch.setattr(deepspeed, "initialize", lambda *args, **kwargs: (args, kwargs))
    zo_offload.install()
    try:
        given = {} if block is None else {"zeroth_order": block}
        assert deepspeed.initialize(1, config=given) == ((1,), {"config": given})
    finally:
        zo_offload.uninstall()


def test_uninstalled_it_is_as_before():
    before = deepspeed.initialize
    zo_offload.install()
    zo_offload.uninstall()
    zo_offload.uninstall()
    assert deepspeed.initialize is before
