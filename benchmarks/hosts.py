"""Several hosts on one machine: network namespaces on a bridge, each with a shaped link. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Host", "hosts", "why_not"]

_SUBNET = "10.231.17"


@dataclass(frozen=True)
class Host:
    """One network namespace.

    Attributes:
        name: Name of the namespace.
        address: Its address on the bridge.
    """

    name: str
    address: str

    def command(self, *args: str) -> list[str]:
        """A command line that runs `args` on that host."""
        return ["ip", "netns", "exec", self.name, *args]


def why_not() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found: install iproute2" if missing else None


def _run(*args: str) -> None:
    subprocess.run(args, check=True, capture_output=True)


def _shape(prefix: list[str], device: str, mbit: int) -> None:
    # The burst must hold what may leave in one timer tick; the latency bounds the queue, as in a switch.
    burst = max(64, mbit * 1000 // 8 // 250) * 1024 // 1000
    _run(*prefix, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{mbit}mbit", "burst", f"{burst}kb",
         "latency", "50ms")  # fmt: skip


@contextmanager
def hosts(rates: list[int]) -> Iterator[list[Host]]:
    """Hosts with links of these rates, in Mbit/s, in each direction; removed at the end.

    Raises:
        RuntimeError: They cannot be made here.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    # On a signal to end, from a time limit for example, the hosts are removed too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tag = f"nl{os.getpid() % 10_000}"
    bridge = f"{tag}b"
    made: list[Host] = []
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for number, mbit in enumerate(rates):
            host = Host(f"{tag}h{number}", f"{_SUBNET}.{number + 1}")
            outside, inside = f"{tag}v{number}", f"{tag}w{number}"
            _run("ip", "netns", "add", host.name)
            made.append(host)
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            _run("ip", "link", "set", inside, "netns", host.name)
            _run("ip", "link", "set", outside, "master", bridge, "up")
            _run(*host.command("ip", "link", "set", "lo", "up"))
            _run(*host.command("ip", "addr", "add", f"{host.address}/24", "dev", inside))
            _run(*host.command("ip", "link", "set", inside, "up"))
            _shape(host.command(), inside, mbit)
            _shape([], outside, mbit)
        yield made
    finally:
        for host in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "netns", "delete", host.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "delete", bridge)
