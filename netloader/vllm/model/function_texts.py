"""What a function of a configuration does, as text that two engines can compare."""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

from netloader.vllm.model.plain_values import NotComparable

__all__ = ["function_text"]

_TRUSTED = frozenset(
    (
        *("__future__", "abc", "collections", "contextlib", "copy", "dataclasses", "enum", "functools"),
        *("itertools", "json", "logging", "math", "operator", "re", "torch", "transformers", "types", "typing"),
        *("typing_extensions", "vllm", "warnings"),
    )
)
"""Packages whose code gives the same on both sides: none of the user's, and none that reads files or the host."""

_READS = frozenset({"__import__", "compile", "eval", "exec", "globals", "input", "open", "vars"})
"""Functions of Python itself with which a function may read what can't be told from its code."""


def function_text(value: Any) -> Any:
    """The name of a function, and a digest of its source and of the plain values that it reads from its module.

    Returns:
        None for vLLM's own functions, which follow from the role. For a partial function a list in the types of JSON.

    Raises:
        NotComparable: The source is not known, or the function depends on anything else: a closure, default arguments,
            a function, a class or a module of the user's, files, or the host.
    """
    if isinstance(value, functools.partial):
        parts = [function_text(value.func), [_argument(item) for item in value.args], dict(value.keywords)]
        return parts if any(parts) else None
    if str(getattr(value, "__module__", "")).partition(".")[0] == "vllm":
        return None
    if not inspect.isfunction(value) or value.__closure__ or value.__defaults__ or value.__kwdefaults__:
        raise NotComparable(f"{value!r} in hf_overrides")
    try:
        source = inspect.getsource(value.__code__)
    except (OSError, TypeError):
        raise NotComparable(f"the function {value.__qualname__} in hf_overrides has no source") from None
    text = f"{source}{_code(value.__code__)}" if value.__name__ == "<lambda>" else source
    if read := _values_read(value):
        text += json.dumps(read, sort_keys=True)
    return f"{value.__qualname__} {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _code(code: CodeType) -> str:
    """What the source of a lambda does not say, because it is the source of its whole line."""
    constants = [_code(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _argument(value: Any) -> Any:
    return function_text(value) if callable(value) else value


def _values_read(function: FunctionType) -> dict[str, Any]:
    """The plain values that a function reads from its module, by name."""
    found: dict[str, Any] = {}
    refusal = f"the function {function.__qualname__} in hf_overrides uses"
    for name, imported in dict.fromkeys(_names_used(function.__code__)):
        if imported:
            if name.partition(".")[0] not in _TRUSTED:
                raise NotComparable(f"{refusal} {name}, which is not compared")
            continue
        known = name in function.__globals__
        if not known and hasattr(builtins, name) and name not in _READS:
            continue
        value = function.__globals__.get(name)
        if known and _package_of(value) in _TRUSTED:
            continue
        try:
            found[name] = json.loads(json.dumps(value, sort_keys=True))
        except (TypeError, ValueError):
            known = False
        if not known:
            raise NotComparable(f"{refusal} {name}, which is not compared")
    return found


def _package_of(value: Any) -> str:
    """The package that defines a module, a class or a function; empty for others, and for functions around others."""
    if isinstance(value, ModuleType):
        name = value.__name__
    elif isinstance(value, FunctionType) and not value.__closure__:
        name = str(value.__globals__.get("__name__"))
    elif isinstance(value, type | BuiltinFunctionType):
        name = str(value.__module__)
    else:
        return ""
    return name.partition(".")[0]


def _names_used(code: CodeType) -> Iterator[tuple[str, bool]]:
    """The names that code looks up in its module, and those of modules that it imports (True)."""
    before: list[Any] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            level = before[-2]  # the number of dots of a relative import
            yield f"{'.' * level}{step.argval}", True
        elif step.opname.startswith("LOAD_") and step.opname.endswith(("GLOBAL", "GLOBALS", "NAME")):
            yield str(step.argval), False
        before.append(step.argval)
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from _names_used(item)
