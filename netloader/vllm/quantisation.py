"""Everything that decides how a model is quantised, as one text that two instances can compare.

vLLM's own object (`QuantizationConfig`) is no help: it changes while the model is built, and its attributes are other
ones in the next release. What it is made *from* stays the same: the configuration of the model, what the user put over
it, and a few files.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["quantisation_text"]

_DERIVED = frozenset({"total_num_heads", "total_num_kv_heads"})
"""vLLM writes these into the model's own configuration at some time during start-up."""

_OVERRIDES = ("quantization_config_file", "quantization_config_dict_json")
_DEPTH = 16


def quantisation_text(model_config: Any, cache_config: Any) -> str:
    """A digest over the configuration of the quantisation, and the type of the KV cache where it is not the usual one.

    Args:
        model_config: vLLM's configuration of the model.
        cache_config: vLLM's configuration of its KV cache, or None.

    Returns:
        The text; empty for a model without any of it.
    """
    parts = dict(_inputs(model_config))
    found = []
    if parts:
        text = json.dumps(_plain(parts), sort_keys=True)
        found.append(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
    cache = str(getattr(cache_config, "cache_dtype", "auto"))
    if cache != "auto":
        found.append(f"kv-cache {cache}")
    return ", ".join(found)


def _inputs(model_config: Any) -> Iterator[tuple[str, Any]]:
    """What vLLM's `get_quant_config` reads, in its order of preference."""
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
                yield name, _contents(Path(overrides[name])) if name.endswith("_file") else overrides[name]
    method = model_config.quantization
    if method and (given is None or method == "modelopt_mixed"):
        yield from _files(str(method), Path(str(model_config.model)))


def _of_config(hf_config: Any) -> Iterator[Any]:
    yield getattr(hf_config, "quantization_config", None)
    yield getattr(getattr(hf_config, "text_config", None), "quantization_config", None)
    yield getattr(hf_config, "compression_config", None)


def _files(method: str, folder: Path) -> Iterator[tuple[str, Any]]:
    from vllm.model_executor.layers.quantization import get_quantization_config

    for name in get_quantization_config(method).get_config_filenames():
        if (folder / name).is_file():
            yield name, _contents(folder / name)


def _contents(file: Path) -> Any:
    """What a JSON file says; its bytes' digest where it is none, and nothing where it can't be read: vLLM will say."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    try:
        return json.loads(data)
    except ValueError:
        return hashlib.blake2b(data, digest_size=16).hexdigest()


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as JSON knows it: equal for equal values, in every process; no memory addresses, no order of a set."""
    if depth > _DEPTH or isinstance(value, bool | int | float | str | None):
        return value if depth <= _DEPTH else type(value).__name__
    if isinstance(value, enum.Enum):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, depth + 1) for item in value), key=json.dumps)
    if isinstance(value, type):
        return value.__qualname__
    # A type of torch says what it is; of anything else the name of its class has to do.
    return str(value) if type(value).__name__ == "dtype" else type(value).__qualname__
