"""What an engine's platform finds on the simulated device besides the transport of weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import acl
import pytest
import torch
import torch.distributed as dist
import torch_npu
from torch_npu._formats import Format

from netloader.errors import TransportError
from tests.npu_sim.inside.pairs import pair

CARDS = "ASCEND_RT_VISIBLE_DEVICES"
npu: Any = torch_npu.npu


def test_devices_are_the_visible_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert npu.device_count() == 4
    monkeypatch.setenv(CARDS, "6,5")
    assert npu.device_count() == 2
    with pytest.raises(RuntimeError, match="invalid device index 2"):
        npu.set_device(2)
    monkeypatch.setenv(CARDS, "0,1,2,3,4")
    with pytest.raises(RuntimeError, match="names 5 cards"):
        npu.device_count()


async def test_two_devices_that_are_one_card_cannot_be_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CARDS, "6,6")
    with pytest.raises(ExceptionGroup) as raised:
        async with pair():
            pass
    assert raised.group_contains(TransportError, match="EI0009")
    monkeypatch.setenv(CARDS, "6,5")
    async with pair():
        pass


def test_the_soc_is_a_910b() -> None:
    assert npu.get_soc_version() == 223
    assert npu.get_device_name() == acl.get_soc_name() == "Ascend910B3"


def test_memory_is_counted_under_the_names_of_the_allocator() -> None:
    before = npu.memory_stats("npu:1")
    kept = torch.zeros(1 << 20, dtype=torch.uint8, device="npu:1")
    after = npu.memory_stats("npu:1")
    assert after["allocated_bytes.all.current"] - before["allocated_bytes.all.current"] == kept.nbytes
    assert npu.memory_allocated(1) == npu.memory_reserved("npu:1") == after["reserved_bytes.all.peak"]
    assert npu.memory_allocated(0) != npu.memory_allocated(1)


class Pending:
    def __init__(self) -> None:
        self.joined = 0

    def join(self) -> None:
        self.joined += 1


def test_an_event_stands_for_what_its_stream_had_pending() -> None:
    stream, other, work, later = npu.Stream(), npu.Stream(), Pending(), Pending()
    stream.pending.append(work)
    event = npu.Event(enable_timing=True)
    event.record(stream)
    stream.pending.append(later)
    event.wait(other)
    other.synchronize()
    assert (work.joined, later.joined) == (1, 0)
    event.synchronize()
    assert (work.joined, later.joined) == (2, 0)
    end = npu.Event(enable_timing=True)
    end.record(stream)
    assert event.elapsed_time(end) >= 0


def test_a_reset_external_event_stands_for_nothing() -> None:
    stream, work = npu.Stream(), Pending()
    stream.pending.append(work)
    event = npu.ExternalEvent()
    event.record(stream)
    event.reset(stream)
    event.synchronize()
    assert not work.joined


def test_the_default_stream_is_the_first_one() -> None:
    with npu.stream(npu.Stream()):
        assert npu.current_stream() is not npu.default_stream()
    assert npu.current_stream() is npu.default_stream()


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """The four-bit values, by another way than the simulator's: through the bytes."""
    octets = words.cpu().contiguous().view(torch.uint8).reshape(-1)
    halves = torch.stack([octets & 15, octets >> 4], dim=1).reshape(*words.shape[:-1], -1).to(torch.int32)
    return torch.where(halves > 7, halves - 16, halves)


def test_int4_values_are_packed_eight_to_a_word() -> None:
    values = torch.randint(-8, 8, (3, 5, 32), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    packed = torch_npu.npu_convert_weight_to_int4pack(values.to("npu:0"))
    assert (packed.shape, packed.dtype, packed.device) == ((3, 5, 4), torch.int32, torch.device("npu:0"))
    assert torch.equal(unpacked(packed), values)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 8), torch.zeros(2, 9, dtype=torch.int32)], ids=["float", "nine"])
def test_what_is_no_int4_is_not_packed(wrong: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="int4pack takes int32"):
        torch_npu.npu_convert_weight_to_int4pack(wrong.to("npu:0"))


def test_quantising_to_four_bits_scales_rounds_and_packs() -> None:
    values = torch.tensor([[-9.0, -8.2, -1.4, 0.4, 0.6, 3.0, 7.4, 99.0]])
    quantise = torch_npu.npu_quantize
    found = quantise(values.to("npu:0"), torch.tensor([1.0], device="npu:0"), None, torch.quint4x2, -1, False)
    assert unpacked(found).tolist() == [[-8, -8, -1, 0, 1, 3, 7, 7]]
    found = quantise(values.to("npu:0"), torch.tensor([2.0], device="npu:0"), None, torch.quint4x2)
    assert unpacked(found).tolist() == [[-4, -4, -1, 0, 0, 2, 4, 7]]
    with pytest.raises(NotImplementedError, match="qint8"):
        quantise(values.to("npu:0"), torch.tensor([1.0], device="npu:0"), None, torch.qint8)


def test_operators_that_are_not_simulated_say_so() -> None:
    for name in ("npu_quant_matmul", "_npu_flash_attention"):
        with pytest.raises(NotImplementedError, match=f"torch_npu.{name} is not simulated"):
            getattr(torch_npu, name)()
    with pytest.raises(AttributeError):
        _ = torch_npu.rubbish
    with pytest.raises(NotImplementedError, match="_NPUTaskGroupHandle is not simulated"):
        torch_npu._C._NPUTaskGroupHandle()


def test_modules_that_engines_import_exist() -> None:
    from torch_npu.op_plugin.atb._atb_ops import _register_atb_extensions
    from torch_npu.profiler import dynamic_profile

    _register_atb_extensions()
    with pytest.raises(NotImplementedError, match=r"dynamic_profile.step is not simulated"):
        dynamic_profile.step()


def test_the_runtime_copies_between_addresses() -> None:
    source = torch.arange(64, dtype=torch.uint8, device="npu:0")
    into = torch.zeros(64, dtype=torch.uint8)
    assert acl.rt.memcpy(into.data_ptr(), 64, source.data_ptr(), 64, 2) == 0
    assert torch.equal(into, source.cpu())
    with pytest.raises(RuntimeError, match="64 bytes into 8"):
        acl.rt.memcpy(into.data_ptr(), 8, source.data_ptr(), 64, 2)


@pytest.fixture
def world(tmp_path: Path) -> Any:
    """A world of one rank with the backend for collectives."""
    dist.init_process_group("hccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_collectives_of_the_device(world: Any) -> None:
    assert dist.get_backend() == "hccl"
    tensor = torch.arange(6.0, device="npu:0")
    expected = tensor.cpu()
    work = dist.all_reduce(tensor, async_op=True)
    assert work.wait()
    assert work.wait()  # as often as one likes
    dist.broadcast(tensor, 0)
    gathered = torch.zeros(6, device="npu:0")
    dist.all_gather_into_tensor(gathered, tensor)
    each = [torch.zeros(6, device="npu:0")]
    dist.all_gather(each, tensor)
    dist.barrier()
    for found in (tensor, gathered, each[0]):
        assert torch.equal(found.cpu(), expected)


def test_collectives_of_tiles(world: Any) -> None:
    values = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    tiled = torch_npu.npu_format_cast(values.to("npu:0"), Format.FRACTAL_NZ)
    dist.broadcast(tiled, 0)
    assert torch_npu.get_npu_format(tiled) == Format.FRACTAL_NZ
    assert torch.equal(tiled.cpu(), values)


def test_groups_have_communicators_of_different_names(world: Any) -> None:
    device = torch.device("npu")
    first, second = (dist.new_group([0]) for _ in range(2))
    names = {group._get_backend(device).get_hccl_comm_name(0) for group in (world, first, second)}
    assert len(names) == 3
    assert world._get_backend(device).get_hccl_comm_name(0) in names


def test_tests_of_other_cards_are_not_left_behind() -> None:
    assert CARDS not in os.environ
