"""``netloader pull``: pulls what a source holds into a folder of safetensors files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from netloader import api, checkpoint
from netloader.cli.console import Exit, error_lines, exit_for, progress_shown, say, say_json, token_from, whole_error
from netloader.core.report import PullReport
from netloader.errors import ConfigError, DigestMismatch, NoSourceLeft

if TYPE_CHECKING:
    import torch

__all__ = ["run"]


def run(options: argparse.Namespace) -> Exit:
    """Pull, write, report."""
    try:
        _check_output(options.output, overwrite=options.overwrite)
        report, files = anyio.run(_pull, options)
    except Exception as wrapped:  # noqa: BLE001 - printed as JSON if asked for, and raised again
        error = whole_error(wrapped)
        if options.json:
            say_json({"ok": False, "exit": exit_for(error), **_error_as_data(error)})
        elif isinstance(error, NoSourceLeft):
            _print_corruption(error)
        raise error from None
    if options.json:
        say_json({"ok": True, "exit": Exit.OK, **_report_as_data(report), "files": [str(file) for file in files]})
    else:
        for line in report.lines():
            say(line)
        _print_result(report, options.output, files)
    return Exit.OK


async def _pull(options: argparse.Namespace) -> tuple[PullReport, list[Path]]:
    with progress_shown(options.progress_every, "pulled") as progress:
        tensors, report = await api.pull_new(
            sources=options.sources,
            role=options.role,
            transport=options.transport,
            timeout=options.timeout,
            wait=options.wait,
            stall_timeout=options.stall_timeout,
            token=token_from(options.token_file),
            expect_root=options.expect_root,
            progress=progress,
        )
    return report, await anyio.to_thread.run_sync(partial(_write, options, tensors))


def _write(options: argparse.Namespace, tensors: Mapping[str, torch.Tensor]) -> list[Path]:
    return checkpoint.write_checkpoint(tensors, options.output, overwrite=options.overwrite)


def _check_output(folder: Path, *, overwrite: bool) -> None:
    """Check that the output folder can be used, before any byte is pulled.

    Raises:
        ConfigError: `folder` is a file, or it is not empty and nothing may be overwritten.
    """
    allowed = "a new or empty folder"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(field="--output", value=str(folder), allowed=allowed, reason="it is a file")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        hint = "choose another folder, or replace its weight files with --overwrite"
        raise ConfigError(field="--output", value=str(folder), allowed=allowed, reason="it is not empty", hint=hint)


def _print_result(report: PullReport, folder: Path, files: list[Path]) -> None:
    say(f"wrote {len(files)} file{'s' * (len(files) != 1)} to {folder}")
    if report.identity.layout == "checkpoint":
        say("config.json, tokenizer and other small files are not part of what a source holds: copy them yourself")
    else:
        say(
            f"layout {report.identity.layout}: tensors as an engine holds them, for rank {report.identity.tp_rank} of "
            f"{report.identity.tp_size}; names may differ from the checkpoint's"
        )
    say("verified: all tensors bit-exact")


def _print_corruption(error: NoSourceLeft) -> None:
    for attempt in error.attempts:
        if isinstance(attempt.cause, DigestMismatch):
            say(f"corrupt: block {attempt.cause.block} from {attempt.source}")
            for name in attempt.cause.tensors:
                say(f"  tensor    {name}")
            say(f"  announced {attempt.cause.expected}")
            say(f"  arrived   {attempt.cause.actual}")


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _report_as_data(report: PullReport) -> dict[str, object]:
    return {
        "root": report.root,
        "bytes": report.nbytes,
        "blocks": report.blocks,
        "tensors": report.tensors,
        "seconds": report.seconds,
        "phases": report.phases.as_dict(),
        "sources": {
            source: {"blocks": share.blocks, "bytes": share.nbytes, "transport": share.transport}
            for source, share in report.sources.items()
        },
        "attempts": [{"source": attempt.source, **_error_as_data(attempt.cause)} for attempt in report.attempts],
        "identity": msgspec.to_builtins(report.identity),
    }


def _error_as_data(error: BaseException) -> dict[str, object]:
    message, hint = error_lines(error)
    data: dict[str, object] = {"error": type(error).__name__, "message": message, "hint": hint}
    if isinstance(error, DigestMismatch):
        data |= {"block": error.block, "tensors": error.tensors, "announced": error.expected, "arrived": error.actual}
    if isinstance(error, NoSourceLeft):
        data["verified"], data["total"] = error.verified, error.total
        data["attempts"] = [{"source": attempt.source, **_error_as_data(attempt.cause)} for attempt in error.attempts]
    return data
