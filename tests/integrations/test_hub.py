"""A model that is nowhere: told at once where the hub is not reached, left to its library else."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cli.common import assert_one_line, invoke
from huggingface_hub import constants
from transformers import AutoConfig, PreTrainedConfig

from zo_offload.errors import ModelError
from zo_offload.integrations import hf, hub
from zo_offload.integrations.model_kind import kind_of
from zo_offload.plan.shapes import config_of

NAME = "facebok/opt-125m"
TOLD = rf"{NAME}: no such directory here, not in the hub's cache, and http://[\d.:]+ is not"
LOADERS: list[Callable[[str], Any]] = [hf.load_model, hf.load_tokenizer, kind_of, config_of]


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    """A port of this machine at which connections are made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def endpoint(listening: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a hub that may be asked, with an empty cache, and no proxy before it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", address_of(listening))
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(hub, "getproxies", dict)
    return address_of(listening)


@pytest.fixture
def closed(endpoint: str, listening: socket.socket) -> str:
    listening.close()
    return endpoint


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that the library is asked for; it finds none."""
    names: list[str] = []

    def find_none(name: str, **_: Any) -> Any:
        names.append(name)
        raise OSError("nothing is there")

    monkeypatch.setattr(AutoConfig, "from_pretrained", find_none)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", find_none)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", find_none)
    return names


@pytest.mark.parametrize("load", LOADERS)
def test_where_the_hub_is_not_reached_its_library_is_not_asked(closed: str, asked, load):
    with pytest.raises(ModelError, match=TOLD):
        load(NAME)
    assert not asked


@pytest.mark.parametrize("load", LOADERS)
def test_where_the_hub_is_reached_its_library_says_what_is_there(endpoint: str, asked, load):
    with suppress(ModelError):  # a configuration that it does not find is told by another
        load(NAME)
    assert asked == [NAME]


def test_what_is_in_the_cache_needs_no_hub(closed: str, asked, tmp_path):
    folder = tmp_path / f"models--{NAME.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    hub.check_reached(NAME)


@pytest.mark.parametrize("name", ["/no/such/directory", "a/b/c", "."])
def test_a_path_needs_no_hub(closed: str, name: str):
    hub.check_reached(name)


def test_offline_mode_needs_no_hub(closed: str, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.check_reached(NAME)


@pytest.mark.parametrize("scheme", ["http", "all"])
def test_what_is_behind_a_proxy_is_left_to_the_library(closed: str, monkeypatch, scheme: str):
    monkeypatch.setattr(hub, "getproxies", lambda: {scheme: "http://127.0.0.1:9"})
    assert hub.is_reached(closed, 0.1)


@pytest.mark.parametrize("address", ["", "no address", "http://host:port", "ftp://host"])
def test_an_address_that_is_none_is_left_to_the_library(address: str):
    assert hub.is_reached(address, 0.1)


def test_a_name_server_that_does_not_answer_is_not_waited_for(endpoint: str, monkeypatch):
    answered = threading.Event()

    def look_up(*_: Any, **__: Any) -> Any:
        answered.wait()
        raise socket.gaierror

    monkeypatch.setattr(hub.socket, "create_connection", look_up)
    try:
        assert not hub.is_reached(endpoint, 0.05)
    finally:
        answered.set()


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--model", NAME, "--dev", "dev.tsv", "--template", "{text}", "--labels", "a,b"],
        ["plan", "--model", NAME],
    ],
)
def test_a_mistyped_model_is_one_line(closed: str, command: list[str]):
    assert_one_line(invoke(command), TOLD)
