"""URLs of registries: what they say, what is wrong with them, and that no password is shown."""

from __future__ import annotations

import subprocess
import sys

import pytest

from netloader.discovery import registry
from netloader.discovery.registry_urls import parse_registry_url
from netloader.errors import ConfigError

redis = pytest.importorskip("redis", reason="needs the redis extra")
pytest.importorskip("aiohttp", reason="needs the etcd extra")

from netloader.discovery.etcd_store import EtcdRegistry  # noqa: E402
from netloader.discovery.redis_store import RedisRegistry  # noqa: E402

SECRET = "p@:/ss"
WRITTEN = "p%40%3A%2Fss"


def test_a_url_has_hosts_a_user_a_path_and_options() -> None:
    url = parse_registry_url(
        f"Rediss://me:{WRITTEN}@one,two:1,[fd00::1],[fd00::2]:2/a/b/?ttl=5&ca=/x%20y",
        port=6379,
        password_variable="P",
        secure=True,
        environment={"P": "other"},
    )
    assert url.scheme == "rediss"
    assert url.hosts == ("one:6379", "two:1", "[fd00::1]:6379", "[fd00::2]:2")
    assert (url.user, url.password, url.path, url.ttl, url.tls) == ("me", SECRET, "a/b", 5.0, {"ca": "/x y"})
    assert url.shown == "rediss://one:6379,two:1,[fd00::1]:6379,[fd00::2]:2/a/b"
    assert SECRET not in repr(url)


def test_the_environment_may_have_the_password() -> None:
    environment = {"P": SECRET}
    url = parse_registry_url("etcd://me@one", port=1, password_variable="P", secure=False, environment=environment)
    assert url.password == SECRET
    assert SECRET not in repr(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis:host", "not of the form"),
        ("redis://", "names no host"),
        ("redis://one:port", "'one:port' is no address"),
        ("redis+cluster://one,,two", "a comma too many"),
        ("redis://one#x", "fragment"),
        ("redis://one?lease=1", "no option 'lease'"),
        ("redis://one?ca=/x", "'ca' needs TLS"),
        ("rediss://one?key=/x", "without its certificate"),
        ("redis://one?ttl=", "'ttl' is empty or given twice"),
        ("redis://one?ttl=5&ttl=6", "'ttl' is empty or given twice"),
        ("redis://one?ttl=soon", "ttl is not a number"),
        ("redis://one?ttl=0.1", "ttl"),
        ("redis://one?prefix=a*", "prefix"),
        ("redis://one/zero", "'zero' is not a number"),
        ("redis://one/1?db=1", "given twice"),
        ("redis+cluster://one/1", "no numbered databases"),
        ("redis+cluster://one?db=1", "no option 'db'"),
        ("redis://one,two", "names one server"),
        ("redis+sentinel://one", "which master"),
        ("redis://one?service=x", "no option 'service'"),
        ("etcd://one?db=1", "no option 'db'"),
        ("etcd://one/a*", "prefix"),
        ("etcd://me@one", "a user without a password"),
    ],
)
def test_what_is_wrong_is_said_and_no_password_shown(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NETLOADER_ETCD_PASSWORD", raising=False)
    if "@" not in url:
        url = url.replace("://", f"://me:{WRITTEN}@")
    with pytest.raises(ConfigError, match=reason) as caught:
        registry.open_backend(url)
    for text in (str(caught.value), caught.value.hint, repr(caught.value)):
        assert WRITTEN not in text
        assert SECRET not in text


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "rediss+cluster", "etcd", "etcds"])
def test_each_scheme_makes_a_backend(scheme: str) -> None:
    backend = registry.open_backend(f"{scheme}://me:{WRITTEN}@one:1")
    assert backend.publisher() is not None
    assert backend.claims() is not None


@pytest.mark.parametrize("secure", ["", "s"])
def test_sentinels_watch_a_master(secure: str) -> None:
    made = RedisRegistry(f"redis{secure}+sentinel://one,two:2?service=m&db=3&sentinel_password={WRITTEN}")
    assert made.url.hosts == ("one:26379", "two:2")
    assert made.url.options["sentinel_password"] == SECRET
    assert SECRET not in repr(made.url)


def test_etcd_has_a_prefix_and_members() -> None:
    assert EtcdRegistry("etcd://one,two:2/fleet/a").url.path == "fleet/a"


LOADED = """
import sys
from netloader.discovery.registry import open_backend
for url in ("redis://one", "redis+cluster://one", "etcd://one"):
    backend = open_backend(url)
    backend.sources, backend.publisher()
print(sorted({"redis", "aiohttp"} & set(sys.modules)))
"""

MISSING = """
import sys
from netloader.discovery.registry import open_backend
from netloader.errors import ConfigError
sys.modules["redis"] = sys.modules["aiohttp"] = None
for url in ("redis+sentinel://one?service=x", "etcds://one"):
    try:
        open_backend(url)
    except ConfigError as error:
        print(error.hint)
"""


@pytest.mark.parametrize(
    ("program", "output"),
    [(LOADED, "[]\n"), (MISSING, "pip install 'netloader[redis]'\npip install 'netloader[etcd]'\n")],
    ids=["not before it connects", "missing"],
)
def test_libraries_are_imported_beside_the_event_loop_and_missing_ones_are_said(program: str, output: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (output, "")
