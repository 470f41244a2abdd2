"""The port for Prometheus and for probes: what it answers, how it is told about, and what a stranger can do to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from netloader.checkpoint import make_demo_checkpoint
from netloader.errors import ConfigError
from netloader.observe.metrics_server import MetricsServer
from tests.commands import PATIENCE, run, serving


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("eggs", "Eggs.", registry=made).inc(3)
    return made


def test_metrics_health_and_readiness(registry: CollectorRegistry) -> None:
    why = ["not yet"]
    with MetricsServer("127.0.0.1", 0, registry, ready=lambda: why[0], field="METRICS_PORT") as server:
        assert get(server.port, "/healthz") == (200, "ok\n")
        assert get(server.port, "/readyz") == (503, "not yet\n")
        why[0] = ""
        assert get(server.port, "/readyz") == (200, "ready\n")
        status, text = get(server.port, "/metrics")
        assert (status, "eggs_total 3.0" in text) == (200, True)
        assert get(server.port, "/")[0] == 404
    with pytest.raises(urllib.error.URLError):
        get(server.port, "/healthz")
    assert not [thread for thread in threading.enumerate() if thread.name == "netloader-metrics"]


def test_all_addresses_are_those_of_both_families(registry: CollectorRegistry) -> None:
    with MetricsServer("", 0, registry, ready=str, field="METRICS_PORT") as server:
        assert get(server.port, "/healthz")[0] == 200
        if socket.has_dualstack_ipv6():
            assert get(server.port, "/healthz", host="[::1]")[0] == 200


def test_a_port_that_is_taken_is_named(registry: CollectorRegistry) -> None:
    with (
        MetricsServer("127.0.0.1", 0, registry, ready=str, field="METRICS_PORT") as first,
        pytest.raises(ConfigError, match=f"METRICS_PORT = {first.port} is not valid: Address already in use") as raised,
    ):
        MetricsServer("127.0.0.1", first.port, registry, ready=str, field="METRICS_PORT")
    assert raised.value.hint


def test_silent_connections_do_not_keep_prometheus_out(registry: CollectorRegistry) -> None:
    """They hold the few threads for a few seconds; and closing the server does not wait for them."""
    with MetricsServer("127.0.0.1", 0, registry, ready=str, field="METRICS_PORT") as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        before = threading.active_count()
        for _ in range(30):
            try:
                assert get(server.port, "/healthz")[0] == 200
                break
            except (OSError, urllib.error.URLError):
                continue
        else:
            pytest.fail("silent connections kept others out")
        assert before < 20
    for one in silent:
        one.close()


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_dripping_connections_do_not_keep_a_probe_out(registry: CollectorRegistry, path: str) -> None:
    """More of them than there are threads send a byte now and then, and come back when they are closed."""
    done = threading.Event()
    begun = threading.Barrier(13)

    def drip(port: int) -> None:
        first = True
        while not done.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)) as one:
                if first:
                    begun.wait(PATIENCE)
                    first = False
                while not done.wait(0.2):
                    one.sendall(b"a")

    with MetricsServer("127.0.0.1", 0, registry, ready=str, field="METRICS_PORT") as server:
        drips = [threading.Thread(target=drip, args=(server.port,)) for _ in range(12)]
        for each in drips:
            each.start()
        try:
            begun.wait(PATIENCE)
            for _ in range(3):
                began = time.monotonic()
                assert get(server.port, path)[0] == 200
                assert time.monotonic() - began < 5.0
        finally:
            done.set()
            for each in drips:
                each.join()


def test_a_request_has_a_deadline_though_there_is_room(registry: CollectorRegistry) -> None:
    with (
        MetricsServer("127.0.0.1", 0, registry, ready=str, field="METRICS_PORT") as server,
        socket.create_connection(("127.0.0.1", server.port)) as one,
    ):
        began = time.monotonic()
        one.settimeout(0.5)
        while time.monotonic() - began < PATIENCE:
            with suppress(TimeoutError, ConnectionError):
                one.sendall(b"a")
                if one.recv(1) == b"":
                    break
        assert 4.0 < time.monotonic() - began < 10.0


def test_closing_ends_requests_that_are_not_complete(registry: CollectorRegistry) -> None:
    with MetricsServer("127.0.0.1", 0, registry, ready=str, field="METRICS_PORT") as server:
        one = socket.create_connection(("127.0.0.1", server.port))
        one.sendall(b"GET /heal")
        assert get(server.port, "/healthz")[0] == 200  # so the connection before it was accepted
    with one:
        one.settimeout(3.0)
        while one.recv(1024):  # it is told that this was no request
            pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_demo_checkpoint(tmp_path / "model", 1 << 20)
    return tmp_path / "model"


def test_the_command_exposes_what_it_serves(model: Path) -> None:
    with serving(model, "--metrics-port", 0) as server:
        (line,) = [line for line in server.lines if "metrics at port" in line]
        port = int(line.split()[-1])
        assert get(port, "/readyz") == (200, "ready\n")
        assert run("pull", server.address, "-o", model.parent / "copy", "--transport", "tcp").returncode == 0
        _, text = get(port, "/metrics")
        assert 'netloader_bytes_total{side="server",transport="tcp"}' in text
        assert "process_resident_memory_bytes" in text


def test_the_command_names_the_extra_before_it_reads_anything(model: Path) -> None:
    code = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from netloader.cli import main\n"
        f"sys.exit(main(['serve', {str(model)!r}, '--metrics-port', '0']))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.returncode == 2
    assert "--metrics-port" in ran.stderr
    assert "netloader[metrics]" in ran.stderr
    assert "root" not in ran.stdout


def test_a_taken_port_ends_the_command(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = run("serve", model, "--host", "127.0.0.1", "--metrics-port", taken.getsockname()[1])
    assert ran.returncode == 2
    assert "--metrics-port" in ran.stderr
