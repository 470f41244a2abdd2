"""The supported releases of vLLM have every name that the adapter uses, and the list of names is complete."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.contract.names import LATER_TEXTS, NAMES, NEWEST, NEWEST_THAT_RUNS, OLDEST, OURS, OWNERS, TEXTS, Name
from tests.contract.sources import Sources
from tests.wheels import sources_of

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = sorted((ROOT / "netloader" / "vllm").rglob("*.py"))


@cache
def release(number: str) -> Sources:
    return Sources(sources_of("vllm", number))


def problems(sources: Sources, names: Sequence[Name], *, newest: bool) -> list[str]:
    """Names that are used and missing in the release."""
    found = []
    for name in names:
        if sources.find(name.module, name.symbol) is None:
            if newest or not name.optional:
                found.append(f"{name.module} has no {name.symbol}")
            continue
        takes = sources.parameters(name.module, name.symbol)
        missing = [parameter for parameter in name.parameters if parameter not in takes]
        if missing:
            found.append(f"{name.module}.{name.symbol} takes ({', '.join(takes)}), not {', '.join(missing)}")
    texts = (*TEXTS, *LATER_TEXTS) if newest else TEXTS
    found += [f"{module} does not contain {text!r}" for module, text in texts if text not in sources.text(module)]
    return found


def test_the_releases_are_those_that_are_installed_and_documented() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8").splitlines()
    assert f"VLLM_VERSION := {NEWEST_THAT_RUNS}" in makefile
    assert f"OLDEST_VLLM_VERSION := {OLDEST}" in makefile
    supported = (ROOT / "docs" / "vllm.md").read_text("utf-8").partition("Supported: vLLM ")[2].partition("\n\n")[0]
    assert re.findall(r"\d+\.\d+\.\d+", supported) == [OLDEST, NEWEST, NEWEST_THAT_RUNS]
    assert f"vLLM {OLDEST} to {NEWEST} is supported" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("number", [OLDEST, NEWEST_THAT_RUNS, NEWEST])
def test_the_release_has_what_is_used(number: str) -> None:
    assert problems(release(number), NAMES, newest=number == NEWEST) == []


def test_a_missing_name_is_reported() -> None:
    names = [
        Name("vllm.config", "ModelConfig.no_such_thing"),
        Name("vllm.model_executor.model_loader", "get_model_loader", ("no_such_parameter",)),
        Name("vllm.no_such_module", "anything"),
        Name("vllm.transformers_utils.config", "no_longer_there", optional=True),
    ]
    found = problems(release(NEWEST), names, newest=True)
    assert [text for text in found if "no_" in text] == [
        "vllm.config has no ModelConfig.no_such_thing",
        "vllm.model_executor.model_loader.get_model_loader takes (load_config), not no_such_parameter",
        "vllm.no_such_module has no anything",
        "vllm.transformers_utils.config has no no_longer_there",
    ]
    assert len(problems(release(OLDEST), names, newest=False)) == 3, "an optional name may be missing in an old release"


def test_every_optional_name_is_missing_in_some_release() -> None:
    """Otherwise the check in the adapter is dead code, and the name has to be listed as required."""
    kept = {"get_pcp_group"}  # older than the oldest supported release; vendors' builds are late
    unneeded = [
        name.symbol
        for name in NAMES
        if name.optional and name.symbol not in kept and release(OLDEST).find(name.module, name.symbol) is not None
    ]
    assert unneeded == []


# --- what the adapter uses ------------------------------------------------------------------------------------------


def uses(tree: ast.Module, *, is_module: Sources | None = None) -> Iterator[tuple[int, str, str]]:
    """Line, module and symbol of every use of vLLM in one file of the adapter."""
    loops = _loops(tree)
    for line, module, symbol in _in_scope(tree, {}, is_module):
        owner, _, name = symbol.rpartition(RUN_TIME)
        for text in loops.get(name, [f"<{name}: write the name as a text>"]) if RUN_TIME in symbol else [symbol]:
            yield line, module, f"{owner}{text}" if RUN_TIME in symbol else text


RUN_TIME = "?"
"""Prefix of a variable that holds the name."""


def _loops(tree: ast.Module) -> dict[str, list[str]]:
    """Loop variables over strings -> the strings, which are in the loop or in a constant of the file."""
    constants = {
        ast.unparse(target): texts
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and (texts := _texts(node.value))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            texts = _texts(node.iter) or constants.get(ast.unparse(node.iter), [])
            if texts:
                found.setdefault(node.target.id, []).extend(texts)
    return found


def _texts(node: ast.expr | None) -> list[str]:
    if not isinstance(node, ast.Tuple | ast.List):
        return []
    values = [item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return values if len(values) == len(node.elts) else []


def _in_scope(scope: ast.AST, outer: dict[str, str], sources: Sources | None) -> Iterator[tuple[int, str, str]]:
    """`outer` maps local names to modules of vLLM, or to their classes ("module:Class")."""
    known = dict(outer)
    inner: list[ast.AST] = []
    nodes: list[ast.AST] = []
    queue: list[ast.AST] = list(ast.iter_child_nodes(scope))
    while queue:
        node = queue.pop(0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner.append(node)
        else:
            nodes.append(node)
            queue += ast.iter_child_nodes(node)
    for node in nodes:
        yield from _imports(node, known, sources)
    for node in nodes:
        yield from _mentions(node, known)
    for node in inner:
        yield from _in_scope(node, known, sources)


def _imports(node: ast.AST, known: dict[str, str], sources: Sources | None) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "vllm":
                known[alias.asname or "vllm"] = alias.name if alias.asname else "vllm"
    elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if sources is not None and sources.path_of(whole) is not None:
                known[alias.asname or alias.name] = whole
            else:
                known[alias.asname or alias.name] = f"{node.module}:{alias.name}"
                yield node.lineno, str(node.module), alias.name


def _mentions(node: ast.AST, known: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    match node:
        case ast.Attribute(value=value, attr=attribute, lineno=line):
            yield from _of(ast.unparse(value), attribute, line, known)
        case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[value, what, *_], lineno=line):
            text = ast.unparse(value)
            if isinstance(what, ast.Constant):
                yield from _of(text, str(what.value), line, known)
                if str(what.value).startswith("_vllm"):
                    yield line, "TEXT", str(what.value)
            elif text in known:
                yield from _of(text, RUN_TIME + ast.unparse(what), line, known)
        case ast.Call(func=func, args=[value, *_], keywords=keywords, lineno=line) if ast.unparse(func) in {
            "dataclasses.replace",
            "replace",
        }:
            for keyword in keywords:
                yield from _of(ast.unparse(value), str(keyword.arg), line, known)
        case ast.ClassDef(bases=bases, body=body):
            for base in bases:
                module, _, name = known.get(ast.unparse(base), "").partition(":")
                for method in body if name else []:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield method.lineno, module, f"{name}.{method.name}"
        case _:
            return


def _of(owner: str, attribute: str, line: int, known: dict[str, str]) -> Iterator[tuple[int, str, str]]:
    module, _, name = known.get(owner, "").partition(":")
    if module:
        yield line, module, f"{name}.{attribute}" if name else attribute
        return
    last = owner.rpartition(".")[2].lstrip("_")
    if last in OWNERS:
        yield line, "vllm.config", f"{OWNERS[last]}.{attribute}"


def test_every_used_name_is_listed() -> None:
    listed = {(name.module, name.symbol) for name in NAMES} | {("TEXT", text) for _, text in TEXTS}
    sources = release(NEWEST)
    missing: dict[tuple[str, str], str] = {}
    for path in ADAPTER:
        for line, module, symbol in uses(ast.parse(path.read_text("utf-8")), is_module=sources):
            if (module, symbol) not in listed and symbol not in OURS:
                missing.setdefault((module, symbol), f"{path.relative_to(ROOT)}:{line}")
    lines = [f'    Name("{module}", "{symbol}"),  # {where}' for (module, symbol), where in sorted(missing.items())]
    assert not lines, (
        "these names of vLLM are used and not in the contract; add them to NAMES of tests/contract/names.py, with the "
        "parameters that are passed (a name on a tensor, module TEXT, belongs to TEXTS):\n" + "\n".join(lines)
    )


def test_every_listed_name_is_used() -> None:
    """A search in the text is enough: the owner of an attribute cannot always be derived."""
    text = "\n".join(path.read_text("utf-8") for path in ADAPTER)
    unused = [name.symbol for name in NAMES if name.symbol.rpartition(".")[2] not in text]
    assert unused == []


USES = """
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.model_loader.base_loader import BaseModelLoader as Base

def f(vllm_config, self):
    from vllm.model_executor import model_loader
    model_loader._PRIVATE = 1
    getattr(model_loader, "_NAMED")
    getattr(tensor, "_vllm_mark")
    print(vllm.__version__, self._load_config.new_field, vllm_config.model_config.other)
    dataclasses.replace(load_config, replaced=1)
    getattr(model_loader, unknown)
    for name in ("looped", "over"):
        setattr(Base, name, getattr(model_loader, name))

class Loader(Base):
    def load_model(self): ...
    def _ours(self): ...
"""


def test_every_kind_of_use_is_detected() -> None:
    seen = {(module, symbol) for _, module, symbol in uses(ast.parse(USES), is_module=release(NEWEST))}
    loader = "vllm.model_executor.model_loader"
    assert seen == {
        ("vllm", "__version__"),
        ("vllm.config", "get_current_vllm_config"),
        (f"{loader}.base_loader", "BaseModelLoader"),
        (f"{loader}.base_loader", "BaseModelLoader.load_model"),
        (loader, "_PRIVATE"),
        (loader, "_NAMED"),
        (loader, "<unknown: write the name as a text>"),
        (loader, "looped"),
        (loader, "over"),
        (f"{loader}.base_loader", "BaseModelLoader.looped"),
        (f"{loader}.base_loader", "BaseModelLoader.over"),
        ("TEXT", "_vllm_mark"),
        ("vllm.config", "LoadConfig.new_field"),
        ("vllm.config", "LoadConfig.replaced"),
        ("vllm.config", "VllmConfig.model_config"),
        ("vllm.config", "ModelConfig.other"),
    }
