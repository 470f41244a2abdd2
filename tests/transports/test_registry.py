from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint

import pytest

from netloader.errors import TransportUnavailable
from netloader.transports import registry
from netloader.transports.base import Channel, Pending, Setup
from netloader.transports.memory import MemoryTransport


class Plugin:
    name = "plugin"

    def missing(self, device: str) -> str | None:
        return None if device == "cpu" else "it is for the CPU"

    def facts(self, device: str) -> Mapping[str, str]:
        return {}

    async def offer(self, setup: Setup) -> Pending:
        raise NotImplementedError

    async def connect(self, offer: bytes, setup: Setup) -> Channel:
        raise NotImplementedError


class Misnamed(Plugin):
    name = "something else"


class NotOne:
    name = "notone"


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=registry.GROUP)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points besides those of this package; the test fills the list."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    for cached in (registry._entries, registry.load):
        cached.cache_clear()
    yield entries
    for cached in (registry._entries, registry.load):
        cached.cache_clear()


def test_the_packages_own_transports_are_known_without_being_installed(installed: list[EntryPoint]) -> None:
    assert {"gloo", "memory", "shm", "tcp"} <= set(registry.known())
    memory = registry.load("memory")
    assert isinstance(memory, MemoryTransport)
    assert registry.load("memory") is memory


def test_plugins_are_found_and_used_by_name_only(installed: list[EntryPoint]) -> None:
    installed.append(entry("plugin", f"{__name__}:Plugin"))
    assert [t.name for t in registry.available("cpu", "plugin").transports] == ["plugin"]
    assert "plugin" not in [t.name for t in registry.available("cpu").transports]
    auto = [t.name for t in registry.available("cpu").transports]
    both = registry.available("cpu", ["plugin", "auto", "memory"])
    assert [t.name for t in both.transports] == ["plugin", *auto, "memory"]


def test_an_unknown_name_and_one_that_is_not_installed_have_different_errors(installed: list[EntryPoint]) -> None:
    with pytest.raises(TransportUnavailable, match=r"there is no transport 'carrier'.*gloo, hccl, memory"):
        registry.available("cpu", "carrier")
    with pytest.raises(TransportUnavailable, match="there is no transport 'carrier'"):
        registry.load("carrier")
    installed.append(entry("pigeon", "no_such_package.pigeon:Pigeon"))
    registry._entries.cache_clear()
    with pytest.raises(TransportUnavailable, match=r"known but can't be loaded.*no_such_package"):
        registry.load("pigeon")
    with pytest.raises(TransportUnavailable, match=r"no transport can run here.*no_such_package"):
        registry.available("cpu", "pigeon")
    found = registry.available("cpu", ["pigeon", "memory"])
    assert [t.name for t in found.transports] == ["memory"]
    assert "no_such_package" in found.reasons["pigeon"]


def test_the_packages_own_transports_name_the_missing_extra(
    installed: list[EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "netloader.transports.gloo", None)
    with pytest.raises(TransportUnavailable, match=r"extra `torch`"):
        registry.load("gloo")


def test_the_reason_why_a_device_is_excluded_is_named(installed: list[EntryPoint]) -> None:
    with pytest.raises(TransportUnavailable, match=r"for tensors on npu:3: memory: .*not on npu:3"):
        registry.available("npu:3", "memory")


@pytest.mark.parametrize("value", ["Misnamed", "NotOne", "Absent"])
def test_an_object_that_is_not_a_transport_is_refused(installed: list[EntryPoint], value: str) -> None:
    installed.append(entry("odd", f"{__name__}:{value}"))
    with pytest.raises(TransportUnavailable, match=value):
        registry.load("odd")


def test_no_plugin_replaces_one_of_the_packages_own_transports(
    installed: list[EntryPoint], caplog: pytest.LogCaptureFixture
) -> None:
    installed.append(entry("memory", f"{__name__}:Plugin"))
    assert isinstance(registry.load("memory"), MemoryTransport)
    assert "ignoring" in caplog.text


def test_hccl_is_for_npu_only() -> None:
    assert registry.preferred("npu:0") == ("hccl", "shm", "tcp")
    assert registry.preferred("cpu") == ("shm", "tcp")


def test_gloo_is_used_by_name_only(installed: list[EntryPoint]) -> None:
    assert "gloo" not in [t.name for t in registry.available("cpu").transports]
    assert [t.name for t in registry.available("cpu", ["tcp", "gloo"]).transports] == ["tcp", "gloo"]


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; from netloader.transports import registry; registry.known();"
        "registry.available('cpu', 'memory'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
