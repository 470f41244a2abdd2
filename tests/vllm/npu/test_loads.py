"""Models loaded by vLLM on one simulated NPU, pulled over HCCL by vLLM's load on another."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch_npu._memory import accounts

from netloader.codecs.npu_formats import format_of
from netloader.errors import RefusedError
from netloader.transports.hccl import devices as hccl_devices
from netloader.vllm.model import copies, snapshot
from netloader.vllm.model.processed import survey
from netloader.vllm.serve import serving
from tests.models import ModelStore, strip_weights
from tests.vllm import harness
from tests.vllm.npu import platform
from tests.vllm.pulls import LogLines

pytestmark = pytest.mark.usefixtures("needs_vllm")

CLIENT, SERVER, DISK = "npu:0", "npu:1", "npu:2"
BARE = "npu"  # as in an engine: the worker has chosen its device, and the name has no number


@pytest.fixture(scope="module", autouse=True)
def kernels(needs_vllm: None) -> None:
    platform.register_int8_kernel()


FromDisk = Callable[[Path], harness.Loaded]


@pytest.fixture(scope="module")
def from_disk(kernels: None) -> FromDisk:
    """Loads a folder's files with vLLM's own loader on a third device, once per folder."""
    return functools.cache(lambda folder: load(folder, DISK, "auto"))


def load(model: Path, device: str, load_format: str = "netloader", **settings: Any) -> harness.Loaded:
    """Load as an engine on `device` does, and measure the memory afterwards."""
    found = unmeasured(model, device, load_format, **settings)
    platform.Worker(device).determine_available_memory()
    return found


def unmeasured(model: Path, device: str, load_format: str = "netloader", **settings: Any) -> harness.Loaded:
    from vllm.model_executor.layers import rotary_embedding

    extra = {"MODEL": "tiny", "TRANSPORT": "hccl", **settings} if load_format == "netloader" else {}
    config = harness.engine_config(model, load_format=load_format, extra=extra)
    rotary_embedding._ROPE_DICT.clear()  # kept for all models of a process, whose device is one elsewhere
    if device != BARE:
        config.load_config.device = device
    return harness.load(config)


@dataclass
class Three:
    """The same files loaded from disk, loaded and served, and pulled into a model without files."""

    disk: harness.Loaded
    seed: harness.Loaded
    pulled: harness.Loaded

    def same(self) -> None:
        """All raw tensors, and all that post-processing made of them, are equal."""
        assert self.pulled.raw == self.seed.raw == self.disk.raw
        final = [everything(one) for one in (self.disk, self.seed, self.pulled)]
        assert final[0] == final[1] == final[2]


def everything(loaded: harness.Loaded) -> dict[str, str]:
    return {name: harness.tensor_digest(tensor) for name, tensor in survey(loaded.model, {}).tensors.items()}


def devices(loaded: harness.Loaded) -> set[str]:
    return {str(tensor.device) for _, tensor in harness.named_tensors(loaded.model)}


def formats(loaded: harness.Loaded) -> dict[str, str]:
    return {name: str(format_of(tensor)) for name, tensor in harness.named_tensors(loaded.model)}


def three(disk: harness.Loaded, folder: Path, tmp_path: Path, **settings: Any) -> Three:
    seed = load(folder, SERVER, **settings)
    pulled = pull(strip_weights(folder, tmp_path / "bare"))
    assert (devices(disk), devices(seed), devices(pulled)) == ({DISK}, {SERVER}, {CLIENT})
    return Three(disk, seed, pulled)


def pull(folder: Path, device: str = CLIENT) -> harness.Loaded:
    server = serving.running_server()
    assert server is not None
    source = [{"device_id": 0, "sources": [server.address]}]
    return load(folder, device, SOURCE=source, SERVE=False)


def test_this_is_vllm_on_an_npu() -> None:
    from vllm.platforms import current_platform

    assert current_platform.device_type == "npu"
    assert isinstance(current_platform, platform.NpuPlatform)
    assert torch_npu.__version__ == "0.0.sim"


@pytest.mark.parametrize("kind", ["llama-bf16", "llama-tied", "qwen3-moe"])
def test_a_model_pulled_over_hccl_is_the_one_from_disk(
    kind: str, from_disk: FromDisk, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    three(from_disk(models.get(kind)), models.get(kind), tmp_path).same()
    assert log_lines.one("target: pulled", "over hccl")
    assert log_lines.with_part("HCCL on npu:0: a communicator")
    assert log_lines.with_part("HCCL on npu:1: a communicator")


def test_another_seed_turns_the_comparison_red(from_disk: FromDisk, models: ModelStore, tmp_path: Path) -> None:
    disk = from_disk(models.get("llama-bf16"))
    other = load(models.get("llama-bf16-other"), SERVER)
    found = pull(strip_weights(models.get("llama-bf16-other"), tmp_path / "bare"))
    assert found.raw == other.raw
    assert {name for name in found.raw if found.raw[name] != disk.raw[name]} >= {"model.embed_tokens.weight"}


@pytest.mark.parametrize(("setting", "where"), [("hbm", SERVER), ("dram", "cpu")])
def test_originals_of_int8_weights_in_tiles(
    setting: str, where: str, from_disk: FromDisk, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    found = three(from_disk(models.get("llama-w8a8")), models.get("llama-w8a8"), tmp_path, INT8_CACHE=setting)
    found.same()
    assert f"originals kept: INT8_CACHE={setting}: 3186808 bytes on {where}" in log_lines.one("serves target at")
    assert log_lines.one("target: pulled", "over hccl")
    tiles = {name for name, form in formats(found.pulled).items() if form == "fractal-nz"}
    assert len(tiles) == 16
    assert all(name.endswith("_proj.weight") for name in tiles)


def test_a_full_device_sends_the_copies_to_the_host(
    from_disk: FromDisk, models: ModelStore, tmp_path: Path, log_lines: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = copies.make_copies

    def full(tensors: Any, *, on_device: bool) -> Any:
        before, accounts.limit = accounts.limit, accounts.used[1] + (64 << 10)
        try:
            return make(tensors, on_device=on_device)
        finally:
            accounts.limit = before

    monkeypatch.setattr(snapshot, "make_copies", full)
    three(from_disk(models.get("llama-w8a8")), models.get("llama-w8a8"), tmp_path, INT8_CACHE="hbm").same()
    assert log_lines.one("INT8_CACHE=hbm: the device is full, the copies go to the host's memory (NPU out of memory")
    assert "originals kept: INT8_CACHE=hbm: 3186808 bytes on cpu" in log_lines.one("serves target at")
    assert log_lines.one("target: pulled", "over hccl")


def test_without_copies_int8_weights_are_computed_from_tiles(
    from_disk: FromDisk, models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    folder = models.get("llama-w8a8")
    three(from_disk(folder), folder, tmp_path, KEEP_RAW=False).same()
    assert "16 tensors computed from processed ones" in log_lines.one("serves target at")
    assert log_lines.one("target: pulled", "over hccl")


@pytest.fixture
def processed(models: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with the tests' own quantisation method, which puts its weights in tiles here."""
    from tests.vllm import processed_method

    transform = processed_method.Method._transform

    def in_tiles(self: Any, layer: Any) -> None:
        transform(self, layer)
        tiles = torch_npu.npu_format_cast(layer.weight.data.contiguous(), platform.FRACTAL_NZ)
        layer.weight = torch.nn.Parameter(tiles, requires_grad=False)
        # On the host vLLM could not bring it to such a device: torch lets no parameter change between their types.
        layer.placeholder = torch.nn.Parameter(torch.empty(0, device=tiles.device), requires_grad=False)

    monkeypatch.setattr(processed_method.Method, "_transform", in_tiles)
    made = tmp_path / "processed"
    shutil.copytree(models.get("llama-bf16"), made)
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": processed_method.Config.get_name()}
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return made


def test_processed_weights_in_tiles_are_taken_over(
    from_disk: FromDisk, processed: Path, tmp_path: Path, log_lines: LogLines
) -> None:
    disk = from_disk(processed)
    seed = load(processed, SERVER)
    assert log_lines.one("serves target at", "processed layout")
    found = pull(strip_weights(processed, tmp_path / "bare"))
    assert everything(found) == everything(seed) == everything(disk)
    assert log_lines.one("target: pulled", "over hccl")
    assert formats(found) == formats(disk)
    assert formats(found)["model.layers.0.self_attn.o_proj.weight"] == "fractal-nz"


def test_nothing_is_opened_on_the_device_until_its_memory_was_measured(
    models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    folder = models.get("llama-bf16")
    seed = unmeasured(folder, BARE)
    assert devices(seed) == {CLIENT}
    account = hccl_devices.device_of(CLIENT)
    with pytest.raises(RefusedError, match="the engine is measuring its memory"):
        account.check_may_open()
    early = pull(folder, SERVER)
    assert log_lines.one("the default loader (auto) loads the target", "is measuring its memory")
    platform.Worker(CLIENT).determine_available_memory()
    account.check_may_open()
    found = pull(strip_weights(folder, tmp_path / "bare"), SERVER)
    assert log_lines.one("target: pulled", "over hccl")
    assert found.raw == early.raw == seed.raw


def test_a_client_that_knows_its_device_by_its_kind_only(
    models: ModelStore, tmp_path: Path, log_lines: LogLines
) -> None:
    seed = load(models.get("llama-bf16"), SERVER)
    found = pull(strip_weights(models.get("llama-bf16"), tmp_path / "bare"), BARE)
    assert devices(found) == {CLIENT}
    assert found.raw == seed.raw
    assert log_lines.one("target: pulled", "over hccl")
    hccl_devices.device_of(CLIENT).check_may_open()
