"""Pulls the weights of one rank of an engine into this process, once for each line of its input.

    python -m scripts.engine_pulls DEVICE HOST:PORT

Each answer is a line of JSON: `root`, `nbytes`, `seconds` and `transports`, or `error`. What was pulled is freed before
the next pull.
"""

from __future__ import annotations

import importlib
import json
import sys

from netloader import sync
from netloader.errors import NetloaderError

_TIMEOUT = 1200.0


def main() -> None:
    """Pull once for each line of the input; the line is the time to wait for the source, in seconds."""
    device, source = sys.argv[1:]
    if device.startswith("npu"):
        importlib.import_module("torch_npu")
    for line in sys.stdin:
        try:
            tensors, report = sync.pull_new(
                sources=[source], device=device, layouts=("raw", "processed"), wait=float(line), timeout=_TIMEOUT
            )
        except NetloaderError as error:
            print(json.dumps({"error": str(error)}), flush=True)
            continue
        said = {
            "root": report.root,
            "nbytes": report.nbytes,
            "seconds": report.seconds,
            "transports": sorted({share.transport for share in report.sources.values() if share.blocks}),
        }
        del tensors, report
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
