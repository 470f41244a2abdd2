"""What it costs to serve raw weights that are computed, beside kept copies: ``python -m tests.ascend.costs``.

It runs on the simulated NPU, without vLLM. There a copy on the device is a copy in the host's memory, and one thread of
the host's processor computes. So the figures compare the ways with each other; they are not those of an NPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tests.hccl.processes import ROOT

sys.path.insert(0, str(ROOT / "tests" / "npu_sim" / "fakes"))

import torch_npu  # noqa: F401 - the simulated one

from netloader import sync
from netloader.core.identity import ModelIdentity
from netloader.core.protocol.events import Announcement
from netloader.tensors import ComputedMemory, Scratch, TensorMemory, digest_plan, hold
from netloader.vllm.model.inverses import Form, as_it_is, find_inverse, sample_of
from tests.npu_sim.inside.kit import packed, tiled

CPU, NPU = torch.device("cpu"), torch.device("npu:0")
ROUNDS = 7
GB = 1e9


def _random(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(-100, 100, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1)).to(dtype)


def _turned(raw: torch.Tensor) -> torch.Tensor:
    return raw.transpose(-1, -2).contiguous()


@dataclass(frozen=True)
class Shape:
    """A raw tensor, and what post-processing makes of it.

    Attributes:
        title: What it is.
        raw: Makes it, in host memory.
        processed: Makes the other one, on the device.
    """

    title: str
    raw: Callable[[], torch.Tensor]
    processed: Callable[[torch.Tensor], torch.Tensor]


SHAPES = (
    Shape(
        "W8A8, W8A16, compressed-tensors: a weight of 8192 x 16384, int8",
        lambda: _random(8192, 16384),
        lambda raw: tiled(_turned(raw), str(NPU)),
    ),
    Shape(
        "W8A8: 8 experts of 4096 x 4096, int8",
        lambda: _random(8, 4096, 4096),
        lambda raw: tiled(_turned(raw), str(NPU)),
    ),
    Shape(
        "W4A8 1.0.0: a weight of 8192 x 16384 bytes",
        lambda: _random(8192, 16384),
        lambda raw: packed(_turned(raw), str(NPU)),
    ),
    Shape(
        "8 experts of 2048 x 4096, bfloat16",
        lambda: _random(8, 2048, 4096, dtype=torch.bfloat16),
        lambda raw: _turned(raw).to(NPU),
    ),
    Shape(
        "a scale of 64 Mi values, widened to float32",
        lambda: _random(1 << 26, dtype=torch.bfloat16),
        lambda raw: raw.float().to(NPU),
    ),
)


def _memories(shape: Shape) -> tuple[Announcement, Mapping[str, ComputedMemory]]:
    """The same blocks from three places. Checks that those that are computed have the announced digests."""
    raw = shape.raw()
    known = hold({"w": raw}, ModelIdentity()).announcement
    scratch = Scratch(NPU, tiled=True)
    now = shape.processed(raw)
    sample = sample_of(raw, as_it_is(raw.nbytes), raw.nbytes, Scratch(CPU))
    inverse = find_inverse(Form(raw.dtype, tuple(raw.shape), tuple(raw.stride())), sample, now, scratch)
    if inverse is None:
        raise SystemExit(f"{shape.title}: no way back")
    memories = {
        "computed": ComputedMemory(TensorMemory(known.manifest, [now], NPU), {0: inverse}, scratch),
        "dram": ComputedMemory(TensorMemory(known.manifest, [raw], CPU), {}, scratch),
        "hbm": ComputedMemory(TensorMemory(known.manifest, [raw.to(NPU)], NPU), {}, scratch),
    }
    if digest_plan(memories["computed"], known.plan, known.algorithm, threads=1) != known.digests:
        raise SystemExit(f"{shape.title}: other bytes")
    return known, memories


def _read(known: Announcement, memory: ComputedMemory, stage: torch.Tensor) -> None:
    """Each block once, as bytes in host memory that are the reader's own: those that are computed are already."""
    for block in known.plan.blocks:
        (view,) = memory.views(known.plan, [block.number])
        (found,) = view.tensors()
        if memory.call_bytes is None:
            stage[: block.nbytes].copy_(found)


def _seconds(work: Callable[[], object]) -> float:
    """Of the processor, over all threads: other programs on the machine count less than in seconds of the clock."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _pull(address: str) -> None:
    sync.pull_new(sources=[address], transport="tcp")


def measured() -> Iterator[tuple[str, int, Mapping[str, float]]]:
    """For each shape its title, its bytes, and the median seconds for a GB by way. The ways take turns."""
    for shape in SHAPES:
        known, memories = _memories(shape)
        stage = torch.empty(known.plan.block_bytes, dtype=torch.uint8)
        nbytes = known.plan.nbytes
        found: dict[str, list[float]] = {name: [] for name in memories}
        with sync.serve({"w": shape.raw()}, host="127.0.0.1", transport="tcp") as server:
            found["tcp"] = []
            for _ in range(ROUNDS):
                for name, memory in memories.items():
                    found[name].append(_seconds(partial(_read, known, memory, stage)))
                found["tcp"].append(_seconds(partial(_pull, str(server.address))))
        yield shape.title, nbytes, {name: statistics.median(times) * GB / nbytes for name, times in found.items()}


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    print("| tensor | MB | computed | copy, `dram` | copy, `hbm` | a pull over tcp |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, nbytes, found in measured():
        cells = [f"{found[name]:.2f}" for name in ("computed", "dram", "hbm", "tcp")]
        print(f"| {title} | {nbytes / 1e6:.0f} | {' | '.join(cells)} |", flush=True)
    print(f"\nSeconds of one processor for a GB, medians of {ROUNDS} runs that took turns. ", end="")
    print(f"{os.cpu_count()} processors, load {load:.1f} before and {os.getloadavg()[0]:.1f} after.")


if __name__ == "__main__":
    main()
