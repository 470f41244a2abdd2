"""Backends by URL."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from netloader.discovery import Backend, registry
from netloader.discovery.leases import LeaseBackend
from netloader.discovery.memory import MemoryRegistry
from netloader.discovery.registry import open_backend, without_secrets
from netloader.errors import ConfigError

SECRET = "s3cr/t@?"


def make(url: str) -> Backend:
    del url
    return LeaseBackend(MemoryRegistry())


def picky(url: str) -> Backend:
    raise ConfigError(field="host", value=url, allowed="a host", reason=f"{url} names no host", hint=f"not {url}")


def nothing(url: str) -> None:
    del url


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Entry points besides those of this package."""
    values = {
        "mine": f"{__name__}:make",
        "mine+tls": f"{__name__}:make",
        "picky": f"{__name__}:picky",
        "nothing": f"{__name__}:nothing",
        "gone": f"{__name__}:missing",
        "pigeon": "no_such_package.pigeon:make",
    }
    found = [EntryPoint(name=name, value=value, group=registry.GROUP) for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()


@pytest.mark.parametrize("url", ["mine:", "mine://host:1/0", "MINE://host", "mine+tls://[fd00::1]:1"])
def test_a_scheme_is_an_entry_point(installed: None, url: str) -> None:
    assert isinstance(open_backend(url), LeaseBackend)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("carrier://pigeons", r"DISCOVERY\[1\] = 'carrier://pigeons'.*no scheme 'carrier'.*mine:, mine\+tls:"),
        ("10.0.0.7", r"begins with no scheme.*mine:, mine\+tls:"),
        ("", "begins with no scheme"),
        ("pigeon://x", r"known but can't be loaded: No module named.*install what no_such_package.pigeon needs"),
        ("gone://x", "does not exist"),
        ("nothing://x", "makes no backend: NoneType"),
        ("picky://x", r"DISCOVERY\[1\] = 'picky://x'.*names no host; allowed: a host"),
    ],
)
def test_a_wrong_url_is_refused_by_name(installed: None, url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_backend(url, field="DISCOVERY[1]")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"picky://:{SECRET}@host:1/0", "picky://:***@host:1/0"),
        (f"picky://user:{SECRET}@host:1/0?db=1", "picky://user:***@host:1/0?db=1"),
        ("picky://user@host:1", "picky://user@host:1"),
        ("picky://host:1/0?a=1&Password=s3cret&b=2", "picky://host:1/0?a=1&Password=***&b=2"),
        ("picky://h?auth_token=s3cret#x", "picky://h?auth_token=***#x"),
        ("dir:/a@b/c:d", "dir:/a@b/c:d"),
    ],
)
def test_a_secret_is_never_shown(installed: None, url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    with pytest.raises(ConfigError) as caught:
        open_backend(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert "s3c" not in f"{error!r} {error}"
        error = error.__cause__
