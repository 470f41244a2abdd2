"""The identity of a model: what has to match between a server and a client before anything is sent."""

from __future__ import annotations

import enum
import re
from typing import Annotated, Literal

import msgspec

from netloader.errors import ConfigError, shown

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

# A model's name may be a path, so it may be as long as a path; the other texts are short. Longer texts break the
# protocol.
_Model = Annotated[str, msgspec.Meta(max_length=MAX_MODEL)]
_Word = Annotated[str, msgspec.Meta(max_length=MAX_WORD)]
_Digest = Annotated[str, msgspec.Meta(max_length=MAX_DIGEST)]
_Facts = Annotated[dict[_Word, bool], msgspec.Meta(max_length=MAX_FACTS)]

_NOT_KNOWN = "not known"

_HEX = re.compile(r"[0-9a-f]{1,64}")


def is_digest(text: str) -> bool:
    """Whether `text` is a digest in hex as this library writes them, or empty (not known)."""
    return not text or _HEX.fullmatch(text) is not None


class Severity(enum.Enum):
    """Whether a difference forbids a pull."""

    REFUSE = "refuse"
    WARN = "warn"


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Identifies one rank's share of one model.

    A field at its default is not known, or does not apply. A field that only one side knows counts as a difference,
    except where :func:`differences` makes an exception.

    Attributes:
        model: Name of the model, as configured on both sides.
        architecture: Class of the model (``LlamaForCausalLM``).
        revision: Revision of the checkpoint.
        dtype: Data type that the model computes in (``bfloat16``).
        quantization: Quantisation method.
        quantization_config: Digest over the method's configuration. For a quantised model in an engine, an empty digest
            means that the configuration is not known, and never counts as equal. In the layout ``checkpoint`` it may be
            empty.
        layout: How the tensors are laid out (see docs/glossary.md).
        role: ``target``, or ``draft`` for the draft model of speculative decoding.
        tp_size, tp_rank: Tensor-parallel size and rank.
        pp_size, pp_rank: Pipeline-parallel size and rank.
        ep_size, ep_rank: Expert-parallel size and rank; 1 and 0 without expert parallelism.
        expert_placement: How experts are placed: the rule, and digests of the maps that follow from the configuration.
        tied: Whether input and output embeddings are one tensor; None unless the engine decided it from weight files.
        load_state: Named facts that the model's loading code sets beside tensors (``has_own_lm_head``).
        engine: Name and version of the engine that holds the tensors.
        load: Digest over rank and root of all ranks of an engine that loaded together. By it the ranks of one client
            check that they pulled the same model. It is not compared between server and client.
        fingerprint: Digest of the headers of the weight files and of samples of their contents; empty without weight
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


def check_sendable(identity: ModelIdentity) -> None:
    """Check that every text of an identity may be sent: a peer refuses texts that are too long or no valid Unicode.

    Raises:
        ConfigError: One may not.
    """
    for name, value in msgspec.structs.asdict(identity).items():
        if not isinstance(value, str):
            continue
        most = {"model": MAX_MODEL, "fingerprint": MAX_DIGEST, "load": MAX_DIGEST}.get(name, MAX_WORD)
        reason = None if _is_text(value) else "it has characters that are no valid Unicode (lone surrogates)"
        if len(value) > most:
            reason = f"it has {len(value)} characters"
        if reason:
            hint = "give a name of your own" if name == "model" else ""
            raise ConfigError(
                field=name.upper(), value=value, allowed=f"text of at most {most} characters", reason=reason, hint=hint
            )


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def passed_on(own: ModelIdentity, source: ModelIdentity) -> ModelIdentity:
    """The identity that a relay announces: its own, with the fields that only its source knows."""
    return msgspec.structs.replace(
        own,
        tied=source.tied if own.tied is None else own.tied,
        load_state=own.load_state or source.load_state,
        fingerprint=source.fingerprint,
        load=source.load,
    )


def quantised_unknown_how(identity: ModelIdentity) -> bool:
    """Whether an engine holds a quantised model whose quantisation configuration is not known.

    Different configurations of one method can give tensors of equal names, types and shapes, so the tensors alone don't
    show whether two models are equal. In the layout ``checkpoint`` the bytes of the files are compared, so the
    configuration does not matter.
    """
    return bool(identity.quantization) and not identity.quantization_config and identity.layout != "checkpoint"


class Difference(msgspec.Struct, frozen=True):
    """One field in which two identities differ, or that has to be known and is not.

    Attributes:
        field: Name of the field.
        ours, theirs: Both values as text.
        severity: Whether the difference forbids a pull.
    """

    field: str
    ours: str
    theirs: str
    severity: Severity = Severity.REFUSE

    def __str__(self) -> str:
        return f"{self.field}: ours is {shown(self.ours)}, theirs is {shown(self.theirs)}"


def _severity(field: str, ours: ModelIdentity, theirs: ModelIdentity) -> Severity | None:
    """How severe a difference in `field` is; None when it is allowed."""
    mine, other = getattr(ours, field), getattr(theirs, field)
    if field == "fingerprint":
        # A side without weight files has no fingerprint. Two different fingerprints mean different weights.
        return Severity.REFUSE if mine and other else None
    if field == "load":
        return None  # compared among the ranks of one client only
    if field == "engine":
        # Raw tensors come from the checkpoint's loader; processed tensors depend on the engine's code.
        if "processed" in (ours.layout, theirs.layout):
            return Severity.REFUSE
        return Severity.WARN if mine and other else None
    if field == "revision":
        return Severity.REFUSE if mine and other else Severity.WARN
    if field in ("tied", "load_state"):
        # Only a side that read weight files knows these facts. The other side takes them over, or has none.
        return Severity.REFUSE if mine not in (None, {}) and other not in (None, {}) else None
    return Severity.REFUSE


def differences(ours: ModelIdentity, theirs: ModelIdentity) -> tuple[Difference, ...]:
    """Find each field in which two identities differ.

    Args:
        ours: Identity of this side.
        theirs: Identity of the peer.

    Returns:
        One :class:`Difference` for each field, in the order of the fields; empty when both agree. The quantisation
        configuration counts as a difference also when neither side knows it. A pull is possible when no difference has
        :attr:`Severity.REFUSE`.
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
