"""Retention: which originals are kept when post-processing replaces tensors, and which setting would keep more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from netloader.config import Config
from netloader.errors import plural
from netloader.vllm.model.copies import Copies, Keep
from netloader.vllm.model.snapshot import Located
from netloader.vllm.model.unquantised import is_quantised

if TYPE_CHECKING:
    import torch

__all__ = ["copy_log_lines", "hint_for", "keep_policy", "kept_text", "named", "quantised_modules"]

_SHOWN = 3

_BY_KEEP_RAW = (Keep.REFERENCE, Keep.COPY)

_COPY_THEM = (
    "set INT8_CACHE to dram on the server and list these names in INT8_CACHE_NAME, with all others that it shall copy: "
    "only a copy keeps the values of a tensor that is rewritten in place"
)


def quantised_modules(model: torch.nn.Module) -> frozenset[str]:
    """Names of the modules whose weights are quantised."""
    return frozenset(name for name, module in model.named_modules(remove_duplicate=False) if is_quantised(module))


def keep_policy(
    quantised: frozenset[str], config: Config, overwritten: frozenset[str] = frozenset()
) -> Callable[[str], Keep]:
    """The settings INT8_CACHE and KEEP_RAW as a function from the name of a tensor to what is kept of it.

    A name in INT8_CACHE_NAME is copied also if its module is not quantised, because only a copy keeps the values of a
    tensor that is rewritten in place. For the same reason KEEP_RAW makes copies where vLLM may rewrite in place.

    Args:
        quantised: Names of the modules whose weights are quantised.
        config: netloader's configuration.
        overwritten: Names of the modules whose parameters vLLM may overwrite in place.
    """
    copied = Keep.DRAM if config.int8_cache == "dram" else Keep.HBM

    def keep(name: str) -> Keep:
        listed = config.int8_cache_name is not None and name in config.int8_cache_name
        if config.int8_cache != "no" and listed:
            return copied
        if _module_of(name) in quantised:
            return copied if config.int8_cache != "no" and config.int8_cache_name is None else Keep.NO
        if not config.keep_raw:
            return Keep.NO
        return Keep.COPY if _module_of(name) in overwritten else Keep.REFERENCE

    return keep


def hint_for(lost: Mapping[str, str], quantised: frozenset[str], config: Config) -> str:
    """The settings with which these tensors could be served after the next load."""
    hints: dict[str, None] = {}  # an ordered set
    for name, reason in lost.items():
        if "no memory" in reason:
            fewer = "" if config.int8_cache == "no" else ", or list fewer names in INT8_CACHE_NAME"
            hints[f"give the host more memory{fewer}"] = None
        elif _module_of(name) in quantised:
            if config.int8_cache == "no":
                hints["set INT8_CACHE to dram or hbm on the server"] = None
            else:
                hints["add these names to INT8_CACHE_NAME on the server, or leave it out"] = None
        elif "in place" in reason:
            hints[_COPY_THEM] = None
        else:
            hints["set KEEP_RAW to true on the server"] = None
    return "; ".join(hints)


def copy_log_lines(copies: Mapping[Keep, Copies]) -> Iterator[tuple[int, str]]:
    """Log lines about copies that were just made: level and text."""
    for keep, made in copies.items():
        if keep is Keep.SMALL:
            continue
        where = sorted({str(tensor.device) for tensor in made.made.values()})
        if made.moved:
            yield (
                logging.WARNING,
                f"{keep.value}: the device is full, the copies go to the host's memory ({made.moved})",
            )
        if made.failed:
            yield logging.WARNING, f"{keep.value}: no memory for copies of {named(made.failed)}"
        yield (
            logging.INFO,
            f"{keep.value}: {len(made.made)} tensors copied, {made.nbytes} bytes on {', '.join(where) or 'no device'}",
        )


def kept_text(located: Located) -> str:
    """The memory that originals take, by the setting that keeps them, and how many tensors are computed without one.

    Empty when there are neither.
    """
    costs = [
        f"{keep.value}: {nbytes} bytes on {device}{' (false frees them)' if keep in _BY_KEEP_RAW else ''}"
        for (keep, device), nbytes in located.costs().items()
    ]
    parts = [f"originals kept: {'; '.join(costs)}"] if costs else []
    if located.inverses:
        count = len(located.inverses)
        parts.append(f"{plural(count, 'tensor')} computed from processed ones")
    return ", ".join(parts)


def named(names: Iterable[str]) -> str:
    """The first names, and the number of the others."""
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]
