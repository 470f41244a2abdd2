"""Everything that decides how a model is quantised, as one text that two engines can compare, and in words.

vLLM's own object (`QuantizationConfig`) can't be compared, because it changes while the model is built, and its
attributes differ between releases. Its inputs stay the same: the configuration of the model, the user's overrides, and
a few files.

No quantisation method is listed here by name. The inputs follow from the way in which vLLM constructs the object:

1. vLLM passes its findings to the class: the model's configuration, arguments, overrides, or a file that the class
   names. All of them are compared.
2. vLLM then calls `maybe_update_config`, in which a class may read other files. ModelSlim of vllm-ascend, for example,
   reads a file that it does not name. For such a class of another package, more is compared: every JSON file in the
   folder with "quant" in its name, and the contents of an object that is constructed for the comparison only, so that
   no model has changed it. vLLM's own classes read the headers of the weight files there. These show in the manifest.
3. If none of these inputs exists, the method was selected by arguments alone. Then only the contents of such an object
   are compared, and the text says "arguments only".
4. If the contents of the object can't be compared, the text is empty. For a quantised model that means "not known",
   which never counts as equal (:func:`netloader.core.identity.differences`).
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netloader.core.identity import OF_QUANTIZATION, ModelIdentity, quantised_unknown_how
from netloader.vllm.model.plain_values import NotComparable, contents_of, digest_of_plain, plain, short_text

__all__ = ["Quantisation", "quantisation_of", "why_unknown"]

log = logging.getLogger(__name__)

_DERIVED = frozenset({"total_num_heads", "total_num_kv_heads"})
"""Keys that vLLM adds to the model's configuration during start-up."""

_DESCRIPTION = "quant_model_description.json"
"""ModelSlim's file: a method for each tensor, and settings for all of them."""

_MOST, _LONGEST = 32, 64
"""Most settings of a part of the configuration that are stated by name, and most characters of such a name."""

_OVERRIDES = ("quantization_config_file", "quantization_config_dict_json")
_ENVIRONMENT = ("VLLM_", "_QUANT_CONFIG")
"""Beginning and end of the names of variables that hold a whole configuration, as JSON or as the path of a file."""


@dataclass(frozen=True)
class Quantisation:
    """How a model is quantised.

    Attributes:
        text: A digest over the configuration, and the dtype of the KV cache if it is not the default. Empty for a model
            that is not quantised, and for one whose quantisation is not known.
        settings: What the configuration says, by path. The digest decides whether two are equal; these show in what
            they differ.
    """

    text: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def quantisation_of(
    model_config: Any, cache_config: Any, load_config: Any = None, folder: Path | None = None
) -> Quantisation:
    """The configuration of the quantisation of a model.

    Args:
        model_config: vLLM's configuration of the model.
        cache_config: vLLM's configuration of its KV cache, or None.
        load_config: How vLLM was told to load.
        folder: The folder of the model's files; None if the model's name is its path, or if there are none.
    """
    method = model_config.quantization
    parts = dict(_inputs(model_config, Path(str(model_config.model)) if folder is None else folder))
    found = []
    if method and (not parts or _reads_by_itself(method)):
        built = _built(model_config, load_config)
        if built is None:
            return Quantisation()
        if not parts:
            found.append("arguments only")
        parts["built"] = built
    if parts:
        found.append(digest_of_plain(plain(parts)))
    cache = str(getattr(cache_config, "cache_dtype", "auto"))
    if cache != "auto":
        found.append(f"kv-cache {cache}")
    return Quantisation(", ".join(found), dict(_settings(parts)))


def _settings(parts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What each part of a configuration says, at most `_MOST` settings of it and a digest of the others."""
    for part, contents in parts.items():
        if part == "built":
            continue  # made from the other parts
        known = json.loads(json.dumps(plain(contents)))
        if not isinstance(known, dict):
            yield f"{OF_QUANTIZATION}{part}", short_text(known)
            continue
        # ModelSlim lists the method of each tensor by the name of the tensor, beside settings for all of them.
        methods = {key: value for key, value in known.items() if "." in key and isinstance(value, str)}
        others = {key: value for key, value in known.items() if key not in methods}
        shown = [key for key in sorted(others) if len(key) <= _LONGEST][:_MOST]
        start = OF_QUANTIZATION if part in ("config", _DESCRIPTION) else f"{OF_QUANTIZATION}{part}."
        yield from ((f"{start}{key}", short_text(others[key])) for key in shown)
        if methods:
            count = sorted(Counter(methods.values()).items())
            yield f"{start}methods", short_text(", ".join(f"{method} {number}" for method, number in count))
            yield f"{start}tensors", f"blake2b:{digest_of_plain(methods)}"
        if len(others) > len(shown):
            rest = {key: value for key, value in others.items() if key not in shown}
            yield f"{start}others", f"blake2b:{digest_of_plain(rest)}"


def why_unknown(identity: ModelIdentity) -> str:
    """Why a model whose quantisation is not known can be neither pulled nor served; empty when it is known."""
    if not quantised_unknown_how(identity):
        return ""
    return f"nothing says how {identity.quantization} quantises this model (quantization_config is not known)"


def _is_foreign(method: str) -> bool:
    """Whether the class of this method belongs to another package than vLLM."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    return not get_quantization_config(method).__module__.startswith("vllm.")


def _reads_by_itself(method: str) -> bool:
    """Whether the class of this method belongs to another package and may read files in `maybe_update_config`."""
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    found = get_quantization_config(method)
    return _is_foreign(method) and found.maybe_update_config is not QuantizationConfig.maybe_update_config


def _built(model_config: Any, load_config: Any) -> Any:
    """The contents of the object that vLLM makes for this model, made once more; None if they can't be compared."""
    from vllm.config import VllmConfig

    try:
        # vLLM makes the object from a copy of the configuration, and changes that copy.
        built = VllmConfig.get_quantization_config(model_config, load_config)
        return plain(vars(built), strict=True)
    except NotComparable as error:
        reason = f"its {error} has no content that can be compared"
    except Exception as error:  # noqa: BLE001 - another package's code; its model is refused, the load goes on
        reason = f"{type(error).__name__}: {error}"
    log.warning(
        "netloader: how %s quantises %s is not known: %s", model_config.quantization, model_config.model, reason
    )
    return None


def _inputs(model_config: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """The inputs of vLLM's `get_quant_config`, in its order of preference; then the files that a class may read."""
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
        # vLLM uses every file whose name ends with one of these.
        if file.name.endswith(named) or (foreign and "quant" in file.name.lower()):
            yield file.name, contents_of(file)
