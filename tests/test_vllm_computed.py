"""Tensors that no checkpoint fills get their contents back, in the same memory, whatever happened to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from netloader.errors import MemoryStillInUse
from netloader.vllm.load.pull_weights import Pulled
from netloader.vllm.model.agreement import Report
from netloader.vllm.model.computed_values import ComputedValues


class Rotary(torch.nn.Module):
    """Buffers, as vLLM's rotary embedding has one, and tensors of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.register_buffer("cache", torch.arange(6.0).view(2, 3), persistent=False)
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("repeated", torch.arange(2.0)[:, None].expand(2, 5), persistent=False)
        self.register_buffer("nothing", torch.empty(0), persistent=False)
        self.register_buffer("elsewhere", torch.empty(3, device="meta"), persistent=False)
        self.helper: Any = {"table": torch.arange(4)}
        tensor = torch.tensor([5, 6])
        self.hidden: Callable[[], torch.Tensor] = lambda: tensor
        self.view = self.weight.detach()[1:]

    def computed(self) -> dict[str, torch.Tensor]:
        named: dict[str, Any] = {"cache": self.cache, "scale": self.scale, "repeated": self.repeated}
        return {**named, "table": self.helper["table"], "hidden": self.hidden()}


def contents(tensors: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def fill(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        (tensor[:, :1] if 0 in tensor.stride() else tensor).fill_(9)


def test_contents_come_back_in_the_same_memory() -> None:
    model = torch.nn.Sequential(Rotary())
    rotary: Any = model[0]
    tensors = rotary.computed()
    before = contents(tensors)
    computed = ComputedValues(model)
    fill(tensors)
    rotary.weight.data.fill_(9)
    assert all(now != before[name] for name, now in contents(tensors).items())
    computed.restore()
    assert contents(tensors) == before
    assert rotary.weight.tolist() == [9] * 4, "the checkpoint fills weights, and what shares their memory"
    fill(tensors)
    computed.restore()
    assert contents(tensors) != before, "restored once"


def _other_memory(rotary: Any) -> None:
    rotary.cache.data = torch.zeros(7)


def _another_buffer(rotary: Any) -> None:
    rotary.cache = torch.zeros(7)


def _a_parameter(rotary: Any) -> None:
    del rotary.cache
    rotary.cache = torch.nn.Parameter(torch.zeros(7))


def _none(rotary: Any) -> None:
    rotary.cache = None


def _deleted(rotary: Any) -> None:
    del rotary.cache


@pytest.mark.parametrize("replace", [_other_memory, _another_buffer, _a_parameter, _none, _deleted])
def test_a_buffer_that_was_replaced_is_the_one_from_before(replace: Any) -> None:
    """Others refer to the buffer itself, and others to the module that has it."""
    rotary: Any = Rotary()
    cache, memory = rotary.cache, rotary.cache.detach()
    before = cache.tolist()
    computed = ComputedValues(rotary)
    cache.fill_(9)
    replace(rotary)
    computed.restore()
    assert rotary.cache is cache
    assert cache.data_ptr() == memory.data_ptr()
    assert cache.tolist() == memory.tolist() == before
    assert "cache" in dict(rotary.named_buffers())
    assert "cache" not in rotary.state_dict()
    assert "scale" in rotary.state_dict()


def test_an_error_puts_contents_back_unless_a_thread_may_write_there() -> None:
    rotary: Any = Rotary()
    before = rotary.cache.tolist()
    in_use = MemoryStillInUse("a thread", writes=True, seconds=1.0)
    for memory_in_use, expected in ((None, before), (in_use, [[9.0] * 3] * 2)):
        pulled = Pulled(Report("failed", 0), computed=ComputedValues(rotary), memory_in_use=memory_in_use)
        rotary.cache.fill_(9)
        with pytest.raises(KeyboardInterrupt), pulled.restored_on_error():
            raise KeyboardInterrupt
        assert rotary.cache.tolist() == expected
    pulled = Pulled(Report("pulled", 0), computed=ComputedValues(rotary))
    rotary.cache.fill_(1)
    with pulled.restored_on_error():
        pass
    assert rotary.cache.tolist() == [[1.0] * 3] * 2, "what is kept stays"
