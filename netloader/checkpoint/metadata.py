"""The metadata of safetensors files (``__metadata__``): texts that belong to the weights, and names of tied tensors.

Other tools describe the weights there: ``format``, or how torchao packed the tensors. All of it is kept.

A file stores tensors that share their memory once. safetensors' ``save_model`` records the other names as entries
``name: stored name``, which can't be told apart from a text that happens to be the name of a tensor. So netloader
writes them under a key of its own too, and that key decides. Without it, an entry names a tied tensor only if both
texts look like the names of parameters that are tied: ``lm_head.weight: model.embed_tokens.weight`` (of one kind), or
``attn.k_scale: attn.v_scale`` (of one module).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import msgspec

from netloader.core.messages import MAX_METADATA, MAX_METADATA_BYTES, metadata_bytes
from netloader.errors import CheckpointError

__all__ = ["ALIASES", "check_size", "merged", "split", "with_aliases"]

ALIASES = "netloader.aliases"
"""Key of the names of tied tensors: a JSON object, name -> stored name."""


def split(metadata: Mapping[str, str], stored: Container[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Divide the metadata of one file into its texts and the names of tied tensors (name -> stored name).

    Args:
        metadata: As the file has it.
        stored: Names of the tensors in the file.

    Raises:
        CheckpointError: The names of tied tensors can't be read.
    """
    if ALIASES in metadata:
        try:
            aliases = msgspec.json.decode(metadata[ALIASES], type=dict[str, str])
        except msgspec.MsgspecError as error:
            raise CheckpointError(
                f"the metadata entry {ALIASES} is not valid: {error}", hint="write the file again, or fetch it again"
            ) from error
        if any(owner not in stored for owner in aliases.values()):
            raise CheckpointError(f"the metadata entry {ALIASES} names tensors that are not in the file")
    else:
        aliases = {name: owner for name, owner in metadata.items() if owner in stored and _tied(name, owner)}
    rest = {name: text for name, text in metadata.items() if name != ALIASES and aliases.get(name) != text}
    return rest, aliases


def _tied(name: str, owner: str) -> bool:
    module, dot, last = name.rpartition(".")
    owner_module, owner_dot, owner_last = owner.rpartition(".")
    return bool(dot and owner_dot) and name != owner and (last == owner_last or module == owner_module)


def with_aliases(metadata: Mapping[str, str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file: its texts, and the names of its tied tensors in both forms."""
    if not aliases:
        return dict(metadata)
    return {**aliases, **metadata, ALIASES: msgspec.json.encode(dict(sorted(aliases.items()))).decode()}


def merged(parts: Sequence[Mapping[str, str]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """One metadata for several files: every entry on which the files that have it agree.

    Returns:
        The metadata, and the keys that are left out, because files have different values for them.
    """
    found: dict[str, str] = {}
    differing: dict[str, None] = {}
    for part in parts:
        for key, text in part.items():
            if found.setdefault(key, text) != text:
                differing[key] = None
    return {key: found[key] for key in sorted(found) if key not in differing}, tuple(sorted(differing))


def check_size(metadata: Mapping[str, str]) -> None:
    """Check that the metadata may be announced.

    Raises:
        CheckpointError: It has too many entries, or too many bytes.
    """
    size = metadata_bytes(metadata)
    if len(metadata) > MAX_METADATA or size > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"the metadata of the files has {len(metadata)} entries of {size} bytes in all, "
            f"allowed are {MAX_METADATA} entries of {MAX_METADATA_BYTES} bytes",
            hint="remove entries that do not describe the weights",
        )
