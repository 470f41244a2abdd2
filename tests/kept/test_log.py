"""What is logged, line by line with its level: operators search for these lines, and the documentation quotes them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tests.kept import records

ROOT = Path(__file__).parents[2]
PREFIX = "netloader: "
"""How lines begin that are logged beside those of an engine."""

LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SAID_BY_ITSELF = 8
"""Letters of a text, besides those of every line, that has something of its own to say."""


def texts(node: ast.expr) -> Iterator[str]:
    """What a text is in each case, with ``{}`` for what depends on the moment."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        for left in [*texts(node.left)] or ["{}"]:
            for right in [*texts(node.right)] or ["{}"]:
                yield left + right


def levels(node: ast.AST) -> str:
    """The levels that an expression names."""
    named = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr.lower() in LEVELS}
    return "|".join(sorted(level.upper() for level in named))


def _is_logger(node: ast.expr) -> bool:
    """Whether this is ``log``, ``_log``, ``self._log``, ``logging.getLogger(...)``."""
    node = node.func if isinstance(node, ast.Call) else node
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return "log" in name.lower()


def lines_of(call: ast.Call) -> Iterator[str]:
    """The lines that one call logs, or has logged: a call of a logger, one with a level among its arguments, a note."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in LEVELS and isinstance(call.func, ast.Attribute) and _is_logger(call.func.value) and call.args:
        level, given = {"exception": "ERROR"}.get(name, name.upper()), call.args[:1]
    elif name == "Note" and call.args:
        level, given = "NOTE", call.args[:1]
    else:
        level = "|".join(filter(None, (levels(argument) for argument in call.args)))
        given = call.args if level else []
    for argument in given:
        for text in texts(argument):
            yield f"{level}: {text}"


@cache
def trees() -> list[ast.AST]:
    files = sorted((ROOT / "netloader").rglob("*.py"))
    return [ast.parse(file.read_text(encoding="utf-8")) for file in files]


def all_texts(tree: ast.AST) -> Iterator[str]:
    """Texts as they are written: a part of one is none."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in parts:
            yield from texts(node)


def record() -> dict[str, Any]:
    """Level and text -> how many places of the code say so. A line whose level is chosen elsewhere has none."""
    found: Counter[str] = Counter()
    for tree in trees():
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        lines = [line for call in calls for line in lines_of(call)]
        known = {line.partition(": ")[2] for line in lines}
        found.update(lines)
        found.update(f"?: {text}" for text in all_texts(tree) if text.startswith(PREFIX) and text not in known)
    return dict(sorted(found.items()))


def quoted() -> Iterator[tuple[str, str]]:
    """Page and line of each log line that the documentation shows."""
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith(PREFIX):
                yield page.name, line


GAP = re.compile(r"%[\d.]*[sdfrg]|\{\}")


def is_said(line: str, texts: set[str]) -> bool:
    """Whether one of `texts` that says something of its own looks like part of `line` when its gaps are filled."""
    for text in texts:
        parts = GAP.split(text)
        own = re.sub(r"\W|netloader|rank", "", "".join(parts))
        found = len(own) >= SAID_BY_ITSELF and all(part in line for part in parts)
        if found and re.search(".+".join(map(re.escape, parts)), line):
            return True
    return False


def test_log_lines_are_what_they_were() -> None:
    now = record()
    assert len(now) > 80
    assert records.differences("log", now, records.load("log")) == ""


def test_quoted_lines_are_logged() -> None:
    lines, said = [*quoted()], {text for tree in trees() for text in all_texts(tree)}
    assert len(lines) > 6
    assert [(page, line) for page, line in lines if not is_said(line, said)] == []
    assert not is_said("netloader: rank 0: the custom loader (auto) reads the target: why", said)


def test_lines_are_found_wherever_they_are_written() -> None:
    code = (
        "log.warning('a %s', x); log.log(logging.INFO if x else logging.DEBUG, f'b {x}')\n"
        "Note('c' + ('d' if x else 'e')); Nuisance('f', logging.ERROR, 1); log.exception(g if x else 'h'); print('i')"
    )
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    found = {line for call in calls for line in lines_of(call)}
    assert found == {"WARNING: a %s", "DEBUG|INFO: b {}", "NOTE: cd", "NOTE: ce", "ERROR: f", "ERROR: h"}
