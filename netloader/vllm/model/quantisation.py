"""Everything that decides how a model is quantised, as one text that two instances can compare.

vLLM's own object (`QuantizationConfig`) is no help: it changes while the model is built, and its attributes are other
ones in the next release. What it is made *from* stays the same: the configuration of the model, what the user put over
it, and a few files.

No method is known by its name here. What counts follows from how vLLM makes the object:

1. vLLM hands the class what it found: the model's configuration, arguments, overrides, or a file that the class names.
   All of that counts.
2. It then calls `maybe_update_config`, in which a class may read whatever it likes. A class of another package that
   does so (ModelSlim of vllm-ascend names no file, and reads one) is not believed to need the above only: every JSON
   file of the folder with "quant" in its name counts too, and the content of an object that is made for this purpose
   and thrown away, so that no model has changed it. vLLM's own classes look at the headers of the weight files there,
   which shows in the list of tensors.
3. Where none of this exists, the method was asked for by arguments alone: the same fresh object is all there is to
   compare, and the text says so.
4. An object with content that can't be told leaves the text empty. For a quantised model that means "not known", which
   never counts as equal (:func:`netloader.core.identity.differences`).
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from netloader.core.identity import ModelIdentity, quantised_unknown_how

__all__ = ["contents_of", "quantisation_text", "why_unknown"]

log = logging.getLogger(__name__)

_DERIVED = frozenset({"total_num_heads", "total_num_kv_heads"})
"""vLLM writes these into the model's own configuration at some time during start-up."""

_OVERRIDES = ("quantization_config_file", "quantization_config_dict_json")
_ENVIRONMENT = ("VLLM_", "_QUANT_CONFIG")
"""How the variables begin and end by which vLLM is given a whole configuration, as JSON or as the path of a file."""

_DEPTH = 16


class _Untold(Exception):
    """A value whose content can't be told."""


def quantisation_text(model_config: Any, cache_config: Any, load_config: Any = None, folder: Path | None = None) -> str:
    """A digest over the configuration of the quantisation, and the type of the KV cache where it is not the usual one.

    Args:
        model_config: vLLM's configuration of the model.
        cache_config: vLLM's configuration of its KV cache, or None.
        load_config: How vLLM was told to load.
        folder: Where the model's files are; None where its name is a path, or where there are none.

    Returns:
        The text. Empty for a model that is not quantised, and for one of which nothing says how it is.
    """
    method = model_config.quantization
    parts = dict(_inputs(model_config, Path(str(model_config.model)) if folder is None else folder))
    found = []
    if method and (not parts or _reads_by_itself(method)):
        built = _built(model_config, load_config)
        if built is None:
            return ""
        if not parts:
            found.append("arguments only")
        parts["built"] = built
    if parts:
        text = json.dumps(_plain(parts), sort_keys=True)
        found.append(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
    cache = str(getattr(cache_config, "cache_dtype", "auto"))
    if cache != "auto":
        found.append(f"kv-cache {cache}")
    return ", ".join(found)


def why_unknown(identity: ModelIdentity) -> str:
    """Why this model can be neither pulled nor served: nothing says how it is quantised; empty when something does."""
    if not quantised_unknown_how(identity):
        return ""
    return f"nothing says how {identity.quantization} quantises this model (quantization_config is not known)"


def _is_foreign(method: str) -> bool:
    """Whether the class of this method is another package's."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    return not get_quantization_config(method).__module__.startswith("vllm.")


def _reads_by_itself(method: str) -> bool:
    """Whether that is so, and it reads something that nobody hands it."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    found = get_quantization_config(method)
    return _is_foreign(method) and found.maybe_update_config is not QuantizationConfig.maybe_update_config


def _built(model_config: Any, load_config: Any) -> Any:
    """The content of the object that vLLM makes for this model, made once more; None where it can't be told."""
    from vllm.config import VllmConfig

    try:
        # On a copy of the configuration: making the object writes into it.
        built = VllmConfig.get_quantization_config(model_config, load_config)
        return _plain(vars(built), strict=True)
    except _Untold as untold:
        reason = f"its {untold} has no content that can be compared"
    except Exception as error:  # noqa: BLE001 - another package's code; its model is refused, the load goes on
        reason = f"{type(error).__name__}: {error}"
    log.warning(
        "netloader: how %s quantises %s is not known: %s", model_config.quantization, model_config.model, reason
    )
    return None


def _inputs(model_config: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """What vLLM's `get_quant_config` reads, in its order of preference; then what a class may read by itself."""
    hf_config = model_config.hf_config
    given = next((value for value in _of_config(hf_config) if value), None)
    if given is not None:
        if not isinstance(given, Mapping):
            given = given.to_dict()
        yield "config", {key: value for key, value in given.items() if key not in _DERIVED}
    arguments = getattr(model_config, "quantization_config", None)
    if arguments:
        yield "arguments", arguments
    overrides = getattr(model_config, "hf_overrides", None)
    if isinstance(overrides, Mapping):
        for name in _OVERRIDES:
            if overrides.get(name) is not None:
                yield name, contents_of(Path(overrides[name])) if name.endswith("_file") else overrides[name]
    method = model_config.quantization
    if not method:
        return
    environment = {name: _of_variable(os.environ[name]) for name in sorted(os.environ) if _is_config(name)}
    if environment:
        yield "environment", environment
    if given is None or method == "modelopt_mixed" or _reads_by_itself(method):
        yield from _files(method, folder)


def _is_config(variable: str) -> bool:
    begin, end = _ENVIRONMENT
    return variable.startswith(begin) and variable.endswith(end)


def _of_variable(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return contents_of(Path(value))


def _of_config(hf_config: Any) -> Iterator[Any]:
    yield getattr(hf_config, "quantization_config", None)
    yield getattr(getattr(hf_config, "text_config", None), "quantization_config", None)
    yield getattr(hf_config, "compression_config", None)


def _files(method: str, folder: Path) -> Iterator[tuple[str, Any]]:
    from vllm.model_executor.layers.quantization import get_quantization_config

    named, foreign = tuple(get_quantization_config(method).get_config_filenames()), _is_foreign(method)
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        # vLLM takes every file whose name ends so.
        if file.name.endswith(named) or (foreign and "quant" in file.name.lower()):
            yield file.name, contents_of(file)


def contents_of(file: Path) -> Any:
    """What a JSON file says; its bytes' digest where it is none, and nothing where it can't be read: vLLM will say."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    try:
        return json.loads(data)
    except ValueError:
        return hashlib.blake2b(data, digest_size=16).hexdigest()


def _plain(value: Any, depth: int = 0, *, strict: bool = False) -> Any:
    """`value` as JSON knows it: equal for equal values, in every process; no memory addresses, no order of a set.

    Args:
        value: What is to be told.
        depth: How many values it lies in.
        strict: Raise _Untold for what can't be told; else the name of its class has to do.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    if depth > _DEPTH:
        return _untold(value, strict=strict)
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1, strict=strict) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1, strict=strict) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, depth + 1, strict=strict) for item in value), key=json.dumps)
    if isinstance(value, type):
        return value.__qualname__
    if type(value).__name__ == "dtype":
        return str(value)  # a type of torch says what it is
    return _untold(value, strict=strict)


def _untold(value: Any, *, strict: bool) -> str:
    if strict:
        raise _Untold(type(value).__qualname__)
    return type(value).__qualname__
