"""The identity of a model: what has to match between a server and a client before anything is sent."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from netloader.errors import ConfigError, shown

__all__ = [
    "MAX_MODEL",
    "MAX_SETTINGS",
    "MODEL",
    "OF_QUANTIZATION",
    "REPOSITORY",
    "SERVED",
    "Difference",
    "Layout",
    "ModelIdentity",
    "Role",
    "Severity",
    "check_sendable",
    "differences",
    "is_digest",
    "known_before_loading",
    "known_settings",
    "name_of",
    "passed_on",
    "quantised_unknown_how",
]

Layout = Literal["raw", "processed", "checkpoint"]
Role = Literal["target", "draft"]

MAX_MODEL = 4096
MAX_WORD = 256
MAX_DIGEST = 64
MAX_FACTS = 64
MAX_NAMES = 8
MAX_SETTINGS = 256

MODEL = "MODEL"
"""Origin of a name that the user gave to netloader: the field MODEL, for a draft DRAFT_MODEL."""

SERVED = "served"
"""Origin of a name that the user gave to the engine (``--served-model-name``)."""

REPOSITORY = "repository"
"""Origin of a repository id on a hub, with the commit if it is known: ``org/name`` or ``org/name@commit``."""

_ORIGINS = {MODEL: "MODEL", REPOSITORY: "repository", SERVED: "--served-model-name"}
"""What each origin is called in messages. The origin with the most weight comes first."""

# A model's name may be a path, so it may be as long as a path; the other texts are short. Longer texts break the
# protocol.
_Model = Annotated[str, msgspec.Meta(max_length=MAX_MODEL)]
_Word = Annotated[str, msgspec.Meta(max_length=MAX_WORD)]
_Digest = Annotated[str, msgspec.Meta(max_length=MAX_DIGEST)]
_Facts = Annotated[dict[_Word, bool], msgspec.Meta(max_length=MAX_FACTS)]
_Names = Annotated[dict[_Word, _Model], msgspec.Meta(max_length=MAX_NAMES)]
_Settings = Annotated[dict[_Word, _Word], msgspec.Meta(max_length=MAX_SETTINGS)]

_WHERE_KNOWN = frozenset({"model_config.hf_config"})
"""Settings that have no value that does nothing, and that not every host knows: compared if both sides state them."""

OF_QUANTIZATION = "quantization."
"""How the paths of settings begin that say in what two quantisations differ. `quantization_config` decides whether they
do, so that a peer which does not state these settings is compared as well."""

_KNOWN_BEFORE_LOADING = (
    *("architecture", "dtype", "quantization", "quantization_config", "role"),
    *("tp_size", "tp_rank", "pp_size", "pp_rank", "ep_size", "ep_rank"),
)
"""Fields that both sides know before they build the model, and that must be equal. `settings` and `layout` are beside
them: of both, only a part is compared."""

_NOT_KNOWN = "not known"
_NOT_SET = "not set"
_NOT_STATED = "not stated"

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
        model: Name of the model, as configured on both sides; in an engine without MODEL the text of its model
            argument, which may be a path. It is compared if a side states no `names`.
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
        names: The names of the model, by where each comes from: ``MODEL`` (netloader's configuration), ``served`` (the
            engine's ``--served-model-name``), ``repository`` (a repository id, and ``@`` with the commit if it is
            known). Empty for a model that has only a path. None if they are not stated.
        settings: What else in the engine's configuration decides the values of the tensors, by its path
            (``parallel_config.decode_context_parallel_size``): the value as text if it is short, else a digest of it. A
            setting at the value that does nothing is left out. ``model_config.hf_config``, a digest of the
            configuration file, is compared only if both sides state it. Paths that begin with ``quantization.`` say in
            what two values of `quantization_config` differ. None if settings are not stated.
        processed_settings: The same for what decides only the values of processed tensors. It is compared only in the
            layout ``processed``.
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
    names: _Names | None = None
    settings: _Settings | None = None
    processed_settings: _Settings | None = None


def check_sendable(identity: ModelIdentity) -> None:
    """Check that a peer would accept the identity, so that a text that it would reject is found before it is sent.

    Raises:
        ConfigError: A text is too long, or is not valid Unicode.
    """
    for field in ModelIdentity.__struct_fields__:
        value = getattr(identity, field)
        try:
            msgspec.msgpack.decode(msgspec.msgpack.encode({field: value}), type=ModelIdentity)
        except UnicodeEncodeError:
            reason = "it has characters that are no valid Unicode (lone surrogates)"
        except msgspec.ValidationError as error:
            reason = f"it has {len(value)} characters" if isinstance(value, str) else str(error).partition(" - ")[0]
        else:
            continue
        allowed = (
            f"what a peer accepts: valid Unicode, at most {MAX_MODEL} characters for a name, {MAX_WORD} for others"
        )
        hint = "give a name of your own" if field == "model" else ""
        raise ConfigError(field=field.upper(), value=value, allowed=allowed, reason=reason, hint=hint)


def known_settings(own: ModelIdentity, source: ModelIdentity) -> dict[str, str] | None:
    """The settings of a side that holds what it pulled from `source`: its own, with those that only `source` knows.

    They are compared where both sides know them. Without them, a third side that has others would match this one.
    """
    theirs = {path: text for path, text in (source.settings or {}).items() if path in _WHERE_KNOWN}
    return {**theirs, **(own.settings or {})} if theirs else own.settings


def known_before_loading(identity: ModelIdentity) -> dict[str, str]:
    """What must be equal on both sides and is known before the model is built: each field and each setting as text.

    If two identities differ in it, :func:`differences` refuses them. Names may differ, and so may what only one side
    knows. An engine can hold its model raw or processed; so both layouts give the same text.
    """
    settings = identity.settings or {}
    return {
        **{field: str(getattr(identity, field)) for field in _KNOWN_BEFORE_LOADING},
        "layout": "checkpoint" if identity.layout == "checkpoint" else "engine",
        **{
            f"settings.{path}": text
            for path, text in settings.items()
            if path not in _WHERE_KNOWN and not path.startswith(OF_QUANTIZATION)
        },
    }


def passed_on(own: ModelIdentity, source: ModelIdentity) -> ModelIdentity:
    """The identity that a relay announces: its own, with the fields that only its source knows."""
    return msgspec.structs.replace(
        own,
        tied=source.tied if own.tied is None else own.tied,
        load_state=own.load_state or source.load_state,
        fingerprint=source.fingerprint,
        load=source.load,
        settings=known_settings(own, source),
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
        our_origin, their_origin: Where the values come from; empty when that is not told.
    """

    field: str
    ours: str
    theirs: str
    severity: Severity = Severity.REFUSE
    our_origin: str = ""
    their_origin: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: ours is {shown(self.ours)}, theirs is {shown(self.theirs)}"
        return f"{text} (from {self.our_origin} and {self.their_origin})" if self.our_origin else text


def name_of(identity: ModelIdentity) -> str:
    """What the model is called in messages: its name with the most weight, or `model` if it has none."""
    return next(iter(_names(identity).values()), identity.model)


def _commits(repository: str) -> tuple[str, str]:
    """The repository id, and the commit; empty when it is not known."""
    name, _, commit = repository.partition("@")
    return name, commit


def _same_repository(one: str, other: str, *, same_revision: bool) -> bool:
    (name, commit), (other_name, other_commit) = _commits(one), _commits(other)
    same_commit = commit == other_commit if commit and other_commit else same_revision
    return name == other_name != "" and same_commit


def _same_name(ours: ModelIdentity, theirs: ModelIdentity) -> bool | None:
    """Whether a name of both sides is equal.

    MODEL decides if both sides were given it. Else the repository decides if both know theirs: one commit of one
    repository is one model, whatever it is served as, and two are two. Else MODEL of one side has to be a name that the
    other side has from elsewhere; without MODEL, both engines have to serve under one name. A path is no name. Unless
    MODEL or the commits decide, both sides have to ask for one revision.

    Returns:
        None when no name is equal, so that something else has to show that the models are. False when the users stated
        different names.
    """
    if ours.names is None or theirs.names is None:
        # Of a text whose origin is not known, it is assumed that the user stated it.
        path = any(side.names is not None and not _names(side).keys() & {MODEL, REPOSITORY} for side in (ours, theirs))
        return None if path and ours.model == theirs.model else ours.model == theirs.model
    mine, other = _names(ours), _names(theirs)
    same_revision = ours.revision == theirs.revision
    if MODEL in mine and MODEL in other:
        return mine[MODEL] == other[MODEL]
    if REPOSITORY in mine and REPOSITORY in other:
        equal = _same_repository(mine[REPOSITORY], other[REPOSITORY], same_revision=same_revision)
    elif MODEL in mine or MODEL in other:
        (given, elsewhere) = (mine[MODEL], other) if MODEL in mine else (other[MODEL], mine)
        equal = given in (elsewhere.get(SERVED), _commits(elsewhere.get(REPOSITORY, ""))[0])
    else:
        equal = SERVED in mine and mine[SERVED] == other.get(SERVED) and same_revision
    return True if equal else None


def _names(identity: ModelIdentity) -> dict[str, str]:
    """The names of known origin, the one with the most weight first; without empty texts, which name nothing."""
    names = identity.names or {}
    return {origin: names[origin] for origin in _ORIGINS if names.get(origin)}


def _model_difference(ours: ModelIdentity, theirs: ModelIdentity, *, same_root: bool) -> Difference | None:
    same = _same_name(ours, theirs)
    if same:
        return None
    # Two repositories or commits may differ in a few bytes, which the fingerprint, made of samples, does not show.
    contradict = REPOSITORY in _names(ours) and REPOSITORY in _names(theirs)
    proven = same_root or (not contradict and bool(ours.fingerprint and ours.fingerprint == theirs.fingerprint))
    severity = Severity.WARN if same is None and proven else Severity.REFUSE
    if ours.names is None or theirs.names is None:
        return Difference("model", ours.model, theirs.model, severity)
    shared = next((origin for origin in _names(ours) if origin in _names(theirs)), "")
    (mine, our_origin), (other, their_origin) = _shown_name(ours, shared), _shown_name(theirs, shared)
    return Difference("model", mine, other, severity, our_origin, their_origin)


def _shown_name(identity: ModelIdentity, origin: str) -> tuple[str, str]:
    """The name of this origin, or the one with the most weight, and what its origin is called."""
    for found, name in _names(identity).items():
        if not origin or found == origin:
            return name, _ORIGINS[found]
    return identity.model, "path, which is no name"


def _setting_differences(field: str, ours: ModelIdentity, theirs: ModelIdentity) -> Iterator[Difference]:
    """Each setting that is not equal on both sides, by its path.

    A side that states no settings runs in no engine, or speaks protocol 1. It equals only a side without settings, or
    with such that are compared where both sides know them.
    """
    if field == "processed_settings" and "processed" not in (ours.layout, theirs.layout):
        return
    stated: tuple[dict[str, str] | None, ...] = getattr(ours, field), getattr(theirs, field)
    missing = tuple(_NOT_SET if side is not None else _NOT_STATED for side in stated)
    mine, other = (side or {} for side in stated)
    explained = _in_words(ours) and _in_words(theirs) and ours.quantization == theirs.quantization
    explained = explained and ours.quantization_config != theirs.quantization_config
    for path in sorted(mine.keys() | other.keys()):
        if path.startswith(OF_QUANTIZATION) and not explained:
            continue
        if path in _WHERE_KNOWN and not (path in mine and path in other):
            continue
        if mine.get(path) != other.get(path):
            yield Difference(path, mine.get(path, missing[0]), other.get(path, missing[1]))


def _in_words(identity: ModelIdentity) -> bool:
    """Whether the settings of the quantisation are stated one by one."""
    return any(path.startswith(OF_QUANTIZATION) for path in identity.settings or {})


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


def differences(ours: ModelIdentity, theirs: ModelIdentity, *, same_root: bool = False) -> tuple[Difference, ...]:
    """Find each field in which two identities differ.

    The names of the models are compared under the field `model`. If no name is equal, one root shows that the models
    are equal, unless both sides were given MODEL. So do equal fingerprints, unless both repositories are known.

    Args:
        ours: Identity of this side.
        theirs: Identity of the peer.
        same_root: Whether the weights of both sides have the same root, or will be compared by it.

    Returns:
        One :class:`Difference` for each field, in the order of the fields, and for each setting, under its path; empty
        when both agree. The quantisation configuration counts as a difference also when neither side knows it. A pull
        is possible when no difference has :attr:`Severity.REFUSE`.
    """
    found = list[Difference]()
    for field in ModelIdentity.__struct_fields__:
        if field == "model":
            found += filter(None, [_model_difference(ours, theirs, same_root=same_root)])
        if field in ("settings", "processed_settings"):
            found += _setting_differences(field, ours, theirs)
        if field in ("model", "names", "settings", "processed_settings"):
            continue
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine == other:
            if field == "quantization_config" and (quantised_unknown_how(ours) or quantised_unknown_how(theirs)):
                found.append(Difference(field, _NOT_KNOWN, _NOT_KNOWN))
            continue
        severity = _severity(field, ours, theirs)
        if severity is not None:
            found.append(Difference(field, str(mine), str(other), severity))
    if any(each.field.startswith(OF_QUANTIZATION) for each in found):
        found = [each for each in found if each.field != "quantization_config"]  # a digest of what they say
    return tuple(found)
