"""Sets of tensors of every kind that can be transferred, for property tests."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from netloader.core.plan import Plan
from netloader.tensors import DTYPES, TensorMemory

LARGEST = 5000
"""Elements of one tensor: enough to be cut into many of the smallest blocks."""


@dataclass(frozen=True)
class Sketch:
    """One tensor to be made: `order` is how its dimensions lie in memory, `alias_of` an earlier tensor or None."""

    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    alias_of: int | None = None
    parameter: bool = False
    inference: bool = False


@st.composite
def sketches(draw: st.DrawFn, most: int = 12) -> list[Sketch]:
    """Up to `most` tensors: every dtype, 0 to 4 dimensions, empty ones, permuted ones, tied ones."""
    made: list[Sketch] = []
    for index in range(draw(st.integers(0, most))):
        if made and draw(st.integers(0, 4)) == 0:
            made.append(Sketch("", (), (), alias_of=draw(st.integers(0, index - 1))))
            continue
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 17, 40]), max_size=4)))
        while math.prod(shape) > LARGEST:
            shape = shape[:-1]
        order = tuple(draw(st.permutations(range(len(shape)))))
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        floating = DTYPES[dtype].is_floating_point or DTYPES[dtype].is_complex
        made.append(Sketch(dtype, shape, order, None, floating and draw(st.booleans()), draw(st.booleans())))
    return made


def build(sketch: list[Sketch], seed: int | None) -> dict[str, torch.Tensor]:
    """The tensors of a sketch, filled with random bytes by `seed`, or with zeros."""
    rng = random.Random(seed)
    tensors: list[torch.Tensor] = []
    for one in sketch:
        if one.alias_of is not None:
            tensors.append(tensors[one.alias_of])
            continue
        with torch.inference_mode(one.inference), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # complex32 is called experimental
            memory = torch.empty([one.shape[i] for i in one.order], dtype=DTYPES[one.dtype])
            inverse = sorted(range(len(one.order)), key=one.order.__getitem__)
            tensor = memory.permute(inverse)
            if one.parameter:
                tensor = torch.nn.Parameter(tensor)
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        storage.copy_(
            torch.frombuffer(bytearray(rng.randbytes(len(storage)) or b"?"), dtype=torch.uint8)[: len(storage)]
        )
        if seed is None:
            storage.zero_()
        tensors.append(tensor)
    return {f"layer.{index}.weight": tensor for index, tensor in enumerate(tensors)}


def memory_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a dense tensor as they lie in memory."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return b""
    flat = torch.empty(0, dtype=torch.uint8)
    flat.set_(tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size(), (size,), (1,))
    return flat.numpy().tobytes()


def copy_blocks(source: TensorMemory, target: TensorMemory, plan: Plan) -> None:
    """What a transport does: every block from one side to the other, byte by byte."""
    numbers = range(len(plan.blocks))
    for theirs, ours in zip(source.views(plan, numbers), target.views(plan, numbers), strict=True):
        for here, there in zip(ours.buffers(), theirs.buffers(), strict=True):
            here[:] = there


def differing(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal in kind and bit by bit; one missing on either side differs."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left
        or name not in right
        or left[name].dtype != right[name].dtype
        or left[name].shape != right[name].shape
        or left[name].stride() != right[name].stride()
        or memory_bytes(left[name]) != memory_bytes(right[name])
    ]
