"""The Python sources of a release, in a zip file, read by `ast`: names of a module, and parameters that they take."""

from __future__ import annotations

import ast
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.ImportFrom


class Sources:
    """The modules of one release."""

    def __init__(self, files: Path) -> None:
        self._files = zipfile.ZipFile(files)
        self._names = frozenset(self._files.namelist())
        self.tree = cache(self._tree)

    def _tree(self, module: str) -> ast.Module | None:
        path = self.path_of(module)
        return None if path is None else ast.parse(self._files.read(path))

    def modules(self) -> list[str]:
        """The names of all modules."""
        stems = (path.removesuffix(".py").removesuffix("/__init__") for path in self._names if path.endswith(".py"))
        return sorted(stem.replace("/", ".") for stem in stems)

    def path_of(self, module: str) -> str | None:
        """The file of a module."""
        stem = module.replace(".", "/")
        return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in self._names), None)

    def text(self, module: str) -> str:
        """The source text of a module."""
        path = self.path_of(module)
        return "" if path is None else self._files.read(path).decode()

    def find(self, module: str, symbol: str) -> tuple[str, Definition] | None:
        """Where `symbol` ("name" or "Class.attribute") of a module is really defined, following re-exports."""
        tree = self.tree(module)
        if tree is None:
            return None
        name, _, attribute = symbol.partition(".")
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*":
                        found = self.find(_origin(module, node, self.path_of(module) or ""), symbol)
                        if found is not None:
                            return found
                    elif (alias.asname or alias.name) == name:
                        origin = _origin(module, node, self.path_of(module) or "")
                        more = f".{attribute}" if attribute else ""
                        return self.find(origin, alias.name + more) or (None if attribute else (origin, node))
            elif name in _bound(node):
                return self._in_class(module, node, attribute) if attribute else (module, node)
        # A package that resolves its names lazily lists them as text.
        if not attribute and f'"{name}"' in self.text(module) and self.find(module, "__getattr__") is not None:
            return next(((module, node) for node in _statements(tree.body) if "__getattr__" in _bound(node)), None)
        return None

    def _in_class(self, module: str, node: Definition, attribute: str) -> tuple[str, Definition] | None:
        if not isinstance(node, ast.ClassDef):
            return None
        for defined in _statements(node.body):
            if attribute in _bound(defined):
                return module, defined
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign | ast.AnnAssign):
                targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                if any(ast.unparse(target) == f"self.{attribute}" for target in targets):
                    return module, inner
        for base in node.bases:
            found = self.find(module, f"{ast.unparse(base)}.{attribute}") if isinstance(base, ast.Name) else None
            if found is not None:
                return found
        return None

    def parameters(self, module: str, symbol: str) -> list[str]:
        """Names of the parameters of a function or method, or of those that a class is made with."""
        found = self.find(module, symbol)
        if found is None:
            return []
        where, node = found
        if isinstance(node, ast.ClassDef):
            made = self._in_class(where, node, "__init__")
            if made is not None:
                node = made[1]
            else:
                return [name for inner in node.body if isinstance(inner, ast.AnnAssign) for name in _bound(inner)]
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return []
        given = node.args
        every = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        return [name for name in every if name not in {"self", "cls"}]


def _statements(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    """The definitions in a body, also conditional ones; the last definition of a name may be the effective one."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            handlers = [inner for handler in node.handlers for inner in handler.body]
            yield from _statements([*node.body, *handlers, *node.orelse])


def _bound(node: Definition) -> set[str]:
    match node:
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case _:
            return set()


def _origin(module: str, node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    # Inside a package, one dot is the package itself.
    up = node.level - 1 if path.endswith("__init__.py") else node.level
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])
