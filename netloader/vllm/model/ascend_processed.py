"""Processed weights under vllm-ascend, whose methods know no weights that are processed already.

Its post-processing runs once, on the model as it was built, and makes every tensor. The pull fills them. After that,
nothing post-processes again: the methods of the model are replaced by one that does nothing, for the rest of the load.
`netloader.vllm.model.ascend_table` lists for which classes that is known to give the model of a load from files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from netloader.vllm.model.ascend_table import (
    ATTENTION,
    DROPPED,
    METHODS,
    PACKAGE,
    RECOMPUTED,
    REGISTRIES,
    RELEASE,
    SCHEMES,
    WRAPPED,
)
from netloader.vllm.model.release import Release

if TYPE_CHECKING:
    import torch

__all__ = ["AscendContract", "saved_registries", "why_not_known"]

_PROCESS = "process_weights_after_loading"


def why_not_known(release: Release) -> str:
    """Why the table does not cover an engine under vllm-ascend; empty if it does."""
    version = release.vllm.partition("+")[0]  # what follows names the device for which vLLM was built
    if (version, release.distribution) == RELEASE:
        return ""
    return f"processed weights are known for vllm {RELEASE[0]}, {RELEASE[1]}, not for {release}"


class AscendContract:
    """How processed weights of vllm-ascend are taken over."""

    def unknown(self, model: torch.nn.Module) -> list[str]:
        """The layers of `model` that the table does not cover; one of each kind."""
        from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

        found: dict[str, str] = {}
        for name, module in model.named_modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, QuantizeMethodBase):
                reason = _unknown_method(module, method)
            elif hasattr(module, _PROCESS) and not isinstance(module, QuantizeMethodBase):
                reason = _unknown_attention(module)
            else:
                continue
            if reason:
                found.setdefault(reason, name)
        return [f"{name}: {reason}" for reason, name in found.items()]

    def undeclared(self, model: torch.nn.Module) -> list[str]:  # noqa: ARG002 - see Contract
        """Nothing: its methods declare nothing."""
        return []

    def emptied(self, model: torch.nn.Module) -> frozenset[str]:
        """Names of the parameters that are None because another tensor, which has a name, has their contents."""
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        found: set[str] = set()
        for module in model.modules():
            impl = getattr(module, "impl", None)
            for (layer, leaf), holder in _of(DROPPED, type(impl), {}).items():
                if _is_tensor(vars(impl).get(holder)):
                    found.update(f"{name}.{leaf}" for name in names.get(id(getattr(impl, layer, None)), ()))
        return frozenset(found)

    def finish(self, model: torch.nn.Module, model_config: Any, device: torch.device) -> None:  # noqa: ARG002
        """Compute again, after the tensors were filled, the plain values that post-processing reads from them."""
        for module in model.modules():
            scheme = getattr(getattr(module, "quant_method", None), "quant_method", None)
            for attribute, tensor in _of(RECOMPUTED, type(scheme), {}).items():
                setattr(module, attribute, getattr(module, tensor).item())

    @contextmanager
    def skipping(self, model: torch.nn.Module) -> Iterator[None]:
        """Meanwhile, post-processing changes nothing in `model`, whichever function calls it."""
        owners = {id(owner): owner for owner in _post_processing(model)}
        with ExitStack() as stack:
            for owner in owners.values():
                stack.enter_context(_replaced(owner, _do_nothing))
            yield


def _unknown_method(module: torch.nn.Module, method: Any) -> str:
    if _PROCESS in vars(method):
        return _replaced_text(vars(method)[_PROCESS])
    if not _is_listed(type(method), METHODS):
        return _unlisted(type(method))
    if not type(method).__module__.startswith(f"{PACKAGE}.quantization."):
        return ""
    scheme = getattr(method, "quant_method", None)
    formats: Sequence[str] = _of(SCHEMES, type(scheme), ())
    if not formats:
        return _unlisted(type(scheme))
    if _PROCESS in vars(scheme):
        return _replaced_text(vars(scheme)[_PROCESS])
    stated = {getattr(module, "ascend_quant_method", ""), getattr(scheme, "quant_method", "")}
    other = sorted(stated.difference(formats))
    return f"{_unlisted(type(scheme))} for {other[0]}" if other else ""


def _unknown_attention(module: torch.nn.Module) -> str:
    impl = getattr(module, "impl", None)
    if not _is_listed(type(module), ATTENTION):
        return _unlisted(type(module))
    if _full_name(type(impl)) != ATTENTION[_full_name(type(module))] or not _is_itself(type(impl)):
        return _unlisted(type(impl))
    own = vars(module).get(_PROCESS)
    if own is not None and getattr(own, "__module__", "") != WRAPPED.get(_full_name(type(module))):
        return _replaced_text(own)
    return ""


def _unlisted(kind: type) -> str:
    return f"{_full_name(kind)} is not in the table of vllm-ascend's methods whose processed weights are known"


def _replaced_text(function: Any) -> str:
    where = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
    return f"its post-processing was replaced by {where}, which is not known"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_itself(kind: type) -> bool:
    """Whether a class is the one that its module has under its name, and not another one that says so."""
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind


def _is_listed(kind: type, names: Any) -> bool:
    return _full_name(kind) in names and _is_itself(kind)


def _of(table: Mapping[str, Any], kind: type, default: Any) -> Any:
    return table[_full_name(kind)] if _is_listed(kind, table) else default


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _post_processing(model: torch.nn.Module) -> Iterator[Any]:
    """All objects whose method post-processing may call: methods of layers, modules, and what these call in turn."""
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            yield method
        for owner in (getattr(method, "quant_method", None), module, getattr(module, "impl", None)):
            if hasattr(owner, _PROCESS):
                yield owner


def _do_nothing(*_: Any, **__: Any) -> None:
    """Takes the place of post-processing for weights that are processed already."""


@contextmanager
def _replaced(owner: Any, function: Callable[..., None]) -> Iterator[None]:
    own = vars(owner)
    before = own.get(_PROCESS)
    own[_PROCESS] = function
    try:
        yield
    finally:
        if before is None:
            del own[_PROCESS]
        else:
            own[_PROCESS] = before


def saved_registries() -> Callable[[], None]:
    """What vllm-ascend's classes note of the layers that were built, now. Call the result to put that back."""
    before = {place: _saved(value) for place, value in _registries()}

    def restore() -> None:
        for place, _ in _registries():
            module, owner, name = place
            value = before.get(place, REGISTRIES[place])
            # A list is filled again in place, because others may hold it.
            held = getattr(getattr(sys.modules[module], owner), name)
            if isinstance(held, list):
                held[:] = value
            else:
                setattr(getattr(sys.modules[module], owner), name, value)

    return restore


def _registries() -> Iterator[tuple[tuple[str, str, str], Any]]:
    """Those of the classes that are imported."""
    for module, owner, name in REGISTRIES:
        kind = getattr(sys.modules.get(module), owner, None)
        if hasattr(kind, name):
            yield (module, owner, name), getattr(kind, name)


def _saved(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
