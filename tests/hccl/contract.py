"""Checks that a release of torch_npu has every name that the hccl transport uses, in its wheel, without CANN or torch.

`problems_of(wheel)` names what is missing. The list is complete: the tests compare it with the
sources of the transport.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

HEADER = "torch_npu/include/torch_npu/csrc/distributed/ProcessGroupHCCL.hpp"
BINARY = "torch_npu/lib/libtorch_npu.so"
FORMATS = "torch_npu/npu/_format.py"

ATTRIBUTES = (
    "Options",
    "_timeout",
    "abort_hccl_comm",
    "global_ranks_in_group",
    "group_id",
    "is_completed",
    "is_high_priority_stream",
    "recv",
    "send",
    "wait",
)
"""Of ProcessGroupHCCL, its options and its works: those that the transport may use."""

BOUND = (
    *("ProcessGroupHCCL", "Options", "group_id", "global_ranks_in_group", "is_high_priority_stream", "abort_hccl_comm"),
    *("TORCH_HCCL_BLOCKING_WAIT", "RANK_TABLE_FILE", "ROOTINFO_SUBCOMM_ENABLE", "P2P_HCCL_BUFFSIZE"),
    *("HcclSend", "HcclRecv", "HcclCommInitRootInfoConfig"),
)
"""Names that the binary registers or looks up: strings of their own in it."""

DECLARED = (
    (
        r"ProcessGroupHCCL\(\s*const c10::intrusive_ptr<c10d::Store>&\s*store,\s*int rank,\s*int size,\s*"
        r"c10::intrusive_ptr<Options>"
    ),
    r"struct Options\s*:\s*(c10d::)?Backend::Options",
    r"std::vector<uint32_t>\s+global_ranks_in_group;",
    r"std::string\s+group_id;",
    r"bool\s+is_high_priority_stream;",
    r"Work>\s+send\(\s*std::vector<at::Tensor>&\s*tensors,\s*int dstRank,\s*int tag\)",
    r"Work>\s+recv\(\s*std::vector<at::Tensor>&\s*tensors,\s*int srcRank,\s*int tag\)",
    r"bool isCompleted\(\)",
    r"bool wait\(std::chrono::milliseconds",
    r"NoHandling = 0,\s*TearDown = 1",
)
"""What the header says about them: patterns."""

FUNCTIONS = {
    "torch_npu/npu/utils.py": {"set_device": ["device"], "set_stream": ["stream"], "current_stream": ["device"]},
    "torch_npu/npu/streams.py": {"Stream": [], "synchronize": ["self"]},
    "torch_npu/npu/__init__.py": {"mem_get_info": ["device"]},
}
"""Python files of the package -> what they define, with the names of its first parameters."""

EXPORTED = ("set_device", "set_stream", "current_stream", "mem_get_info", "Stream", "device_count")
"""Of ``torch.npu``."""

SCHEMAS = (b"npu_format_cast(Tensor", b"get_npu_format(Tensor")
NUMBERS = {"ND": 2, "FRACTAL_NZ": 29, "NCHW": 0, "NHWC": 1}


def problems_of(wheel: Path) -> list[str]:
    """Names that the transport uses and this wheel does not have."""
    with zipfile.ZipFile(wheel) as files:
        return list(_problems(files))


def _problems(files: zipfile.ZipFile) -> Iterator[str]:
    header = files.read(HEADER).decode()
    yield from (f"header: {pattern}" for pattern in DECLARED if not re.search(pattern, header))
    binary = files.read(BINARY)
    yield from (f"binary: {name}" for name in BOUND if b"\0" + name.encode() + b"\0" not in binary)
    yield from (f"operator: {schema.decode()}" for schema in SCHEMAS if schema not in binary)
    for path, wanted in FUNCTIONS.items():
        defined = _defined(ast.parse(files.read(path)))
        for name, parameters in wanted.items():
            if name not in defined:
                yield f"{path}: {name}"
            elif defined[name][: len(parameters)] != parameters:
                yield f"{path}: {name}({', '.join(defined[name])})"
    public = files.read("torch_npu/npu/__init__.py").decode()
    yield from (f"torch.npu.{name}" for name in EXPORTED if not re.search(rf"\b{name}\b", public))
    numbers = files.read(FORMATS).decode()
    for name, number in NUMBERS.items():
        if not re.search(rf"\b{name} = {number}\b", numbers):
            yield f"{FORMATS}: {name} = {number}"


def _defined(tree: ast.Module) -> dict[str, list[str]]:
    """Functions and classes of a module, nested ones too, with the names of their parameters."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, [argument.arg for argument in node.args.args])
        elif isinstance(node, ast.ClassDef):
            found.setdefault(node.name, [])
    return found
