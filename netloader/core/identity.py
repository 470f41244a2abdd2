"""What must match between a server and a client before anything is sent."""

from __future__ import annotations

import enum
import re
from typing import Annotated, Literal

import msgspec

from netloader.errors import shown

__all__ = [
    "Difference",
    "Layout",
    "ModelIdentity",
    "Role",
    "Severity",
    "differences",
    "is_digest",
    "quantised_unknown_how",
]

Layout = Literal["raw", "processed", "checkpoint"]
Role = Literal["target", "draft"]

MAX_MODEL = 4096
MAX_WORD = 256
MAX_DIGEST = 64
MAX_FACTS = 64

# A name may be a path, as long as the system allows; the rest are words. A peer that sends more breaks the rules.
_Model = Annotated[str, msgspec.Meta(max_length=MAX_MODEL)]
_Word = Annotated[str, msgspec.Meta(max_length=MAX_WORD)]
_Digest = Annotated[str, msgspec.Meta(max_length=MAX_DIGEST)]
_Facts = Annotated[dict[_Word, bool], msgspec.Meta(max_length=MAX_FACTS)]

_NOT_KNOWN = "not known"

_HEX = re.compile(r"[0-9a-f]{1,64}")


def is_digest(text: str) -> bool:
    """Whether `text` is a digest as this library writes them, or empty: not known."""
    return not text or _HEX.fullmatch(text) is not None


class Severity(enum.Enum):
    """What a difference means for a pull."""

    REFUSE = "refuse"
    WARN = "warn"


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Names one rank's share of one model.

    Fields left at their default are not known, or do not apply; a field known on one side only is a difference
    unless :func:`differences` says otherwise.

    Attributes:
        model: Name of the model, as both sides were told.
        architecture: Class of the model (``LlamaForCausalLM``).
        revision: Revision of the checkpoint.
        dtype: Type that the model computes in (``bfloat16``).
        quantization: Quantisation method.
        quantization_config: Digest over the method's configuration. Of a quantised model that is no checkpoint's files
            an empty one means that nothing is known, and never counts as equal.
        layout: How the tensors are laid out (see the words in docs/protocol.md).
        role: ``target``, or ``draft`` for the draft model of speculative decoding.
        tp_size, tp_rank: Tensor-parallel size and this rank's place in it.
        pp_size, pp_rank: Pipeline-parallel size and place.
        ep_size, ep_rank: Expert-parallel size and place; 1 and 0 where experts are not spread.
        expert_placement: How experts are placed: the rule, and digests of the maps that follow from the configuration.
        tied: Whether input and output embeddings are one tensor, where the engine decided that by looking into files.
        load_state: Named facts that a model's own loading sets beside tensors (``has_own_lm_head``).
        engine: Name and version of the engine that holds the tensors.
        load: Digest over rank and root of every rank of the engine that loaded together: equal only where all ranks
            hold the same weights, so that ranks of one client can see that they pulled one model. Never compared
            between server and client.
        fingerprint: Digest of what the checkpoint's headers say and of samples of its contents; empty without weight
            files.
    """

    model: _Model = ""
    architecture: _Word = ""
    revision: _Word = ""
    dtype: _Word = ""
    quantization: _Word = ""
    quantization_config: _Word = ""
    layout: Layout = "raw"
    role: Role = "target"
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    expert_placement: _Word = ""
    tied: bool | None = None
    load_state: _Facts = {}
    engine: _Word = ""
    fingerprint: _Digest = ""
    load: _Digest = ""


def passed_on(own: ModelIdentity, source: ModelIdentity) -> ModelIdentity:
    """The identity of weights that are passed on while they are pulled: our own, with what only the source knows."""
    return msgspec.structs.replace(
        own,
        tied=source.tied if own.tied is None else own.tied,
        load_state=own.load_state or source.load_state,
        fingerprint=source.fingerprint,
        load=source.load,
    )


def quantised_unknown_how(identity: ModelIdentity) -> bool:
    """Whether these are tensors of a quantised model of which nothing says how it is quantised.

    One method has many configurations that make tensors of equal names, types and shapes. The files of a checkpoint are
    what they are, whoever quantised them.
    """
    return bool(identity.quantization) and not identity.quantization_config and identity.layout != "checkpoint"


class Difference(msgspec.Struct, frozen=True):
    """One field that two identities disagree about, or that neither of them knows.

    Attributes:
        field: Name of the field.
        ours, theirs: Both values as text.
        severity: Whether it forbids a pull.
    """

    field: str
    ours: str
    theirs: str
    severity: Severity = Severity.REFUSE

    def __str__(self) -> str:
        return f"{self.field}: ours is {shown(self.ours)}, theirs is {shown(self.theirs)}"


def _severity(field: str, ours: ModelIdentity, theirs: ModelIdentity) -> Severity | None:
    """What a disagreement about `field` means: refuse, warn, or nothing at all (None)."""
    mine, other = getattr(ours, field), getattr(theirs, field)
    if field == "fingerprint":
        # A side without weight files has none; where both have one, other contents are other weights.
        return Severity.REFUSE if mine and other else None
    if field == "load":
        return None  # compared among the ranks of a client, where it means something
    if field == "engine":
        # Raw tensors are what the checkpoint loader left; processed ones depend on the engine's code.
        if "processed" in (ours.layout, theirs.layout):
            return Severity.REFUSE
        return Severity.WARN if mine and other else None
    if field == "revision":
        return Severity.REFUSE if mine and other else Severity.WARN
    if field in ("tied", "load_state"):
        # Facts that only the side that read weight files knows; the other adopts them or has none.
        return Severity.REFUSE if mine not in (None, {}) and other not in (None, {}) else None
    return Severity.REFUSE


def differences(ours: ModelIdentity, theirs: ModelIdentity) -> tuple[Difference, ...]:
    """Name each field in which two identities disagree.

    Args:
        ours: Identity of this side.
        theirs: Identity of the peer.

    Returns:
        One :class:`Difference` per field, in the order of the fields; empty when both agree. How a model is quantised
        counts as a difference where neither knows it. A pull is possible when
        none of them has :attr:`Severity.REFUSE`.
    """
    found = []
    for field in ModelIdentity.__struct_fields__:
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine == other:
            if field == "quantization_config" and (quantised_unknown_how(ours) or quantised_unknown_how(theirs)):
                found.append(Difference(field, _NOT_KNOWN, _NOT_KNOWN))
            continue
        severity = _severity(field, ours, theirs)
        if severity is not None:
            found.append(Difference(field, str(mine), str(other), severity))
    return tuple(found)
