"""Stands in for the command `vllm` where no vLLM is installed: netloader's library, and answers made from the weights.

It takes the arguments of the checklist, logs the lines of the adapter, and answers the requests that the checklist
sends. Its first argument, before `serve`, is one of FAULTS, or empty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from netloader import sync
from netloader.core.identity import ModelIdentity
from netloader.vllm.serve.address_file import serving_line

FAULTS = (
    "answers by chance",
    "serves nobody",
    "answers otherwise while it is pulled",
    "fails requests while it is pulled",
    "does not start with a source",
    "says nothing of a pull",
    "computes otherwise after a pull",
    "serves other weights than it pulled",
    "serves while it sleeps",
    "wakes up with zeros",
    "does not wake up",
    "reloads zeros",
    "says nothing of a reload",
    "refuses to reload",
    "fails to reload",
    "does not end",
)


def digest(tensors: Mapping[str, torch.Tensor], *more: object) -> bytes:
    """Of all weights and of what is asked."""
    found = hashlib.blake2b(repr(more).encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.digest()


class Double:
    """One engine.

    Args:
        args: The command line.
        fault: One of FAULTS, or empty.
    """

    def __init__(self, args: argparse.Namespace, fault: str) -> None:
        self.fault = fault
        self.settings = json.loads(args.model_loader_extra_config or "null")
        self.identity = ModelIdentity(model=args.served_model_name)
        self.pulled = False
        self.asked = 0
        self.sessions = 0
        if self.settings is not None and self.settings.get("SOURCE"):
            if fault == "does not start with a source":
                sys.exit("netloader: no source could be pulled from")
            tensors, report = sync.pull_new(sources=self.sources, layouts=("raw",), wait=30.0)
            self.pulled = True
            self.identity = report.identity
            if fault != "says nothing of a pull":
                print(f"netloader: rank 0: target: pulled 1 MB of it from {self.sources[0]} over tcp", flush=True)
            self.tensors = dict(tensors)
        else:
            self.tensors = load_file(Path(args.model) / "model.safetensors")
        self.kept = {name: tensor.clone() for name, tensor in self.tensors.items()}

    @property
    def sources(self) -> list[str]:
        found: list[str] = self.settings["SOURCE"][0]["sources"]
        return found

    def serve(self, server: sync.SyncServer) -> None:
        """Offer the weights."""
        if self.pulled and self.fault == "serves other weights than it pulled":
            server.hold({name: tensor + 1 for name, tensor in self.kept.items()}, self.identity)
        else:
            server.hold(self.kept, self.identity)

    def complete(self, body: Mapping[str, Any]) -> Any:
        """The answer to a request."""
        self.asked += 1
        more: list[object] = [body["prompt"]]
        if self.fault == "answers by chance":
            more.append(self.asked)
        if self.fault == "answers otherwise while it is pulled" and self.settings is not None:
            more.append(self.asked > 5)
        if self.fault == "fails requests while it is pulled" and self.settings is not None and self.asked > 5:
            raise RuntimeError("the engine is dead")
        if self.fault == "computes otherwise after a pull":
            more.append(self.pulled)
        tokens = [f"token_id:{byte}" for byte in digest(self.tensors, *more)[: body["max_tokens"]]]
        return {"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": [{token: -0.5} for token in tokens]}}]}

    def sleep(self, server: sync.SyncServer) -> None:
        """Give the weights up."""
        if self.fault != "serves while it sleeps":
            server.retract(reason="the weights are about to change (sleep)")
        for tensor in self.tensors.values():
            tensor.zero_()

    def wake_up(self, server: sync.SyncServer) -> None:
        """Bring them back."""
        if self.fault == "does not wake up":
            raise RuntimeError("FRACTAL_NZ")
        if self.fault != "wakes up with zeros":
            for name, tensor in self.tensors.items():
                tensor.copy_(self.kept[name])
        self.serve(server)

    def reload(self) -> None:
        """Pull the weights again."""
        if self.fault == "fails to reload":
            raise RuntimeError("out of memory")
        if self.fault == "refuses to reload":
            print("netloader: rank 0: the weights stay as they are: the model has tied weights", flush=True)
            raise RuntimeError("ReloadRefused")
        tensors, _ = sync.pull_new(sources=self.sources, layouts=("raw",))
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
            if self.fault == "reloads zeros":
                tensor.zero_()
        if self.fault != "says nothing of a reload":
            print("netloader: rank 0: reloaded, root 00", flush=True)


def handler(double: Double, server: sync.SyncServer | None) -> type[BaseHTTPRequestHandler]:
    """What answers requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(lambda: None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            match self.path.partition("?")[0], server:
                case "/v1/completions", _:
                    self.answer(lambda: double.complete(body))
                case "/sleep", sync.SyncServer():
                    self.answer(lambda: double.sleep(server))
                case "/wake_up", sync.SyncServer():
                    self.answer(lambda: double.wake_up(server))
                case "/collective_rpc", _:
                    self.answer(double.reload)
                case _:
                    self.send_error(404)

        def answer(self, make: Any) -> None:
            try:
                status, said = 200, json.dumps(make()).encode()
            except Exception as error:  # noqa: BLE001 - as an engine does
                print(f"{type(error).__name__}: {error}", flush=True)
                status, said = 500, str(error).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def main() -> None:
    """Serve until SIGTERM."""
    fault = sys.argv[1]
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("--served-model-name", "--load-format", "--model-loader-extra-config", "--host", "--port"):
        parser.add_argument(name)
    args, _ = parser.parse_known_args(sys.argv[3:])
    over = threading.Event()
    double = Double(args, fault)
    serves_only = double.settings is not None and not double.pulled
    if not (fault == "does not end" and serves_only):
        signal.signal(signal.SIGTERM, lambda *_: over.set())
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    serving = double.settings is not None and fault != "serves nobody"
    if double.settings is not None and not serving:
        print("netloader: rank 0 does not serve its target: SERVE is false", flush=True)
    with sync.serve(None, host="127.0.0.1") as server:
        if serving:
            double.serve(server)
            print(serving_line(0, "target", str(server.address), "raw layout"), flush=True)
        with ThreadingHTTPServer(("127.0.0.1", int(args.port)), handler(double, server)) as http:
            threading.Thread(target=http.serve_forever, name="http", daemon=True).start()
            over.wait()
            http.shutdown()


if __name__ == "__main__":
    main()
