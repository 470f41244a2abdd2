"""``netloader probe``: shows what a source holds, and whether that is what the user expects."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import anyio
import msgspec

from netloader import api
from netloader.checkpoint.cache import find_folder
from netloader.cli.console import Exit, print_json, say, token_from
from netloader.client.probe import Probe
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import compare
from netloader.errors import plural, shown
from netloader.observe.progress import byte_text

__all__ = ["run"]

_SHOWN = 10
_ALWAYS = ("layout", "role")


def run(options: argparse.Namespace) -> Exit:
    """Probe the source, compare, and print the result."""
    probe = anyio.run(_probe, options)
    reasons: list[str] = []
    if options.root is not None:
        reasons = _other_root(probe, options.root)
    elif options.against is not None:
        reasons = _other_than(probe, options.against)
    asked = options.root is not None or options.against is not None
    if options.json:
        status = Exit.UNVERIFIED if reasons else Exit.OK
        print_json({"ok": not reasons, "exit": status, **_as_data(probe, reasons if asked else None)})
    else:
        for line in _lines(probe):
            say(line)
        if asked:
            say("matches: no" if reasons else "matches: yes, a pull gives these exact weights")
        for reason in reasons[:_SHOWN]:
            say(f"  {reason}")
        if len(reasons) > _SHOWN:
            say(f"  and {len(reasons) - _SHOWN} more")
    return Exit.UNVERIFIED if reasons else Exit.OK


async def _probe(options: argparse.Namespace) -> Probe:
    return await api.probe(
        options.source,
        role=options.role,
        layouts=("checkpoint", "raw", "processed"),
        timeout=options.timeout,
        token=token_from(options.token_file),
    )


def _other_root(probe: Probe, root: str) -> list[str]:
    held = probe.announcement.root
    return [] if held == root else [f"root: expected {root}, the source holds {held}"]


def _other_than(probe: Probe, folder: Path) -> list[str]:
    """Every reason why a pull would give something other than the contents of `folder`."""
    from netloader import checkpoint
    from netloader.tensors import hold

    held = probe.announcement
    files = checkpoint.open_checkpoint(find_folder(folder))
    for line in files.left_out:
        say(f"left out: {line}", to_stderr=True)
    ours = hold(
        files.tensors, ModelIdentity(), block_bytes=held.plan.block_bytes, algorithm=held.algorithm
    ).announcement
    others = _other_metadata(files.metadata, held.metadata)
    if ours.root == held.root:
        return others
    reasons = [str(mismatch) for mismatch in compare(ours.manifest, held.manifest)]
    if held.identity.layout != "checkpoint":
        reasons.insert(0, f"layout: the source holds {held.identity.layout} tensors, a folder those of a checkpoint")
    if not reasons:
        size = len(ours.digests) // len(ours.plan.blocks)
        differing = {
            name
            for number in range(len(ours.plan.blocks))
            if ours.digests[number * size :][:size] != held.digests[number * size :][:size]
            for name in ours.plan.tensors_of(number)
        }
        reasons = [f"{name}: same shape, other contents (in a block with it)" for name in sorted(differing)]
    return [*reasons, *others]


def _other_metadata(ours: Mapping[str, str], held: Mapping[str, str] | None) -> list[str]:
    """The entries of the files' metadata in which the folder and the source differ; none if the source states none."""
    if held is None:
        return []
    return [
        f"metadata {shown(key, 60)}: {_entry(ours, key)} here, {_entry(held, key)} at the source"
        for key in sorted({**ours, **held})
        if ours.get(key) != held.get(key)
    ]


def _entry(metadata: Mapping[str, str], key: str) -> str:
    return shown(metadata[key], 60) if key in metadata else "missing"


def _lines(probe: Probe) -> list[str]:
    held = probe.announcement
    dtypes = Counter(spec.dtype for spec in held.manifest.tensors)
    lines = [
        f"software   {probe.software or 'unknown'}",
        f"root       {held.root}",
        f"tensors    {len(held.manifest.tensors)} ({', '.join(f'{n} {dtype}' for dtype, n in dtypes.most_common())})",
        f"bytes      {held.plan.nbytes} ({byte_text(held.plan.nbytes)})",
        f"blocks     {len(held.plan.blocks)} of up to {held.plan.block_bytes} bytes, digest {held.algorithm}",
        f"transports {', '.join(probe.transports) or 'none'}",
        f"metadata   {_metadata(held.metadata)}",
    ]
    for name, value in _identity(held.identity).items():
        lines.append(f"identity   {name} = {value}")
    return lines


def _metadata(metadata: Mapping[str, str] | None) -> str:
    if metadata is None:
        return "not stated"
    return plural(len(metadata), "entry", "entries")


def _identity(identity: ModelIdentity) -> dict[str, object]:
    """The fields that are not at their default. A default means: not known, or does not apply."""
    default = msgspec.structs.asdict(ModelIdentity())
    known = msgspec.structs.asdict(identity)
    return {name: value for name, value in known.items() if name in _ALWAYS or value != default[name]}


def _as_data(probe: Probe, reasons: list[str] | None) -> dict[str, object]:
    held = probe.announcement
    data: dict[str, object] = {
        "software": probe.software,
        "root": held.root,
        "bytes": held.plan.nbytes,
        "blocks": len(held.plan.blocks),
        "block_bytes": held.plan.block_bytes,
        "digest": held.algorithm,
        "transports": probe.transports,
        "metadata": held.metadata,
        "identity": _identity(held.identity),
        "seconds": probe.seconds,
        "tensors": [
            {"name": spec.name, "dtype": spec.dtype, "shape": spec.shape, "bytes": spec.nbytes}
            for spec in held.manifest.tensors
        ],
    }
    if reasons is not None:
        data |= {"matches": not reasons, "reasons": reasons}
    return data
