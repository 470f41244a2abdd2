"""Pulling processed weights: create the same tensors, compare their manifest, fill them, derive the rest.

Post-processing runs once on the freshly built model and creates the tensors. The pull fills them. By vLLM's rules,
post-processing then runs again under `weights_already_processed` and creates everything else; under vllm-ascend it does
not run again (see `netloader.vllm.model.post_processing`). Digests then show every difference from the source.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from netloader.errors import NetloaderError
from netloader.vllm.model.ascend_processed import saved_registries
from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.load_state import apply_load_state
from netloader.vllm.model.post_processing import Contract, contract
from netloader.vllm.model.processed import FACTS, fact_names, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from netloader.core.report import PullReport

__all__ = [
    "Adopted",
    "NotAdopted",
    "Registrations",
    "adopt_processed",
    "check_adopted",
    "check_supported",
    "skip_transformations",
]

log = logging.getLogger(__name__)

_HINT = "use a newer vLLM, or a raw source"


class NotAdopted(NetloaderError):
    """Processed weights of a source can't become a model here."""


@dataclass(frozen=True)
class Adopted:
    """What was pulled, for comparing the finished model with it.

    Attributes:
        report: The report of the pull.
        pulled: Digest of every tensor as it was pulled.
        facts: Digests of the source's plain values.
        names: The names of the plain values before post-processing ran again.
    """

    report: PullReport
    pulled: Mapping[str, str]
    facts: torch.Tensor
    names: frozenset[str]


def check_supported(model: torch.nn.Module) -> Contract:
    """The rules by which this engine can take over processed weights.

    Args:
        model: The model, before it is post-processed.

    Raises:
        NotAdopted: There are none, or they do not cover the model.
    """
    known, reason = contract()
    if known is None:
        raise NotAdopted(reason, hint=_HINT)
    unknown = known.unknown(model)
    if unknown:
        raise NotAdopted(unknown[0], hint=_HINT)
    return known


def adopt_processed(
    model: torch.nn.Module,
    model_config: Any,
    device: str,
    rules: Contract,
    pull: Callable[[Mapping[str, torch.Tensor]], PullReport],
) -> Adopted:
    """Post-process a freshly built model and fill it with processed weights from a source.

    vLLM post-processes the model once more after the load. :func:`skip_transformations` keeps it from changing tensors.

    Args:
        model: The model. If this function raises, the model has to be built again.
        model_config: vLLM's configuration of the model.
        device: The device of the model, as torch names it.
        rules: What :func:`check_supported` returned.
        pull: Fills tensors. It checks names, dtypes, shapes, strides and aliases of all tensors before the first byte.

    Raises:
        NetloaderError: The structure differs, the pull failed, or post-processing changed what was pulled.
    """
    import torch
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    _zero_values(model)
    process_weights_after_loading(model, model_config, torch.device(device))
    found = survey(model, {})
    problems = [*rules.undeclared(model), *found.problems]
    if problems:
        raise NotAdopted(f"weights here are not all tensors with names: {problems[0]}", hint="use a raw source")
    report = pull(found.tensors)
    apply_load_state(model, report.identity.load_state)
    pulled = {name: digest_of(tensor) for name, tensor in found.tensors.items()}
    adopted = Adopted(report, pulled, found.tensors[FACTS].clone(), frozenset(found.facts))
    del found
    rules.finish(model, model_config, torch.device(device))
    check_adopted(model, adopted)
    return adopted


def skip_transformations(post_processing: ExitStack, model: torch.nn.Module) -> None:
    """Let vLLM's post-processing, which runs in `post_processing`, change no tensor of this processed model.

    Raises:
        NotAdopted: This engine has no rules for processed weights.
    """
    post_processing.enter_context(check_supported(model).skipping(model))


def check_adopted(model: torch.nn.Module, adopted: Adopted) -> None:
    """Compare a model with what was pulled into it.

    Args:
        model: The model after post-processing under `weights_already_processed`.
        adopted: What was pulled.

    Raises:
        NotAdopted: A tensor or a plain value differs from the source's.
    """
    pulled, facts = adopted.pulled, adopted.facts
    now = survey(model, {})
    ours = now.tensors[FACTS]
    digests = {name: digest_of(tensor) for name, tensor in now.tensors.items()}
    wrong = sorted(n for n in digests.keys() | pulled.keys() if n != FACTS and digests.get(n) != pulled.get(n))
    if wrong:
        raise NotAdopted(f"post-processing changed tensors that were pulled: {wrong[0]}", hint="use a raw source")
    other = sorted(now.facts.keys() ^ adopted.names)
    if other:
        raise NotAdopted(f"post-processing left other plain values than before: {other[0]}", hint="use a raw source")
    wrong = fact_names(now.facts, ours, facts)
    if wrong:
        some = ", ".join(f"{name} (here: {now.facts[name]})" for name in wrong[:3])
        raise NotAdopted(
            f"plain values differ from the source's and are not recomputed: {some}", hint="use a raw source"
        )


def _zero_values(model: torch.nn.Module) -> None:
    """Zero the parameters that will be pulled, except single values, because post-processing may check those."""
    import torch

    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.numel() > 1:
                tensor.zero_()


class Registrations:
    """vLLM's tables of layers as they were before the build, so that the model can be built a second time.

    The constructor of a layer adds the layer to these tables, which are part of vLLM's configuration.

    Args:
        vllm_config: vLLM's configuration, before the model is built.
        model_config: The part of it that describes the model.
        prefix: The name under which vLLM builds the model.
        device: Where it builds the model, as torch names it.
    """

    _TABLES = ("static_forward_context", "static_all_moe_layers")

    def __init__(self, vllm_config: Any, model_config: Any, prefix: str, device: str) -> None:
        self._build = partial(_build, vllm_config, model_config, prefix, device)
        config = getattr(vllm_config, "compilation_config", None)
        tables = [getattr(config, name, None) for name in self._TABLES]
        self._before = [(table, table.copy()) for table in tables if table is not None]
        self._restore_registries = saved_registries()

    def rebuild(self, model: torch.nn.Module) -> None:
        """Build the model again in the same object. Its present contents are freed first."""
        vars(model).clear()
        for table, before in self._before:
            table.clear()
            if isinstance(table, list):
                table.extend(before)
            else:
                table.update(before)
        self._restore_registries()
        gc.collect()
        log.info("netloader: the model is built anew, since its structure was that of processed weights")
        vars(model).update(vars(self._build()))


def _build(vllm_config: Any, model_config: Any, prefix: str, device: str) -> torch.nn.Module:
    import torch
    from vllm.model_executor.model_loader.utils import initialize_model

    with torch.device(device):
        model: torch.nn.Module = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
    return model
