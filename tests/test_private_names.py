"""Private names of torch, torch_npu and vLLM: the record lists exactly those that are used."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "decisions" / "0041-private-names.md"

BY_TEXT = ("_LOAD_FORMAT_TO_MODEL_LOADER", "_expert_map", "_hf_config_revision", "_vllm_is_uva_offloaded")
"""Names of vLLM that are looked up as text."""

SHARED = ("_buffers", "_parameters", "_devices", "_threads", "_timeout", "_expert_map")
"""Names of others that modules here give to attributes of their own, too."""

FOREIGN = ("_SubParsersAction",)
"""Not of torch and not of vLLM."""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def uses_in(text: str) -> tuple[set[str], Counter[str]]:
    """Private names that a module defines, and those that it uses: attributes, imports and the texts above."""
    own: set[str] = set()
    used: Counter[str] = Counter()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                own.add(name)
            case ast.Attribute(attr=name) if _is_private(name):
                used[name] += 1
            case ast.ImportFrom(module=str(module), level=0) if not module.startswith("netloader"):
                used.update(filter(_is_private, (*module.split("."), *(alias.name for alias in node.names))))
            case ast.Constant(value=str(value)) if value in BY_TEXT:
                used[value] += 1
    return own, used


def private_names(package: Path) -> Counter[str]:
    """How often each private name of others is used in a package."""
    found = [uses_in(path.read_text()) for path in sorted(package.rglob("*.py"))]
    own = set[str]().union(*(made for made, _ in found))
    total = sum((used for _, used in found), Counter[str]())
    return Counter(
        {name: n for name, n in total.items() if (name not in own or name in SHARED) and name not in FOREIGN}
    )


def test_every_private_name_is_in_the_record() -> None:
    rows = re.findall(r"^\| `(_\w+)` \|.*\| (\d+) \|$", RECORD.read_text(), re.MULTILINE)
    assert {name: int(count) for name, count in rows} == dict(private_names(ROOT / "netloader"))


def test_a_use_of_a_private_name_is_detected(tmp_path: Path) -> None:
    """Control for the test above."""
    (tmp_path / "some.py").write_text(
        "from torch._C import _secret\n\nclass A:\n    def f(self, tensor):\n        self._mine = tensor._version\n"
        "        return other._mine, getattr(tensor, '_expert_map', None), tensor.__dict__\n"
    )
    assert private_names(tmp_path) == {"_C": 1, "_secret": 1, "_version": 1, "_expert_map": 1}
