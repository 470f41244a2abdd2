"""What post-processing does to each raw tensor: found by comparing bytes, and by attempts to compute them back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from netloader.codecs.npu_formats import format_of
from netloader.vllm.model.object_walk import Survey
from netloader.vllm.model.processed import FACTS, survey
from tests.vllm import harness

SURVIVES, REWRITTEN, LOST, DROPPED, DERIVED = "survives", "rewritten", "lost", "dropped", "derived"

Row = dict[str, str]
"""One raw or derived tensor: see `Before.compare`."""

_NUMBER = re.compile(r"\.\d+(?=\.)")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Its values on the host, out of their tiles."""
    return tensor.detach().cpu().contiguous().clone()


@dataclass(frozen=True)
class _Raw:
    """A raw tensor: the tensor itself, held, and a copy of its values."""

    held: torch.Tensor
    values: torch.Tensor
    digest: str


class Before:
    """A model between `load_weights` and post-processing."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.raw = {
            # `.data` may be given another tensor: `detach` keeps this one.
            name: _Raw(tensor.detach(), plain(tensor), harness.tensor_digest(tensor))
            for name, tensor in harness.named_tensors(model)
        }
        self.owners = dict(_owners(model))
        self.surveyed = survey(model, {})

    def compare(self, model: torch.nn.Module) -> Iterator[Row]:
        """A row for each raw tensor and for each derived tensor or plain value of the post-processed model.

        It has `path` and `layer`, the module's name without numbers and its class; `method`, the class of the scheme
        that quantises it; `tensor`, its name there; `outcome`; `inverse`, the steps that compute a rewritten one back;
        `now`, what is there now; and `held`, whether a reference that was held meanwhile still has the raw bytes.
        """
        after, owners = dict(harness.named_tensors(model)), dict(_owners(model))
        for name, raw in self.raw.items():
            held = "yes" if harness.tensor_digest(raw.held) == raw.digest else "no"
            row = _row(name, self.owners)
            yield row | _outcome(raw.values, after.get(name)) | {"held": held}
        surveyed = survey(model, {})
        for name, now in _derived(self.surveyed, surveyed).items():
            yield _row(name, owners) | {"outcome": DERIVED, "inverse": "", "now": now, "held": ""}


def _owners(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    yield from model.named_modules(remove_duplicate=False)


def _row(name: str, owners: Mapping[str, torch.nn.Module]) -> Row:
    """The layer, by its class; the scheme that quantises it, by its class; the rest of the name."""
    owner, leaf = name, ""
    while owner not in owners:
        owner, _, last = owner.rpartition(".")
        leaf = f"{last}.{leaf}" if leaf else last
    module = owners[owner]
    method: Any = getattr(module, "quant_method", None)
    scheme = getattr(method, "quant_method", None) or getattr(module, "scheme", None) or method
    path = _NUMBER.sub(".*", f".{owner}.")[1:-1]
    return {
        "layer": type(module).__name__,
        "method": "" if scheme is None else type(scheme).__name__,
        "path": path,
        "tensor": leaf,
    }


def _described(tensor: torch.Tensor) -> str:
    form = "" if format_of(tensor) == "nd" else f", {format_of(tensor)}"
    return f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.dim()}-D{form}"


def _outcome(raw: torch.Tensor, now: torch.Tensor | None) -> Row:
    if now is None:
        return {"outcome": DROPPED, "inverse": "", "now": ""}
    values = plain(now)
    form = format_of(now)
    if form == "nd" and same(values, raw):
        return {"outcome": SURVIVES, "inverse": "", "now": ""}
    found = inverse(values, raw)
    steps = None if found is None else ", ".join([*(["untile"] if form != "nd" else []), *found])
    return {
        "outcome": LOST if steps is None else REWRITTEN,
        "inverse": steps or "",
        "now": _described(now),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and harness.tensor_digest(one) == harness.tensor_digest(other)


def inverse(now: torch.Tensor, raw: torch.Tensor) -> tuple[str, ...] | None:
    """The shortest sequence of exact steps from `now` to `raw`; None if no sequence leads there.

    Tried are: the bytes as int8, the last two dimensions exchanged, another dtype for the same values, another shape
    for the same elements; each at most once, in this order.
    """
    steps = _steps(raw)
    for length in range(len(steps) + 1):
        for chosen in itertools.combinations(steps.items(), length):
            made: torch.Tensor | None = now
            for _, step in chosen:
                made = None if made is None else step(made)
            if made is not None and same(made.contiguous(), raw):
                return tuple(name for name, _ in chosen)
    return None


def _steps(raw: torch.Tensor) -> Mapping[str, Callable[[torch.Tensor], torch.Tensor | None]]:
    dtype = str(raw.dtype).removeprefix("torch.")
    return {
        "view int8": lambda x: x.view(torch.int8) if x.dim() else None,
        "transpose": lambda x: x.transpose(-1, -2).contiguous() if x.dim() > 1 else None,
        f"cast to {dtype}": lambda x: x.to(raw.dtype),
        "reshape": lambda x: x.reshape(raw.shape) if x.numel() == raw.numel() else None,
    }


def _derived(before: Survey, after: Survey) -> dict[str, str]:
    """Tensors and plain values that a model has only after post-processing, with what they are."""
    tensors = {name: _described(t) for name, t in after.tensors.items() if name not in before.tensors and name != FACTS}
    facts = {
        name: f"plain value ({text.partition(' ')[0]})"
        for name, text in after.facts.items()
        if name not in {**before.facts, **before.tensors, **after.tensors} and not text.startswith("view")
    }
    return facts | tensors
