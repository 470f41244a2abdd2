"""Engines that are started by several `vllm serve` commands, on a simulated host of one card each."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.ascend.processes import PATIENCE, EngineFailed, environment
from tests.ascend.pulls import Digests
from tests.hccl.processes import Child
from tests.preloaded import PYTHON

LOOPBACK = "127.0.0.1"

Arguments = Callable[[Sequence[int]], list[dict[str, Any]]]
"""From free ports to the arguments of each command."""


def over_hosts(count: int, **more: Any) -> Arguments:
    """Commands of one engine whose ranks are divided among hosts."""
    return lambda ports: [
        {"nnodes": count, "node_rank": node, "master_addr": LOOPBACK, "master_port": ports[0], **more}
        for node in range(count)
    ]


def balanced_outside(count: int, **more: Any) -> Arguments:
    """Commands of data-parallel engines, each with an API server, for a load balancer in front of all of them."""
    return lambda ports: [
        {"data_parallel_size": count, "data_parallel_rank": rank, "data_parallel_address": LOOPBACK, **more}
        for rank in range(count)
    ]


def balanced_inside(count: int, **more: Any) -> Arguments:
    """What one command starts for data-parallel engines: an engine core on each of its cards."""
    return lambda ports: [{"data_parallel_size": count, **more} for _ in range(count)]


@dataclass(frozen=True)
class Deployment:
    """An engine, or data-parallel engines of one model.

    Attributes:
        kind: The kind of model.
        arguments: Of the commands.
        hosts: How many hosts there are.
        places: For each rank, what a worker says of its place, as far as it differs from one rank's.
        one_command: Whether it starts all hosts: each stands for an engine core of its own.
        module: What runs on a host.
        python: The interpreter that runs it.
    """

    kind: str
    arguments: Arguments
    hosts: int
    places: Sequence[Mapping[str, int]]
    one_command: bool = False
    module: str = "tests.ascend.host"
    python: str = PYTHON


def free_ports(count: int, *, in_a_row: bool = False) -> list[int]:
    """Ports on which nothing listens."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind((LOOPBACK, 0))
            ports = [first.getsockname()[1]]
            try:
                for _ in range(count - 1):
                    other = stack.enter_context(socket.socket())
                    other.bind((LOOPBACK, ports[-1] + 1 if in_a_row else 0))
                    ports.append(other.getsockname()[1])
            except (OSError, OverflowError):  # taken, or past the last port
                continue
            return ports


@dataclass(frozen=True)
class Rank:
    """What a worker says of itself.

    Attributes:
        topology: Its place in the engine: the attributes of netloader's `Topology`.
        address: Of its server; empty without one.
        digests: Of its tensors.
    """

    topology: Mapping[str, Any]
    address: str
    digests: Digests

    @property
    def number(self) -> int:
        """RANK of netloader's configuration."""
        return int(self.topology["rank"])

    @property
    def port(self) -> int:
        """Of its server."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Running:
    """The hosts of a deployment."""

    deployment: Deployment
    hosts: Sequence[Child]

    @classmethod
    @contextmanager
    def on(cls, cards: Sequence[int], deployment: Deployment) -> Iterator[Self]:
        """A host for each card. All processes have ended after the context."""
        with ExitStack() as stack:
            hosts = [_host(card, deployment, stack) for card in cards[: deployment.hosts]]
            yield cls(deployment, hosts)
            for host in hosts:  # all of them, then wait: each waits for others
                host.tell(json.dumps({"do": "end"}))
            for host in hosts:
                host.heard(PATIENCE)

    def all(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Send each host its task, then read the answers.

        Raises:
            EngineFailed: With what each host that failed logged.
        """
        for host, task in zip(self.hosts, tasks, strict=True):
            host.tell(json.dumps(task))
        answers = [host.heard(PATIENCE) for host in self.hosts]
        failed = [
            f"{answer['error']}\n{host.text()}"
            for host, answer in zip(self.hosts, answers, strict=True)
            if "error" in answer
        ]
        if failed:
            raise EngineFailed("\n\n".join(failed))
        return answers

    def load(self, model: Path, extra: Mapping[str, Any] | None = None, **more: Any) -> list[Rank]:
        """Load `model` on all hosts, with netloader if there are settings for it; all ranks, by their number."""
        ports = free_ports(6)
        tasks = [
            {
                "do": "load",
                "model": str(model),
                "load_format": "auto" if extra is None else "netloader",
                "extra": dict(extra or {}),
                "arguments": {**arguments, **more},
                "core": number if self.deployment.one_command else 0,
                "ports": ports[1:],
            }
            for number, arguments in enumerate(self.deployment.arguments(ports))
        ]
        ranks = [
            Rank(described["topology"], described["address"] or "", described["digests"])
            for answer in self.all(tasks)
            for described in answer["ranks"]
        ]
        return sorted(ranks, key=lambda rank: rank.number)

    def profiled(self) -> None:
        """Measure the memory: until then a server opens nothing on its card."""
        self.all([{"do": "profile"}] * len(self.hosts))

    def count(self, *parts: str) -> int:
        """How many lines the hosts logged with all of `parts` in them."""
        return sum(all(part in line for part in parts) for host in self.hosts for line in host.log)


def _host(card: int, deployment: Deployment, stack: ExitStack) -> Child:
    variables = environment(ASCEND_RT_VISIBLE_DEVICES=str(card))
    return stack.enter_context(Child(variables, module=deployment.module, python=deployment.python))
