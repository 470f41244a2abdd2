"""The supported releases of torch_npu have every name that the transport uses."""

from __future__ import annotations

import ast
import re
import zipfile
from pathlib import Path

import pytest

from tests.hccl import contract
from tests.hccl.processes import ROOT
from tests.wheels import wheel_of

RELEASES = ("2.10.0.post4", "2.13.0", "2.14.0")
SOURCES = sorted((ROOT / "netloader" / "transports" / "hccl").glob("*.py"))


def torch_npu(release: str) -> Path:
    return wheel_of("torch-npu", release, "--python-version=3.11")


@pytest.mark.parametrize("release", RELEASES)
def test_the_release_has_what_is_used(release: str) -> None:
    assert contract.problems_of(torch_npu(release)) == []


def test_a_missing_name_is_reported(tmp_path: Path) -> None:
    whole = torch_npu(RELEASES[1])
    broken = tmp_path / "broken.whl"
    wanted = {contract.HEADER, contract.BINARY, contract.FORMATS, *contract.FUNCTIONS}
    with zipfile.ZipFile(whole) as files, zipfile.ZipFile(broken, "w") as out:
        for name in wanted:
            data = files.read(name)
            if name == contract.BINARY:
                data = data.replace(b"\0abort_hccl_comm\0", b"\0abort_hccl_group\0")
            elif name == contract.FORMATS:
                data = data.replace(b"FRACTAL_NZ = 29", b"FRACTAL_NZ = 30")
            elif name == contract.HEADER:
                data = data.replace(b"int dstRank", b"int destination")
            elif name.endswith("npu/__init__.py"):
                data = data.replace(b"def mem_get_info(device", b"def mem_get_info(card")
            out.writestr(name, data)
    found = "\n".join(contract.problems_of(broken))
    for what in ("binary: abort_hccl_comm", "FRACTAL_NZ = 29", "dstRank", "mem_get_info(card)"):
        assert what in found


def test_every_attribute_that_the_transport_uses_is_checked() -> None:
    """Attributes of the group, its options and its works, as the sources of the transport name them."""
    used: set[str] = set()
    text = (ROOT / "netloader" / "transports" / "hccl" / "link.py").read_text("utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in {"self._group", "group", "options", "operation.work", "ProcessGroupHCCL"}:
                used.add(node.attr)
            if owner in {"npu", "torch.get_device_module('npu')"}:
                assert node.attr in contract.EXPORTED, node.attr
    assert used == set(contract.ATTRIBUTES)


def test_environment_variables_that_change_hccl_are_checked() -> None:
    named = {
        name for path in SOURCES for name in re.findall(r'"((?:TORCH_)?(?:HCCL|RANK|ROOTINFO)_\w+)"', path.read_text())
    }
    assert named <= set(contract.BOUND)
    assert "TORCH_HCCL_BLOCKING_WAIT" in named
