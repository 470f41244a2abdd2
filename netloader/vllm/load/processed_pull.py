"""Taking over processed weights: build the same structure, compare, pull in place, let vLLM rebuild what is no tensor.

The order is vLLM's own contract for weights that are processed already: its post-processing runs once on the freshly
built model, which makes the tensors; they are filled; it runs again under `weights_already_processed`, which makes
everything beside them. Whatever differs from the source after that is found by its digest.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from netloader.errors import NetloaderError
from netloader.vllm.model.digest import digest_of
from netloader.vllm.model.load_state import apply_load_state
from netloader.vllm.model.processed import FACTS, fact_names, flag_problems, possible, survey

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from netloader.core.report import PullReport

__all__ = ["Adopted", "NotAdopted", "ProcessedPull", "Registrations", "adopt_processed", "check_adopted"]

log = logging.getLogger(__name__)


class NotAdopted(NetloaderError):
    """Processed weights of a source can't become a model here."""


@dataclass(frozen=True)
class Adopted:
    """What was pulled, for comparing the finished model with it.

    Attributes:
        report: The account of the pull.
        pulled: Digest of every tensor as it came.
        facts: The source's plain values.
        names: The names of plain values before post-processing ran again.
    """

    report: PullReport
    pulled: Mapping[str, str]
    facts: torch.Tensor
    names: frozenset[str]


def adopt_processed(
    model: torch.nn.Module,
    model_config: Any,
    device: str,
    context: ExitStack,
    pull: Callable[[Mapping[str, torch.Tensor]], PullReport],
) -> Adopted:
    """Turn a freshly built model into one that is post-processed and filled from a source.

    Args:
        model: The model; broken when this raises.
        model_config: vLLM's configuration of it.
        device: Where it lives.
        context: Stays open for as long as vLLM's own post-processing is to leave the weights alone.
        pull: Fills tensors, and checks names, dtypes, shapes, strides and aliases of all before the first byte.

    Raises:
        NetloaderError: The structure differs, the pull failed, or post-processing changed what was pulled.
    """
    import torch
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.utils import weights_already_processed

    _settle_values(model)
    process_weights_after_loading(model, model_config, torch.device(device))
    found = survey(model, {})
    problems = [*flag_problems(model), *found.problems]
    if problems:
        raise NotAdopted(f"weights here are not all tensors with names: {problems[0]}", hint="use a raw source")
    report = pull(found.tensors)
    apply_load_state(model, report.identity.load_state)
    pulled = {name: digest_of(tensor) for name, tensor in found.tensors.items()}
    adopted = Adopted(report, pulled, found.tensors[FACTS].clone(), frozenset(found.facts))
    del found
    context.enter_context(weights_already_processed())
    process_weights_after_loading(model, model_config, torch.device(device))
    check_adopted(model, adopted)
    return adopted


def check_adopted(model: torch.nn.Module, adopted: Adopted) -> None:
    """Compare a model with what was pulled into it.

    Args:
        model: The model after post-processing ran in pre-processed mode.
        adopted: What was pulled.

    Raises:
        NotAdopted: A tensor or a plain value is not the source's.
    """
    pulled, facts = adopted.pulled, adopted.facts
    now = survey(model, {})
    ours = now.tensors[FACTS]
    digests = {name: digest_of(tensor) for name, tensor in now.tensors.items()}
    wrong = sorted(n for n in digests.keys() | pulled.keys() if n != FACTS and digests.get(n) != pulled.get(n))
    if wrong:
        raise NotAdopted(f"post-processing changed tensors that were pulled: {wrong[0]}", hint="use a raw source")
    odd = sorted(now.facts.keys() ^ adopted.names)
    if odd:
        raise NotAdopted(f"post-processing left other plain values than before: {odd[0]}", hint="use a raw source")
    wrong = fact_names(now.facts, ours, facts)
    if wrong:
        some = ", ".join(f"{name} (here: {now.facts[name]})" for name in wrong[:3])
        raise NotAdopted(
            f"plain values differ from the source's and are not recomputed: {some}", hint="use a raw source"
        )


def _settle_values(model: torch.nn.Module) -> None:
    """Zeros for what is pulled anyway; single values stay, since post-processing may insist on what they mean."""
    import torch

    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.numel() > 1:
                tensor.zero_()


class Registrations:
    """What layers wrote into vLLM's configuration when they were built, to take it back before a second build.

    Args:
        vllm_config: vLLM's configuration, before the model is built.
    """

    _TABLES = ("static_forward_context", "static_all_moe_layers")

    def __init__(self, vllm_config: Any) -> None:
        self._vllm_config = vllm_config
        config = getattr(vllm_config, "compilation_config", None)
        tables = {name: getattr(config, name, None) for name in self._TABLES}
        self._before = {name: (table, table.copy()) for name, table in tables.items() if table is not None}

    def rebuild(self, model: torch.nn.Module, model_config: Any, prefix: str, device: str) -> None:
        """Build the model anew, in the same object, whose present content is let go first."""
        import torch
        from vllm.model_executor.model_loader.utils import initialize_model

        vars(model).clear()
        for table, before in self._before.values():
            table.clear()
            if isinstance(table, list):
                table.extend(before)
            else:
                table.update(before)
        gc.collect()
        log.info("netloader: the model is built anew, since its structure was that of processed weights")
        with torch.device(device):
            new = initialize_model(vllm_config=self._vllm_config, model_config=model_config, prefix=prefix)
        vars(model).update(vars(new))


class ProcessedPull:
    """One load's chance to take over processed weights, made before the model is built.

    Args:
        vllm_config: vLLM's configuration.
        model_config: The part of it that describes the model.
        device: Where the model lives.
        prefix: Under which vLLM builds it.

    Attributes:
        context: What vLLM's own post-processing has to run in.
        adopted: What was taken over; None as long as the model is not made of it.
    """

    def __init__(self, vllm_config: Any, model_config: Any, device: str, prefix: str) -> None:
        self.context = ExitStack()
        self.adopted: Adopted | None = None
        self._begun = False
        self._model_config = model_config
        self._device = device
        self._prefix = prefix
        self._registrations = Registrations(vllm_config)

    def run(self, model: torch.nn.Module, pull: Callable[[Mapping[str, torch.Tensor]], PullReport]) -> PullReport:
        """Take over what `pull` brings; see :func:`adopt_processed`."""
        if not possible():
            raise NotAdopted("this vLLM does not know processed weights", hint="use a newer vLLM, or a raw source")
        self._begun = True
        self.adopted = adopt_processed(model, self._model_config, self._device, self.context, pull)
        return self.adopted.report

    def undo(self, model: torch.nn.Module) -> bool:
        """Make `model` what vLLM built, if taking over was begun; whether it had to be done."""
        if not self._begun:
            return False
        self.context.close()
        self.adopted, self._begun = None, False
        self._registrations.rebuild(model, self._model_config, self._prefix, self._device)
        return True

    def check(self, model: torch.nn.Module) -> None:
        """After vLLM's own post-processing: whether the model is still what was pulled.

        Raises:
            NotAdopted: It is not.
        """
        if self.adopted is not None:
            check_adopted(model, self.adopted)
