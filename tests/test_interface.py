"""Which interface gloo is told, where this host calls itself loopback."""

import os
import socket
from types import SimpleNamespace

import pytest

from zo_offload import interface

INET = socket.AF_INET
FOUND = {
    "lo": [SimpleNamespace(family=INET, address="127.0.0.1")],
    "eth0": [SimpleNamespace(family=INET, address="10.0.0.4")],
    "wlan0": [SimpleNamespace(family=INET, address="192.168.1.4")],
}
ADDRESSES = {"here": "127.0.1.1", "named": "10.0.0.4", "node1": "10.0.0.1"}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that Debian has installed, with two ways out; the first rank is behind the first."""
    monkeypatch.setenv(interface.CHOSEN, "")  # so that what is set here does not stay
    monkeypatch.delenv(interface.CHOSEN)
    monkeypatch.setattr(interface.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(interface, "_address_of", lambda name: ADDRESSES.get(name))
    monkeypatch.setattr(interface, "_source_to", {"10.0.0.1": "10.0.0.4"}.get)
    monkeypatch.setattr(interface.psutil, "net_if_addrs", lambda: FOUND)


def chosen(first_rank: str) -> str | None:
    interface.choose_interface(first_rank)
    return os.environ.get(interface.CHOSEN)


def test_the_way_to_the_first_rank():
    assert chosen("node1") == "eth0"


@pytest.mark.parametrize("first_rank", ["127.0.0.1", "localhost", "::1"])
def test_ranks_of_one_host_need_none(first_rank: str):
    assert chosen(first_rank) is None


def test_a_host_that_others_know_by_its_name_needs_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interface.socket, "gethostname", lambda: "named")
    assert chosen("node1") is None


def test_two_ways_out_are_not_guessed_from(monkeypatch: pytest.MonkeyPatch):
    """On the first rank's own host, whose name says nothing."""
    assert chosen("here") is None
    monkeypatch.setattr(interface, "_source_to", {interface.ELSEWHERE: "192.168.1.4"}.get)
    assert chosen("here") == "wlan0"


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(interface.CHOSEN, "ib0")
    assert chosen("node1") == "ib0"
