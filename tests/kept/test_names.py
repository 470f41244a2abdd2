"""The names that programs, scripts and others' transports use: all are there, with the arguments that they had."""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import enum
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import netloader
from tests.kept import records

ROOT = Path(__file__).parents[2]
PUBLIC = (
    "netloader",
    "netloader.sync",
    "netloader.discovery",
    "netloader.observe",
    "netloader.transports.base",
    "netloader.transports.conformance",
    "netloader.transports.faults",
)
BASES = {*netloader.__all__, *dir(builtins)} - {"object"}
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COMMANDS = ("demo", "serve", "pull", "probe", "transports")
IMPORT = re.compile(r"^from (netloader[\w.]*) import ([\w, ]+)$", re.MULTILINE)
HOME = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])")
"""What comes before the name of a class."""


def plain(text: str) -> str:
    """Without the modules that names come from: those may change."""
    return HOME.sub("", text)


def signature(found: Any) -> str:
    return plain(str(inspect.signature(found)))


def members(kind: type) -> Iterator[tuple[str, str]]:
    """What a class has for its users, its own and what it inherits from classes of ours."""
    ours = [one for one in kind.__mro__ if one.__module__.startswith("netloader")]
    names = {name for one in ours for name in (*vars(one), *vars(one).get("__annotations__", {}))}
    for name in sorted(name for name in names if not name.startswith("_")):
        found = inspect.getattr_static(kind, name, None)
        if isinstance(found, staticmethod | classmethod):
            yield name, f"{type(found).__name__} {signature(found.__func__)}"
        elif inspect.isfunction(found):
            yield name, ("async " if inspect.iscoroutinefunction(found) else "") + signature(found)
        elif isinstance(found, property):
            yield name, f"property -> {plain(str(inspect.signature(found.fget).return_annotation))}"  # type: ignore[arg-type]
        elif isinstance(found, enum.Enum) and issubclass(kind, enum.Enum):
            yield name, f"= {found.value!r}"
        else:
            noted = [vars(one)["__annotations__"] for one in ours if "__annotations__" in vars(one)]
            yield name, f": {plain(str(next((each[name] for each in noted if name in each), '')))}"


def _made_by_nobody(kind: type) -> bool:
    """Whether there is nothing to say about how objects of a class are made."""
    plain_error = issubclass(kind, Exception) and not inspect.isfunction(kind.__init__)
    return plain_error or issubclass(kind, enum.Enum) or getattr(kind, "_is_protocol", False)


def described(name: str, found: Any) -> Iterator[tuple[str, str]]:
    """What can be said about a public name, and about its members."""
    if inspect.isclass(found):
        bases = [one.__name__ for one in found.__mro__[1:] if one.__name__ in BASES]
        constructed = "" if _made_by_nobody(found) else signature(found)
        frozen = dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[attr-defined]
        yield name, f"class{constructed}" + (f" is {', '.join(bases)}" if bases else "") + (" frozen" * bool(frozen))
        yield from ((f"{name}.{member}", text) for member, text in members(found))
    elif inspect.isfunction(found):
        yield name, ("async " if inspect.iscoroutinefunction(found) else "") + signature(found)
    elif inspect.ismodule(found):
        yield name, "module"
    elif isinstance(found, tuple):
        yield name, ", ".join(one.__name__ for one in found)
    else:
        yield name, plain(repr(found))


def names() -> Iterator[tuple[str, str]]:
    for module in PUBLIC:
        found = importlib.import_module(module)
        for name in found.__all__:
            yield from described(f"{module}.{name}", getattr(found, name))


def imports() -> Iterator[tuple[str, str]]:
    """What the documentation imports from elsewhere than `PUBLIC`."""
    told = {
        (found[1], name.strip())
        for page in DOCUMENTS
        for found in IMPORT.finditer(page.read_text(encoding="utf-8"))
        for name in found[2].split(",")
        if found[1] not in PUBLIC
    }
    for module, name in sorted(told):
        found = getattr(importlib.import_module(module), name)
        if name not in netloader.__all__:
            yield from described(f"{module}.{name}", found)
        else:
            yield f"{module}.{name}", f"netloader.{name}: {found is getattr(netloader, name)}"


def entry_points() -> Iterator[tuple[str, str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    for group, entries in groups.items():
        for name, target in entries.items():
            module, _, attribute = target.partition(":")
            assert callable(getattr(importlib.import_module(module), attribute)), target
            yield f"entry point {group} {name}", target


class _Parsed(Exception):
    """Carries the parser that was to be used."""


def parser() -> argparse.ArgumentParser:
    """That of the command line, wherever it is made."""

    def caught(self: argparse.ArgumentParser, *_: object) -> None:
        raise _Parsed(self)

    main = importlib.import_module("netloader.cli").main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        with pytest.raises(_Parsed) as raised:
            main(["transports"])
    made: argparse.ArgumentParser = raised.value.args[0]
    return made


def options() -> Iterator[tuple[str, str]]:
    """Each argument of each command, without its explanation."""
    top = parser()
    (commands,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    chosen: Mapping[str, argparse.ArgumentParser] = commands.choices
    assert set(chosen) >= set(COMMANDS)
    for command, made in {"": top, **chosen}.items():
        for action in made._actions:
            if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
                continue
            told = {
                "nargs": action.nargs,
                "default": action.default,
                "choices": action.choices and [*action.choices],
                "metavar": action.metavar,
                "required": action.required or None,
                "flag": isinstance(action, argparse._StoreTrueAction) or None,
            }
            told.pop("default" if action.default == argparse.SUPPRESS else "", None)
            what = " ".join(action.option_strings) or action.dest
            text = ", ".join(f"{key} {value!r}" for key, value in told.items() if value is not None)
            yield f"netloader {command} {what}".replace("  ", " "), text


def record() -> dict[str, Any]:
    return dict([*names(), *imports(), *entry_points(), *options()])


def test_public_names_are_what_they_were() -> None:
    now = record()
    assert len(now) > 300
    assert records.differences("names", now, records.load("names")) == ""


def test_all_names_are_told() -> None:
    assert sorted(netloader.__all__) == dir(netloader)


def test_what_is_gone_or_takes_other_arguments_is_found() -> None:
    before = records.load("names")
    now = {**before, "netloader.pull": "async (tensors)", "netloader.more": "()"}
    del now["netloader.probe"]
    found = records.differences("names", now, before)
    assert [line.partition(":")[0] for line in found.splitlines()[1:-1]] == [
        "- netloader.probe",
        "- netloader.pull",
        "+ netloader.pull",
        "+ netloader.more",
    ]
    assert "python -m tests.kept.records names" in found
