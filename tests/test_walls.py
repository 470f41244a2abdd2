"""Code rules that no linter checks: which module may import what, what no module may contain, how long it may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "netloader"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 500

# Import name -> where in the package it may appear. Paths are prefixes, relative to the package.
ALLOWED = {
    "vllm": ("vllm/",),
    "torch_npu": ("transports/hccl", "codecs/"),
    "torch": ("tensors", "codecs/", "transports/", "vllm/", "checkpoint"),
}
# These may not be installed, so they are imported inside functions.
ONLY_IN_FUNCTIONS = ("vllm", "torch_npu")
# The one process-wide object: the server that target and draft model share.
GLOBALS = ("vllm/serve/serving.py",)
NEVER = ("pickle", "marshal", "shelve", "dill", "cloudpickle")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


@dataclass(frozen=True)
class Import:
    package: str
    line: int
    in_function: bool
    for_types_only: bool


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, *, in_function: bool, for_types_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            match child:
                case ast.Import(names):
                    for alias in names:
                        yield Import(package_of(alias.name), child.lineno, in_function, for_types_only)
                case ast.ImportFrom(module=str(module), level=0):
                    yield Import(package_of(module), child.lineno, in_function, for_types_only)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    yield from walk(child, in_function=True, for_types_only=for_types_only)
                case ast.If(test) if ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                    yield from walk(child, in_function=in_function, for_types_only=True)
                case _:
                    yield from walk(child, in_function=in_function, for_types_only=for_types_only)

    yield from walk(tree_of(path), in_function=False, for_types_only=False)


def package_of(module: str) -> str:
    return module.partition(".")[0]


def handler_problem(handler: ast.ExceptHandler) -> str | None:
    """Why this handler swallows unknown errors, or None."""
    names = {"BaseException"} if handler.type is None else {ast.unparse(part) for part in _types_of(handler.type)}
    broad = names & {"Exception", "BaseException"}
    if broad and all(_does_nothing(statement) for statement in handler.body):
        return f"swallows every {broad.pop()}"
    return None


def _does_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Continue() | ast.Break() | ast.Expr(ast.Constant()):
            return True
        case ast.Return(value):
            return value is None or isinstance(value, ast.Constant)
        case _:
            return False


def _types_of(node: ast.expr) -> list[ast.expr]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def call_problem(call: ast.Call) -> str | None:
    """What is wrong with making this call anywhere in the package, or None."""
    function = ast.unparse(call.func)
    arguments = {ast.unparse(argument) for argument in call.args}
    if function in {"eval", "exec", "compile", "builtins.eval", "builtins.exec"}:
        return f"{function}() evaluates text"
    if function in {"suppress", "contextlib.suppress"} and arguments & {"Exception", "BaseException"}:
        return "suppresses every error"
    if function in {"Thread", "threading.Thread"} and not _named_ours(call):
        return "starts a thread that is not named netloader-..."
    return None


def _named_ours(call: ast.Call) -> bool:
    given = next((keyword.value for keyword in call.keywords if keyword.arg == "name"), None)
    match given:
        case None:
            return False
        case ast.JoinedStr(values=[ast.FormattedValue(), *_]):
            return False
        case ast.Constant(value=str(text)) | ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return text.startswith("netloader-")
        case _:
            return True  # chosen by a caller


def problems_in(tree: ast.AST, *, globals_allowed: bool = False) -> list[str]:
    found = []
    for node in ast.walk(tree):
        problem = None
        if isinstance(node, ast.ExceptHandler):
            problem = handler_problem(node)
        elif isinstance(node, ast.Call):
            problem = call_problem(node)
        elif isinstance(node, ast.Assert):
            problem = "checks with assert, which python -O leaves out"
        elif isinstance(node, ast.Global) and not globals_allowed:
            problem = f"changes the module's {', '.join(node.names)}"
        if problem is not None:
            found.append(f"line {getattr(node, 'lineno', '?')}: {problem}")
    return found


def test_there_is_something_to_check() -> None:
    assert PACKAGE / "errors.py" in MODULES


def test_contracts_of_the_import_linter() -> None:
    pytest.importorskip("importlinter", reason="needs the lint extra")
    # In a process of its own: the linter reconfigures logging and switches off every logger that exists.
    program = "from importlinter.cli import lint_imports_command as run; run()"
    arguments = [sys.executable, "-c", program, "--no-logo", "--no-cache"]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    assert f"{len(contracts)} kept, 0 broken" in done.stdout


@each_module
def test_third_party_imports_stay_in_their_rooms(path: Path) -> None:
    where = name_of(path)
    for found in imports_of(path):
        assert found.package not in NEVER, f"line {found.line}: {found.package} runs what it reads"
        rooms = ALLOWED.get(found.package)
        if rooms is None or (found.for_types_only and found.package == "torch"):
            continue
        assert where.startswith(rooms), f"line {found.line}: {found.package} belongs in {rooms}"
        if found.package in ONLY_IN_FUNCTIONS:
            deferred = found.in_function or found.for_types_only
            assert deferred, f"line {found.line}: import {found.package} inside a function"


@each_module
def test_nothing_is_swallowed_evaluated_or_asserted(path: Path) -> None:
    assert problems_in(tree_of(path), globals_allowed=name_of(path) in GLOBALS) == []


@each_module
def test_modules_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST


@each_module
def test_modules_have_a_docstring(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), "no docstring"


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    x()\nexcept Exception:\n    pass",
        "try:\n    x()\nexcept (ValueError, Exception):\n    ...",
        "try:\n    x()\nexcept:\n    return None",
        "for y in z:\n    try:\n        x()\n    except BaseException:\n        continue",
        "with suppress(Exception):\n    x()",
        "with contextlib.suppress(OSError, BaseException):\n    x()",
        "eval('1')",
        "threading.Thread(target=x)",
        "Thread(target=x, name=f'worker-{y}')",
        "Thread(target=x, name=f'{y}-netloader')",
        "assert x",
        "def f():\n    global x",
    ],
)
def test_the_rules_detect_what_they_forbid(source: str) -> None:
    assert len(problems_in(ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    x()\nexcept FileNotFoundError:\n    pass",
        "try:\n    x()\nexcept Exception as error:\n    log(error)",
        "try:\n    x()\nexcept BaseException:\n    close()\n    raise",
        "with suppress(ProcessLookupError):\n    x()",
        "threading.Thread(target=x, name=f'netloader-{y}')",
        "threading.Thread(target=x, name='netloader-y')",
        "threading.Thread(target=x, name=name)",
        "re.compile('x')",
    ],
)
def test_the_rules_accept_everything_else(source: str) -> None:
    assert problems_in(ast.parse(source)) == []
