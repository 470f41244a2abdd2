"""Engines that find each other without an address typed, and of which one reads the files for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.discovery.nameserver import DOMAIN, NameServer, needs_dnsmasq
from tests.discovery.services import a_redis
from tests.e2e import engines
from tests.e2e.engines import Engine
from tests.e2e.hosts import make_hosts
from tests.e2e.scenario import HELD, Scenario, environment_with_plugins
from tests.models import PROMPTS, ModelStore

pytestmark = pytest.mark.slow

WAIT = 400
DEFAULT = "the default loader (auto) loads the target"
PULLED = "netloader: rank 0: target: pulled "


@pytest.fixture
def stage(models: ModelStore, tmp_path: Path) -> Iterator[Scenario]:
    full, bare = make_hosts(tmp_path, models, "llama-blocks")
    with ExitStack() as stack:
        yield Scenario(stack, tmp_path, full, bare)


@pytest.fixture(params=["dir", "redis"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a registry."""
    folder = tmp_path / "registry"
    folder.mkdir()
    if request.param == "dir":
        yield f"dir:{folder}"
        return
    pytest.importorskip("redis", reason="needs the redis extra")
    with a_redis(folder) as service:
        yield f"redis://{service.address}"


def start(stage: Scenario, name: str, host: Path, registry: str, **settings: Any) -> Engine:
    config = {"DISCOVERY": registry, "WAIT": WAIT, **settings}
    return stage.start(name, host, environment=environment_with_plugins(), config=config, niceness=2)


def test_engines_find_each_other_and_a_third_one_while_the_second_still_loads(stage: Scenario, registry: str) -> None:
    """Only the first one has weight files. It holds in the middle of each transfer until all have begun."""
    first = stage.held("first", files=True, SOURCE=[], DISCOVERY=registry)
    first.wait_addresses()
    second = start(stage, "second", stage.bare, registry, **HELD)
    stage.wait_held("first", 1)  # the second one is in the middle of its pull
    third = start(stage, "third", stage.bare, registry, **HELD)
    third.wait_line(": transport held")  # and the third one pulls beside it, or from it
    assert not second.lines(PULLED)
    (stage.folder / "first-goes-on").touch()
    engines.wait_all_ready(first, second, third)
    answers = first.answers(PROMPTS)
    for engine in (second, third):
        assert engine.lines(PULLED)
        assert not engine.lines(DEFAULT)
        assert engine.answers(PROMPTS) == answers


@needs_dnsmasq
def test_engines_find_each_other_by_dns(stage: Scenario, tmp_path: Path) -> None:
    """Each engine listens at an address of its own and at the same port, like the pods of a headless service."""
    folder = tmp_path / "names"
    folder.mkdir()
    with NameServer(folder) as names:
        names.set(engines=["127.0.0.2", "127.0.0.3"])
        port = engines.free_port()
        url = f"dns://engines.{DOMAIN}:{port}?server={names.address}"
        first = start(stage, "first", stage.full, url, LISTEN_HOST="127.0.0.2", LISTEN_PORT=port, WAIT=0)
        engines.wait_all_ready(first)
        second = start(stage, "second", stage.bare, url, LISTEN_HOST="127.0.0.3", LISTEN_PORT=port)
        engines.wait_all_ready(second)
        (line,) = second.lines(PULLED)
        assert f"127.0.0.2:{port}" in line
        assert not second.lines(DEFAULT)
        assert second.answers(PROMPTS) == first.answers(PROMPTS)


def test_of_two_engines_that_start_together_one_reads_the_files(stage: Scenario, tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="needs the redis extra")
    folder = tmp_path / "registry"
    folder.mkdir()
    with a_redis(folder) as service:
        url = f"redis://{service.address}"
        one, two = (start(stage, name, stage.full, url, ORIGIN="lease") for name in ("one", "two"))
        engines.wait_all_ready(one, two)
        readers = [engine for engine in (one, two) if engine.lines(DEFAULT)]
        pullers = [engine for engine in (one, two) if engine.lines(PULLED)]
        assert (len(readers), len(pullers)) == (1, 1)
        assert readers[0].lines("loads the target from storage: nobody holds it")
        assert one.answers(PROMPTS) == two.answers(PROMPTS)


def test_an_origin_by_lease_is_refused_where_the_registry_gives_none(stage: Scenario, tmp_path: Path) -> None:
    engine = start(stage, "refused", stage.full, f"dir:{tmp_path}", ORIGIN="lease")
    assert engine.wait_ended() != 0
    assert "ORIGIN = 'lease' is not valid" in engine.text()
    assert "can't give a lease" in engine.text()
