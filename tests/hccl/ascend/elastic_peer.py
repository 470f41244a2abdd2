"""One end of vllm-ascend's own loader, in a process of its own: commands come line by line, answers are JSON lines."""

from __future__ import annotations

import json
import sys
import threading

import torch
from vllm_ascend.model_loader.netloader.interaction.elastic import ElasticClient, ElasticServer

MODEL, RANK = "a model", 0


def serve() -> None:
    """Its server, until stdin ends. Any line asks whether the thread that accepts connections lives."""
    before = set(threading.enumerate())
    server = ElasticServer("127.0.0.1", 0, torch.nn.Module(), RANK, MODEL, 1, 1, "no", None)
    server.start()
    (accepting,) = set(threading.enumerate()) - before
    tell({"port": server.s.getsockname()[1]})
    for _ in sys.stdin:
        tell({"alive": accepting.is_alive()})


def join(address: str, model: str) -> None:
    """Its client: says what the source answers. What it logs is on stderr."""
    with ElasticClient([address], RANK, model, 1, 1) as client:
        tell({"joined": client.ack is not None})


def tell(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        join(*sys.argv[2:])
