"""Settings of vLLM that decide a model's tensors, as text that two engines can compare.

settings.toml says of each field of vLLM's configuration, and of each of its environment variables, what it decides. A
field that is not listed there comes from a newer vLLM. If it is not at its default, it counts as one that decides
weights: two engines with equal settings match, and others are refused by its path.

The same holds for the settings of vllm-ascend: the keys of `additional_config`, and its environment variables. Nobody
knows the default of a key that is not listed there, so it always counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netloader.core.identity import Role
from netloader.vllm.model.ascend_table import PACKAGE
from netloader.vllm.model.classifier_tokens import classifier_tokens_of
from netloader.vllm.model.config_file import digest_of_config
from netloader.vllm.model.folders import folder_of_config
from netloader.vllm.model.function_texts import function_text
from netloader.vllm.model.plain_values import NotComparable, contents_of, hidden_text, plain, short_text
from netloader.vllm.model.release import release_of_engine

__all__ = ["ADDITIONAL", "ASCEND_ENVIRONMENT", "ENVIRONMENT", "Entry", "Settings", "read_table", "settings_of"]

ENVIRONMENT = "environment"
"""The key of the table under which environment variables are listed."""

ADDITIONAL = "vllm-ascend additional_config"
"""The key of the table under which keys of ``--additional-config`` are listed, nested ones with dots."""

ASCEND_ENVIRONMENT = "vllm-ascend environment"
"""The key of the table under which environment variables of vllm-ascend are listed."""

_ADDITIONAL = "additional_config"
"""The field of vLLM's configuration that holds them."""

_OF_ASCEND = "VLLM_ASCEND_"
"""How the names of its variables begin, but for a few that other software has too."""

_POSITIONS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings", "sliding_window")
"""What the tables of rotary embeddings are computed from."""


@dataclass(frozen=True)
class Entry:
    """What one field decides.

    Attributes:
        decides: ``weights``, ``processed``, ``elsewhere``, ``inside`` or ``nothing``.
        why: The reason.
        neutral: Values that do nothing, beside those that never do anything. None: also false and 0.
        always: Whether the value is always stated.
        by: Fields of the identity that say it, if it is decided elsewhere.
        file: Whether the value is the path of a file, whose contents count.
        variable: The environment variable that has the value if the key is not given.
        classed: Whether the table has it. Else it may be a secret, and its value is not shown.
    """

    decides: str
    why: str
    neutral: tuple[Any, ...] | None = None
    always: bool = False
    by: tuple[str, ...] = ()
    file: bool = False
    variable: str = ""
    classed: bool = True

    def is_neutral(self, value: Any) -> bool:
        """Whether `value`, in the types of JSON, does nothing."""
        if value is None or value in ("", "auto", [], {}):
            return True
        return not value if self.neutral is None else value in self.neutral


_UNKNOWN = Entry("weights", "not classed yet", always=True, classed=False)
"""What a field decides that is not in the table."""


_CARD = "ascend_device_type"
_KIND_OF_CARD = Entry("processed", "operators pack weights for the kind of NPU", always=True)


@dataclass(frozen=True)
class Settings:
    """What decides the tensors of a model, by path.

    Attributes:
        weights: Settings that decide raw tensors.
        processed: Settings that decide only processed tensors.
        unknown: Why the settings are not known, so that the model can be neither pulled nor served; empty if they are.
    """

    weights: Mapping[str, str] = field(default_factory=dict)
    processed: Mapping[str, str] = field(default_factory=dict)
    unknown: str = ""


@functools.cache
def read_table() -> Mapping[str, Mapping[str, Entry]]:
    """The table: class of vLLM -> field -> what it decides, in the order of settings.toml."""
    found = tomllib.loads(Path(__file__).with_name("settings.toml").read_text("utf-8"))
    return {owner: dict(_entries(groups)) for owner, groups in found.items()}


def _entries(groups: list[dict[str, Any]]) -> Iterator[tuple[str, Entry]]:
    for group in groups:
        neutral = group.get("neutral")
        values = tuple(neutral) if isinstance(neutral, list) else (neutral,)
        entry = Entry(
            group["decides"],
            group["why"],
            None if neutral is None else values,
            group.get("always", False),
            tuple(group.get("by", ())),
            group.get("file", False),
            group.get("variable", ""),
        )
        for name in group["fields"]:
            yield name, entry


def settings_of(vllm_config: Any, model_config: Any, role: Role, folder: Path | None) -> Settings:
    """The settings of an engine that decide the tensors of one of its models.

    Call it before vLLM builds the model, because the build changes the configuration.

    Args:
        vllm_config: vLLM's configuration.
        model_config: The configuration of the model. For a draft it is not the one in `vllm_config`.
        role: Which model it is.
        folder: The folder of the model's files; None when there is none on this host.
    """
    weights: dict[str, str] = {}
    processed: dict[str, str] = {}
    try:
        of_vllm = _Walk(model_config, role, folder).fields(vllm_config, "")
        for path, entry, value in (*of_vllm, *_additional(vllm_config), *_environment(), *_card()):
            known = json.loads(json.dumps(plain(value, strict=True)))
            if entry.always or not entry.is_neutral(known):
                text = short_text(known) if entry.classed else hidden_text(path, known)
                (processed if entry.decides == "processed" else weights)[path] = text
    except NotComparable as error:
        return Settings(unknown=f"settings of the engine can't be compared: {error}")
    return Settings(weights, processed)


Found = tuple[str, Entry, Any]
"""Path, what it decides, and the value."""


@dataclass(frozen=True)
class _Walk:
    """Walks through a configuration, for one model."""

    model_config: Any
    role: Role
    folder: Path | None

    def fields(self, config: Any, prefix: str) -> Iterator[Found]:
        """All fields of `config`, and of the configurations in it, that decide tensors."""
        table = read_table()
        owners = [owner.__name__ for owner in type(config).__mro__ if owner.__name__ in table]
        for each in dataclasses.fields(config):
            path = f"{prefix}{each.name}"
            value = getattr(config, each.name, None)
            entry = next((table[owner][each.name] for owner in owners if each.name in table[owner]), None)
            if entry is None:
                yield from self._new(path, each, value)
            elif entry.decides == "inside":
                yield from self._inside(path, value)
            elif entry.decides in ("weights", "processed"):
                yield from self._values(path, entry, config, value)

    def _inside(self, path: str, value: Any) -> Iterator[Found]:
        if path == "model_config":
            value = self.model_config
        if path == "speculative_config" and self.role == "target":
            return
        if dataclasses.is_dataclass(value):
            yield from self.fields(value, f"{path}.")

    def _new(self, path: str, field: dataclasses.Field[Any], value: Any) -> Iterator[Found]:
        # What cannot be set follows from fields that can.
        if field.name.startswith("_") or not field.init:
            return
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from self.fields(value, f"{path}.")
        elif not _is_default(field, value):
            yield path, _UNKNOWN, value

    def _values(self, path: str, entry: Entry, config: Any, value: Any) -> Iterator[Found]:
        match path:
            case "model_config.convert" | "model_config.runner":
                resolved = getattr(config, f"{path.rpartition('.')[2]}_type", value)
                yield path, entry, "generate" if resolved == "draft" else resolved
            case "model_config.hf_overrides":
                yield path, entry, _overrides(value)
            case "model_config.hf_config":
                if digest := self._config_file(config):
                    yield path, entry, f"blake2b:{digest}"
            case "model_config.tokenizer":
                yield path, entry, classifier_tokens_of(config)
            case "model_config.hf_text_config":
                for name in _POSITIONS:
                    if getattr(value, name, None) is not None:
                        yield f"{path}.{name}", entry, getattr(value, name)
            case "model_config.multimodal_config.limit_per_prompt":
                yield path, entry, sorted(kind for kind, most in value.items() if getattr(most, "count", most) == 0)
            case _:
                yield path, entry, _contents(path, value) if entry.file and value else value

    def _config_file(self, config: Any) -> str:
        given = getattr(config, "hf_config_path", None)
        name = str(given or config.model)
        folder = folder_of_config(config, name) if given else self.folder
        digest = digest_of_config(folder, str(config.config_format), downloaded=not Path(name).exists())
        if given and not digest:
            raise NotComparable(f"model_config.hf_config_path names {given}, where no configuration file can be read")
        return digest


def _environment() -> Iterator[Found]:
    # A variable that is set counts, also if to the value that it has anyway: which one that is depends on the release.
    from vllm.envs import environment_variables

    table = read_table()
    for name in sorted(set(environment_variables) & os.environ.keys()):
        entry = table[ENVIRONMENT].get(name, _UNKNOWN)
        if entry.decides in ("weights", "processed"):
            yield name, dataclasses.replace(entry, always=True), environment_variables[name]()
    of_ascend = table[ASCEND_ENVIRONMENT]
    for name in sorted(name for name in os.environ if name in of_ascend or name.startswith(_OF_ASCEND)):
        entry = of_ascend.get(name, _UNKNOWN)
        if entry.decides in ("weights", "processed"):
            yield name, dataclasses.replace(entry, always=True), os.environ[name]


def _additional(vllm_config: Any) -> Iterator[Found]:
    """The settings of vllm-ascend, or of another package that extends vLLM."""
    given = getattr(vllm_config, _ADDITIONAL, None) or {}
    if not isinstance(given, Mapping):
        if not hasattr(given, "compute_hash"):  # vLLM asks for it too
            raise NotComparable(f"{type(given).__qualname__} in {_ADDITIONAL}")
        yield _ADDITIONAL, _UNKNOWN, given.compute_hash()
        return
    yield from _keys(given, "")
    for path, entry in read_table()[ADDITIONAL].items():
        if entry.variable in os.environ and path not in given and entry.decides in ("weights", "processed"):
            yield f"{_ADDITIONAL}.{path}", entry, _switch(os.environ[entry.variable])


def _keys(given: Mapping[Any, Any], prefix: str) -> Iterator[Found]:
    for key, value in given.items():
        name = f"{prefix}{key}"
        path, entry = f"{_ADDITIONAL}.{name}", read_table()[ADDITIONAL].get(name)
        if isinstance(value, Mapping) and (value if entry is None else entry.decides == "inside"):
            yield from _keys(value, f"{name}.")
        elif entry is None:
            # It may name a file, whose path says nothing about another host.
            found = contents_of(Path(value)) if isinstance(value, str) else None
            yield path, _UNKNOWN, value if found is None else found
        elif entry.decides == "inside" and value:
            yield path, _UNKNOWN, value
        elif entry.decides in ("weights", "processed"):
            yield path, entry, _contents(path, value) if entry.file and value else _switch(value)


def _card() -> Iterator[Found]:
    """The kind of NPU, which decides how vllm-ascend and its operators arrange weights."""
    if release_of_engine().package == PACKAGE:
        yield _CARD, _KIND_OF_CARD, sys.modules[f"{PACKAGE}.utils"].get_ascend_device_type().name


def _contents(path: str, file: Any) -> Any:
    found = contents_of(Path(str(file)))
    if found is None:
        raise NotComparable(f"{path} names {file}, which can't be read")
    return found


def _switch(value: Any) -> Any:
    """`value`, with a number in place of a switch or of the text of a number: all three say the same to vllm-ascend."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return int(value) if isinstance(value, bool) else value


def _overrides(value: Any) -> Any:
    """`hf_overrides`, without files of quantisations, whose contents other fields compare."""
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if not str(key).startswith("quantization_config_")}
    return function_text(value) if callable(value) else value


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default: Any = field.default
    if hasattr(default, "get_default"):  # pydantic's description of a field
        default = default.get_default(call_default_factory=True)
    elif default is dataclasses.MISSING:
        make: Any = field.default_factory
        default = default if make is dataclasses.MISSING else make()
    return bool(value is default or (type(value) is type(default) and value == default))
