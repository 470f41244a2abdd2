"""Redis, Sentinel, a Redis cluster and etcd as real processes on loopback, each in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

__all__ = [
    "Service",
    "a_cluster",
    "a_redis",
    "a_sentinel",
    "an_etcd",
    "cli",
    "etcd_server",
    "free_port",
    "needs",
    "redis_cluster",
    "redis_server",
]

HOST = "127.0.0.1"
PATIENCE = 30.0
"""Seconds in which a service has started; each needs a fraction of one on an idle machine."""

PACKAGES = {
    "redis-server": "redis-server",
    "redis-cli": "redis-tools",
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
    "dnsmasq": "dnsmasq-base",
}


def needs(*programs: str) -> None:
    """Skip the test if a program is missing. In CI, where it could have been installed, fail instead."""
    for program in programs:
        if shutil.which(program) is None:
            why = f"{program} is not installed (package {PACKAGES[program]}): `make services` installs it"
            if os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0:
                pytest.fail(why, pytrace=False)
            pytest.skip(why)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class Service:
    """A process that listens on a port.

    Args:
        command: Its command line.
        folder: Where it runs; its output goes to ``log`` there.
        port: Where it listens.
        ready: Whether it serves, beyond listening.

    Attributes:
        folder: As given.
        port: As given.
    """

    def __init__(self, command: Sequence[str], folder: Path, port: int, ready: Callable[[], bool]) -> None:
        self.folder = folder
        self.port = port
        self._command = command
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it serves."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command, cwd=self.folder, stdout=log, stderr=log)
        until = time.monotonic() + PATIENCE
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                pytest.fail(f"{self._command[0]} does not start:\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def suspend(self) -> None:
        """Let it do nothing. Its connections stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1.0):
        return True
    return False


def cli(port: int, *arguments: str) -> str:
    """The answer of a Redis to a command."""
    command = ["redis-cli", "-h", HOST, "-p", str(port), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE).stdout.strip()


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, port: int, ready: Callable[[], bool]) -> Iterator[Service]:
    service = Service(command, folder, port, ready)
    try:
        service.start()
        yield service
    finally:
        service.kill()


@contextlib.contextmanager
def a_redis(folder: Path, *options: str, port: int | None = None, tls: bool = False) -> Iterator[Service]:
    """A Redis that keeps nothing on disk. With `tls` the options name its certificate."""
    needs("redis-server", "redis-cli")
    port = free_port() if port is None else port
    listening = ["--port", "0", "--tls-port", str(port)] if tls else ["--port", str(port)]
    command = ["redis-server", "--bind", HOST, *listening, "--save", "", "--dir", str(folder), *options]
    with running(
        command,
        folder,
        port,
        lambda: listens(port) and (tls or "PONG" in cli(port, "ping") or "NOAUTH" in cli(port, "ping")),
    ) as it:
        yield it


@contextlib.contextmanager
def a_sentinel(folder: Path, master: Service, name: str) -> Iterator[Service]:
    """A Sentinel that watches one master, and decides alone that it is down."""
    port = free_port()
    lines = [
        f"port {port}",
        f"bind {HOST}",
        f"sentinel monitor {name} {HOST} {master.port} 1",
        f"sentinel down-after-milliseconds {name} 500",
        f"sentinel failover-timeout {name} 3000",
    ]
    file = folder / "sentinel.conf"
    file.write_text("\n".join(lines) + "\n", encoding="ascii")
    command = ["redis-server", str(file), "--sentinel"]
    with running(command, folder, port, lambda: "PONG" in cli(port, "ping")) as it:
        yield it


@contextlib.contextmanager
def a_cluster(folder: Path) -> Iterator[list[Service]]:
    """Three masters that share the slots. Nodes that were there before tell where all are."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for number in range(3):
            own = folder / str(number)
            own.mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--cluster-node-timeout", "2000"]
            nodes.append(stack.enter_context(a_redis(own, *options)))
        addresses = [node.address for node in nodes]
        command = ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        until = time.monotonic() + PATIENCE
        while not all("cluster_state:ok" in cli(node.port, "cluster", "info") for node in nodes):
            assert time.monotonic() < until, "the cluster does not come up"
            time.sleep(0.05)
        yield nodes


@contextlib.contextmanager
def an_etcd(folder: Path, *options: str) -> Iterator[Service]:
    """An etcd of one member, with data on disk."""
    needs("etcd", "etcdctl")
    port, peers = free_port(), f"http://{HOST}:{free_port()}"
    own = any(option.startswith("--listen-client-urls") for option in options)
    command = [
        *("etcd", "--name", "one", "--data-dir", str(folder / "data"), "--logger", "zap"),
        *(() if own else ("--listen-client-urls", f"http://{HOST}:{port}")),
        *(() if own else ("--advertise-client-urls", f"http://{HOST}:{port}")),
        *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"one={peers}"),
        *options,
    ]
    with running(command, folder, port, lambda: etcd_is_ready(port)) as it:
        yield it


def etcd_is_ready(port: int) -> bool:
    return listens(port) and etcdctl(port, "endpoint", "health").returncode == 0


def etcdctl(port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["etcdctl", "--endpoints", f"{HOST}:{port}", *arguments]
    environment = {**os.environ, "ETCDCTL_API": "3"}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE, env=environment)


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="netloader-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Service]:
    """A Redis that tests share: each uses names of its own, and none stops it."""
    with _folder() as folder, a_redis(folder) as service:
        yield service


@pytest.fixture(scope="module")
def redis_cluster() -> Iterator[list[Service]]:
    """A Redis cluster that the tests of a module share."""
    with _folder() as folder, a_cluster(folder) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def etcd_server() -> Iterator[Service]:
    """An etcd that tests share, as above."""
    with _folder() as folder, an_etcd(folder) as service:
        yield service
