"""The checks of the hccl transport: two processes with a device each, and no engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from netloader.transports.hccl import HcclTransport
from scripts.checklist import ByHandError
from tests.hccl import contract, scenarios
from tests.hccl.processes import ROOT, Child, receiver, seed

PACKAGES = ("netloader", "torch", "torch-npu", "vllm", "vllm-ascend")
BUFFERS = (20, 100, 256, 512)


@dataclass
class Where:
    """The devices and options that the checks use."""

    source: str
    receivers: list[str]
    large_mib: int
    mib: int = 256
    peer: str = ""
    block_ports: bool = False
    peer_mib: int = 1024

    @property
    def devices(self) -> list[str]:
        """All devices, each once."""
        return list(dict.fromkeys([self.source, *self.receivers]))

    def environment(self, **extra: str) -> dict[str, str]:
        """Environment of the processes: everything that the user set, and `extra`."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            **extra,
        }

    @contextmanager
    def seed(self, environment: dict[str, str] | None = None, **options: Any) -> Iterator[tuple[Child, str]]:
        """A process that serves."""
        with seed(environment or self.environment(), self.source, **options) as made:
            yield made

    def receiver(self, port: str, number: int = 0, environment: dict[str, str] | None = None, **options: Any) -> Child:
        """A process that pulls."""
        device = self.receivers[number % len(self.receivers)]
        return receiver(environment or self.environment(), port, device, **options)


def versions(where: Where) -> str:
    """Versions and every variable of HCCL."""
    del where
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    toolkit = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME") or "?"
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if "HCCL_" in name]
    return f"{', '.join(found)}; CANN at {toolkit}; {' '.join(variables) or 'no HCCL variable is set'}"


def installed_contract(where: Where) -> str:
    """The installed torch_npu has what the transport uses."""
    del where
    import torch
    import torch_npu
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options = ProcessGroupHCCL.Options()
    names = set(contract.ATTRIBUTES) - {"is_completed", "wait"}  # of torch's works, which need a group
    lost = [name for name in sorted(names) if not (hasattr(ProcessGroupHCCL, name) or hasattr(options, name))]
    lost += [f"torch.npu.{name}" for name in contract.EXPORTED if not hasattr(torch.get_device_module("npu"), name)]
    lost += [name for name in ("npu_format_cast", "get_npu_format") if not hasattr(torch_npu, name)]
    if lost:
        raise AssertionError(f"missing: {', '.join(lost)}")
    return f"torch_npu {torch_npu.__version__}: {len(names) + len(contract.EXPORTED) + 2} names are there"


def one_pull(where: Where) -> str:
    """All dtypes, a transposed tensor, an empty one and a scalar arrive; their addresses stay the same."""
    with where.seed(mib=64) as (source, port):
        used = scenarios.at_rest(source)["used"]
        with where.receiver(port, mib=64) as one:
            said = one.heard()
            scenarios.all_right(said)
        after = scenarios.at_rest(source, used)
    return (
        f"{said['nbytes']} bytes in {said['seconds']:.2f} s; device memory in use before {used}, after {after['used']}"
    )


def formats(where: Where) -> str:
    """FRACTAL_NZ in bf16 and int8, and int8 tiles with dtype int32."""
    with where.seed(mib=8, formats=1) as (_, port), where.receiver(port, mib=8, formats=1) as one:
        said = one.heard()
        scenarios.all_right(said)
    return f"{said['nbytes']} bytes right, storages kept"


def large(where: Where) -> str:
    """Many gigabytes; with --large-mib, tensors of more than 4 GB."""
    with where.seed(mib=where.large_mib) as (_, port), where.receiver(port, mib=where.large_mib) as one:
        said = one.heard()
        scenarios.all_right(said)
    return f"{said['nbytes'] / 1e9:.2f} GB at {said['nbytes'] / said['seconds'] / 1e9:.2f} GB/s, digests included"


def buffers(where: Where) -> str:
    """Speed and memory as functions of P2P_HCCL_BUFFSIZE."""
    found = []
    for size in BUFFERS:
        environment = where.environment(P2P_HCCL_BUFFSIZE=str(size))
        options: dict[str, Any] = {"environment": environment, "mib": where.large_mib}
        with where.seed(**options) as (_, port), where.receiver(port, **options) as one:
            said = one.heard()
            scenarios.all_right(said)
            one.ended()
            takes = [line.split(" takes ")[1] for line in one.log if "communicator for weights" in line]
            counted = [text.partition(" of ")[0] for text in takes]
        found.append(f"{size} MB: {said['nbytes'] / said['seconds'] / 1e9:.2f} GB/s, takes {counted}")
    return "; ".join(found)


def killed_receiver(where: Where) -> str:
    """SIGKILL of a receiver in the middle: the seed survives, becomes idle soon, and serves the next one."""
    with where.seed(mib=where.mib, stall=10) as (source, port):
        used = scenarios.at_rest(source)["used"]
        with where.receiver(port, mib=where.mib, then="die") as one:
            one.ended()
        began = time.monotonic()
        after = scenarios.at_rest(source, used)
        seconds = time.monotonic() - began
        with where.receiver(port, number=1, mib=where.mib) as two:
            scenarios.all_right(two.heard())
    return f"at rest {seconds:.1f} s after the end of the receiver; memory before {used}, after {after['used']}"


def stopped_receiver(where: Where) -> str:
    """A receiver that stops reading (SIGSTOP): the seed survives and drops it."""
    with where.seed(mib=where.mib, stall=10) as (source, port):
        used = scenarios.at_rest(source)["used"]
        with where.receiver(port, mib=where.mib, then="stop") as one:
            one.heard()
            began = time.monotonic()
            scenarios.at_rest(source, used)
            seconds = time.monotonic() - began
    return f"at rest after {seconds:.1f} s, with a stall time of 10 s"


def killed_seed(where: Where) -> str:
    """SIGKILL of the seed in the middle: the receiver gets an error and goes on running."""
    with where.seed(mib=where.mib) as (source, port), where.receiver(port, mib=where.mib, then="tell") as one:
        one.heard()
        source.kill()
        began = time.monotonic()
        said = one.ask("go on")
        seconds = time.monotonic() - began
        if one.ended() != 0:
            raise AssertionError(f"the receiver's process ended badly: {one.text()}")
    return f"after {seconds:.1f} s: {said['kind']}"


def many(where: Where) -> str:
    """Ten receivers one after the other, then all receiving devices at once; memory does not grow."""
    with where.seed(mib=64) as (source, port):
        used = scenarios.at_rest(source)["used"]
        for number in range(10):
            with where.receiver(port, number, mib=64) as one:
                scenarios.all_right(one.heard())
        in_turn = scenarios.at_rest(source, used)["used"]
        together = [where.receiver(port, number, mib=64) for number in range(len(where.receivers))]
        for one in together:
            with one:
                scenarios.all_right(one.heard())
        after = scenarios.at_rest(source, used)["used"]
    return f"memory in use: {used} before, {in_turn} after ten in turn, {after} after {len(together)} at once"


def busy(where: Where) -> str:
    """While memory is profiled nothing is opened."""
    with where.seed(mib=8) as (source, port):
        source.ask("still")
        before = source.ask("status")["used"]
        with where.receiver(port, mib=8) as one:
            said = one.heard()
        if "memory is being measured" not in str(said.get("error")):
            raise AssertionError(f"it was served: {said}")
        after = source.ask("status")["used"]
        source.ask("move")
    return f"refused as busy; memory in use {before} and {after}"


def peer_never_connects(where: Where) -> str:
    """A receiver that is ready and then never enters HCCL: only its own session fails, and the next pull works."""
    with where.seed(mib=8) as (source, port):
        used = scenarios.at_rest(source)["used"]
        with where.receiver(port, mib=8, then="never") as one:
            one.heard()
            began = time.monotonic()
            after = scenarios.at_rest(source, used)
            seconds = time.monotonic() - began
            with where.receiver(port, number=1, mib=8, wait=60) as two:
                scenarios.all_right(two.heard())
    return f"at rest after {seconds:.1f} s; memory in use before {used}, after {after['used']}; the next pull is right"


def coexistence(where: Where) -> str:
    """Beside vllm-ascend, in any order of plugins, the load format is netloader's."""
    for package in ("vllm", "vllm_ascend"):
        if importlib.util.find_spec(package) is None:
            raise ByHandError(f"{package} is not installed here: run this line again in the engine's environment")
    script = str(ROOT / "tests" / "hccl" / "ascend" / "registered.py")
    plugins = ("netloader", "ascend_model_loader")
    for order in (plugins, plugins[::-1]):
        done = subprocess.run(
            [sys.executable, script, *order],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env=where.environment(VLLM_PLUGINS="none"),
        )
        if done.returncode != 0:
            raise AssertionError(f"{' then '.join(order)}: {done.stderr[-1000:]}")
        loader = json.loads(done.stdout.splitlines()[-1])["netloader"]
        if not loader.startswith("netloader.vllm."):
            raise AssertionError(f"{' then '.join(order)}: the load format is {loader}'s")
    return "netloader's loader is the registered one in either order"


def rank_table(where: Where) -> str:
    """With RANK_TABLE_FILE, the transport refuses and gives the reason."""
    del where
    before = os.environ.get("RANK_TABLE_FILE")
    os.environ["RANK_TABLE_FILE"] = "/nonexistent"
    try:
        reason = HcclTransport().missing("npu:0")
    finally:
        if before is None:
            del os.environ["RANK_TABLE_FILE"]
        else:
            os.environ["RANK_TABLE_FILE"] = before
    if reason is None:
        raise AssertionError("it would have run")
    return reason


def asleep(where: Where) -> str:
    """Weights are retracted and overwritten while receivers pull, then restored: no receiver has a wrong byte."""
    rounds = 3
    outcomes = []
    with where.seed(mib=where.mib) as (source, port):
        used = scenarios.at_rest(source)["used"]
        for number in range(rounds):
            with where.receiver(port, number, mib=where.mib, then="tell", after=0.1, wait=60) as one:
                one.heard()
                source.ask("sleep")
                one.tell("go on")
                source.ask("wake")
                said = one.heard()
                scenarios.all_right(said)
                outcomes.append(said["retries"])
        after = scenarios.at_rest(source, used)["used"]
    return f"{rounds} rounds right, failed tries on the way: {outcomes}; memory in use {used} before, {after} after"


def graph(where: Where) -> str:
    """A graph that was captured before the pull computes with the new weights when it is replayed."""
    with where.seed(mib=64) as (_, port), where.receiver(port, mib=64, graph=1) as one:
        said = one.heard()
        scenarios.all_right(said)
    if said["replayed"] is None:
        raise ByHandError("this torch_npu has no NPUGraph")
    if not said["replayed"]:
        raise AssertionError("the replay computed with something else than the pulled weights")
    return f"{said['nbytes']} bytes in place, the replay computed with them"


def all_ranks_at_once(where: Where) -> str:
    """Every rank has its own seed and receiver, all at the same time; no device number equals its rank."""
    devices = where.devices
    ranks = len(devices) // 2
    if ranks < 2:  # noqa: PLR2004 - one rank is `one_pull`
        raise ByHandError("name three receiver devices or more: a seed and a receiver for each of two ranks")
    environment = where.environment()
    with ExitStack() as stack:
        ports = [
            stack.enter_context(seed(environment, devices[rank], seed=rank, mib=where.mib))[1] for rank in range(ranks)
        ]
        began = time.monotonic()
        pulling = [
            stack.enter_context(
                receiver(environment, port, devices[ranks + (rank + 1) % ranks], seed=rank, mib=where.mib)
            )
            for rank, port in enumerate(ports)
        ]
        said = [one.heard() for one in pulling]
        seconds = time.monotonic() - began
        for each in said:
            scenarios.all_right(each)
    rates = ", ".join(f"{each['nbytes'] / each['seconds'] / 1e9:.2f}" for each in said)
    return f"{ranks} ranks at once, {seconds:.1f} s with the start of their processes, each at {rates} GB/s"


def two_instances(where: Where) -> str:
    """Two instances on one host, with port ranges `auto`, serve each other's device at the same time."""
    environment = where.environment(HCCL_HOST_SOCKET_PORT_RANGE="auto", HCCL_NPU_SOCKET_PORT_RANGE="auto")
    first, second = where.source, where.receivers[0]
    with (
        seed(environment, first, seed=1, mib=64) as (_, port_of_first),
        seed(environment, second, seed=2, mib=64) as (_, port_of_second),
        receiver(environment, port_of_first, second, seed=1, mib=64) as one,
        receiver(environment, port_of_second, first, seed=2, mib=64) as two,
    ):
        said = [one.heard(), two.heard()]
        for each in said:
            scenarios.all_right(each)
    return f"both ways right, {said[0]['seconds']:.2f} and {said[1]['seconds']:.2f} s"


def two_hosts(where: Where) -> str:
    """A pull from `tests.hccl.child serve` on another host."""
    host, _, port = where.peer.rpartition(":")
    if not host:
        raise ByHandError(
            "on the other host: python -m tests.hccl.child serve --device=npu:0 --host=ITS-ADDRESS "
            f"--mib={where.peer_mib} (it prints its port, and serves until its input ends); then here: "
            f"--only two_hosts --peer ITS-ADDRESS:PORT --peer-mib={where.peer_mib}"
        )
    with where.receiver(port, host=host, mib=where.peer_mib) as one:
        said = one.heard()
        if "error" in said:
            raise AssertionError(said["error"])
        scenarios.all_right(said)
    return f"{said['nbytes'] / 1e9:.2f} GB at {said['nbytes'] / said['seconds'] / 1e9:.2f} GB/s, digests included"


@contextmanager
def blocked(first: int, last: int) -> Iterator[None]:
    """Block connections to these TCP ports of this host while the body runs."""
    rule = ["INPUT", "-p", "tcp", "--dport", f"{first}:{last}", "-m", "comment", "--comment", "netloader", "-j", "DROP"]
    subprocess.run(["iptables", "-I", *rule], check=True, capture_output=True, timeout=30)  # noqa: S607 - root's own
    try:
        yield
    finally:
        subprocess.run(["iptables", "-D", *rule], check=True, capture_output=True, timeout=30)  # noqa: S607


def blocked_ports(where: Where) -> str:
    """HCCL's host ports are blocked: an error within the timeout, and the next pull works."""
    if not where.block_ports or os.geteuid() != 0 or shutil.which("iptables") is None:
        raise ByHandError(
            "as root, with iptables: --only blocked_ports --block-ports drops connections to HCCL's host ports while "
            "it runs; or block the peer's ports by hand: an error in time, and the next pull works"
        )
    first = int(os.environ.get("HCCL_IF_BASE_PORT", "60000"))
    limit = 120.0  # the minimum of HCCL_CONNECT_TIMEOUT
    environment = where.environment(HCCL_CONNECT_TIMEOUT=f"{limit:.0f}")
    with where.seed(environment, mib=8) as (source, port):
        used = scenarios.at_rest(source)["used"]
        began = time.monotonic()
        with (
            blocked(first, first + 31),
            where.receiver(port, environment=environment, mib=8, timeout=limit) as one,
        ):
            said = one.heard(3 * limit)
        seconds = time.monotonic() - began
        if "error" not in said:
            raise AssertionError(f"ports {first} to {first + 31} were blocked, and it was pulled in {seconds:.1f} s")
        scenarios.at_rest(source, used)
        with where.receiver(port, number=1, environment=environment, mib=8, wait=60) as two:
            scenarios.all_right(two.heard())
    return f"after {seconds:.1f} s: {said['kind']}; the next pull is right"


Check = Callable[[Where], str]
CHECKS: tuple[Check, ...] = (
    *(
        versions,
        installed_contract,
        rank_table,
        one_pull,
        formats,
        busy,
        killed_receiver,
        stopped_receiver,
        killed_seed,
        peer_never_connects,
    ),
    *(many, asleep, graph, two_instances, all_ranks_at_once),
    *(large, buffers, blocked_ports, two_hosts, coexistence),
)
