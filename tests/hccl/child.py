"""One process of a scenario: serves or pulls weights on an ``npu``, and reports on stdout in JSON lines."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
import torch_npu

import netloader
from netloader.core.report import Progress
from netloader.errors import NetloaderError
from netloader.transports.hccl import devices
from netloader.transports.hccl import link as hccl_link
from tests.hccl import weights


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def never(link: hccl_link.HcclLink) -> None:
    """Replaces the first operation; never returns."""
    say(ready=True)
    sys.stdin.readline()


def status(device: str) -> dict[str, Any]:
    """The state of the seed in this process."""
    count, nbytes = devices.device_of(device).usage()
    npu: Any = torch.get_device_module("npu")
    npu.set_device(device)
    free, total = npu.mem_get_info(device)
    threads = sorted(t.name for t in threading.enumerate() if t.name.startswith("netloader-hccl"))
    return {
        "communicators": count,
        "communicator_bytes": nbytes,
        "used": total - free,
        "threads": threads,
        "environment": os.environ.get("TORCH_HCCL_BLOCKING_WAIT"),
    }


async def serve(args: argparse.Namespace) -> None:
    values = weights.on_cpu(args.seed, args.mib)
    tensors = weights.on_device(values, args.device, empty=False)
    if args.formats:
        tensors |= weights.in_formats(args.seed, args.device, empty=False)[0]
    server = netloader.Server(
        tensors, host=args.host, transport="hccl", stall_timeout=args.stall, max_clients=args.clients, fan_out=0
    )
    async with server:
        say(port=server.port, torch_npu=torch_npu.__version__)
        while True:
            line = await asyncio.to_thread(sys.stdin.readline)
            match line.strip():
                case "status":
                    say(**await asyncio.to_thread(status, args.device), sessions=len(server.sessions))
                case "still":
                    await asyncio.to_thread(devices.hold_still, args.device, "memory is being measured", 0.5)
                    say(still=True)
                case "move":
                    await asyncio.to_thread(devices.move_again, args.device)
                    say(still=False)
                case "sleep":
                    await server.retract("target", reason="the weights are asleep")
                    await asyncio.to_thread(weights.overwrite, tensors)
                    say(asleep=True)
                case "wake":
                    await asyncio.to_thread(weights.put_back, tensors, values)
                    await server.hold(tensors)
                    say(asleep=False)
                case _:
                    break


class Graph:
    """Work on a weight captured before the pull and replayed after it: it has to use the new bytes.

    Args:
        weight: Four bytes an element.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        npu: Any = torch.get_device_module("npu")
        self._bits = weight.view(torch.int32)
        self._mask = torch.full_like(self._bits, 0x5A5A5A5A)
        self._out = torch.empty_like(self._bits)
        torch.bitwise_xor(self._bits, self._mask, out=self._out)  # graphs need one run before the capture
        npu.synchronize()
        self._graph = npu.NPUGraph()
        with npu.graph(self._graph):
            torch.bitwise_xor(self._bits, self._mask, out=self._out)

    @staticmethod
    def possible() -> bool:
        return hasattr(torch.get_device_module("npu"), "NPUGraph")

    def replayed(self, expected: torch.Tensor) -> bool:
        """Whether a replay computes with `expected`."""
        npu: Any = torch.get_device_module("npu")
        self._graph.replay()
        npu.synchronize()
        return torch.equal(self._out.cpu() ^ 0x5A5A5A5A, expected.view(torch.int32))


async def pull(args: argparse.Namespace) -> None:
    expected = weights.on_cpu(args.seed, args.mib)
    tensors = weights.on_device(expected, args.device, empty=True)
    if args.formats:
        tiled, plain = weights.in_formats(args.seed, args.device, empty=True)
        tensors |= tiled
        expected |= plain
    graph = Graph(tensors["large.0"]) if args.graph and Graph.possible() else None
    at = {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def progressed(progress: Progress) -> None:
        if progress.verified >= progress.total * args.after:
            match args.then:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    say(stopped=True)
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "tell":
                    say(verified=progress.verified)
                    sys.stdin.readline()
                    args.then = ""

    if args.then == "never":  # it is ready to connect, and then hangs
        hccl_link.HcclLink.first = never  # type: ignore[method-assign,assignment]
    began = time.monotonic()
    try:
        report = await netloader.pull(
            tensors,
            sources=[f"{args.host}:{args.port}"],
            transport="hccl",
            timeout=args.timeout,
            wait=args.wait,
            stall_timeout=args.stall,
            progress=progressed,
            follow=False,
        )
    except NetloaderError as error:
        say(error=str(error), kind=type(error).__name__, seconds=time.monotonic() - began)
        return
    moved = [name for name, tensor in tensors.items() if tensor.data_ptr() != at[name]]
    nbytes, seconds = report.nbytes, report.seconds
    replayed = None if graph is None else graph.replayed(expected["large.0"])
    wrong = weights.wrong(tensors, expected)
    say(wrong=wrong, moved=moved, nbytes=nbytes, seconds=seconds, retries=report.retries, replayed=replayed)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["serve", "pull"])
    parser.add_argument("--device", required=True)
    parser.add_argument("--host", default="127.0.0.1", help="where to serve, or whom to pull from")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--graph", type=int, default=0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--mib", type=int, default=48)
    parser.add_argument("--stall", type=float, default=30.0)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--formats", type=int, default=0)
    parser.add_argument("--then", default="")
    parser.add_argument("--after", type=float, default=0.3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    asyncio.run(serve(args) if args.what == "serve" else pull(args))
    sys.stdout.flush()
    # Without the interpreter's clean-up: the libraries crash in it where there is no device.
    os._exit(0)


if __name__ == "__main__":
    # At exit Python runs the garbage collector over all of torch: half a second, and tests start many of these.
    atexit.register(gc.freeze)
    main()
