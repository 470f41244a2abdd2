"""``netloader pull``: pulls what a source holds into a folder of safetensors files."""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec

from netloader import api
from netloader.checkpoint import OutputFolder
from netloader.cli.console import (
    Exit,
    Interrupted,
    error_as_data,
    print_json,
    progress_shown,
    say,
    token_from,
    watched,
    whole_error,
)
from netloader.cli.signals import Stop, Stopped, ending_signals, stop_on_signal
from netloader.core.identity import ModelIdentity
from netloader.core.report import PullReport
from netloader.errors import ConfigError, DigestMismatch, NoSourceLeft, plural
from netloader.observe.progress import byte_text

__all__ = ["run"]


@dataclass(frozen=True, slots=True)
class _Pulled:
    """What a pull gave.

    Attributes:
        report: Its report.
        files: The files, with their final names.
        write_seconds: How long writing took after the last block arrived.
        seconds: How long all of it took.
    """

    report: PullReport
    files: list[Path]
    write_seconds: float
    seconds: float


def run(options: argparse.Namespace) -> int:
    """Pull into files, report."""
    _check_output(options.output, overwrite=options.overwrite)
    _check_sources(options)
    try:
        pulled = anyio.run(_pull, options)
    except Exception as wrapped:
        error = whole_error(wrapped)
        if isinstance(error, NoSourceLeft) and not options.json:
            _print_corruption(error)
        raise
    if options.json:
        print_json({"ok": True, "exit": Exit.OK, **_as_data(pulled, options)})
    else:
        for line in pulled.report.lines():
            say(line)
        _print_result(pulled, options.output)
    return Exit.OK


async def _pull(options: argparse.Namespace) -> _Pulled:
    stop, done = Stop(), list[_Pulled]()
    with ending_signals() as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_on_signal, signals, tasks.cancel_scope, stop)
            with suppress(Stopped):  # the scope is cancelled then
                done.append(await _into_files(options, stop))
            tasks.cancel_scope.cancel()
    if not done:
        raise Interrupted(stop.number, f"nothing was left in {options.output}")
    return done[0]


async def _into_files(options: argparse.Namespace, stop: Stop) -> _Pulled:
    """Pull into files. When it is cancelled, none of them stays."""
    began = time.monotonic()
    output = OutputFolder(options.output, overwrite=options.overwrite)
    await anyio.to_thread.run_sync(output.__enter__)
    try:
        for name in output.removed:
            say(f"removed {options.output / name}: an earlier pull was killed and had left it", to_stderr=True)
        report = await _fill(options, output)
        arrived = time.monotonic()
        with progress_shown(options.progress_every, "written") as progress:
            await anyio.to_thread.run_sync(output.sync, watched(progress, str(options.output), stop))
        await anyio.lowlevel.checkpoint()  # the last moment at which a signal leaves nothing
        with anyio.CancelScope(shield=True):
            files = await anyio.to_thread.run_sync(output.publish)
        return _Pulled(report, files, time.monotonic() - arrived, time.monotonic() - began)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(output.__exit__, None, None, None)


async def _fill(options: argparse.Namespace, output: OutputFolder) -> PullReport:
    with progress_shown(options.progress_every, "pulled", last=False) as progress:
        try:
            _, report = await api.pull_new(
                sources=options.sources,
                identity=None if options.model is None else ModelIdentity(model=options.model, layout="checkpoint"),
                discovery=options.discovery,
                zone=options.zone,
                role=options.role,
                transport=options.transport,
                timeout=options.timeout,
                wait=options.wait,
                stall_timeout=options.stall_timeout,
                token=token_from(options.token_file),
                expect_root=options.expect_root,
                allocate=output.allocate,
                progress=progress,
            )
        except NoSourceLeft:
            if output.error is not None:  # no source is to blame; its cause decides the exit status
                raise output.error from output.error.__cause__
            raise
    return report


def _check_sources(options: argparse.Namespace) -> None:
    """Check that it is said where to pull from, and which weights.

    Raises:
        ConfigError: It is not.
    """
    if not options.sources and options.discovery is None:
        allowed = "at least one host:port, or --discovery URL"
        raise ConfigError(field="SOURCE", value=options.sources, allowed=allowed)
    if options.discovery is not None and options.model is None and options.expect_root is None:
        reason = "a registry may hold servers of any model"
        raise ConfigError(field="--model", value=None, allowed="NAME, or --expect-root HEX", reason=reason)


def _check_output(folder: Path, *, overwrite: bool) -> None:
    """Check that the output folder can be used, before any byte is pulled.

    Raises:
        ConfigError: `folder` is a file, or it is not empty and nothing may be overwritten.
    """
    allowed = "a new or empty folder"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(field="--output", value=str(folder), allowed=allowed, reason="it is a file")
    if not overwrite and folder.is_dir() and OutputFolder.in_use(folder):
        hint = "choose another folder, or replace its weight files with --overwrite"
        raise ConfigError(field="--output", value=str(folder), allowed=allowed, reason="it is not empty", hint=hint)


def _print_result(pulled: _Pulled, folder: Path) -> None:
    report = pulled.report
    nbytes = sum(file.stat().st_size for file in pulled.files)
    say(
        f"wrote {plural(len(pulled.files), 'file')} ({byte_text(nbytes)}) to {folder}: "
        f"{pulled.write_seconds:.2f} s after the last block, {pulled.seconds:.2f} s in all"
    )
    if report.metadata is None:
        say("metadata: not stated by the source, `format: pt` was written")
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


def _as_data(pulled: _Pulled, options: argparse.Namespace) -> dict[str, object]:
    report = pulled.report
    return {
        "root": report.root,
        "bytes": report.nbytes,
        "blocks": report.blocks,
        "tensors": report.tensors,
        "metadata": report.metadata,
        "seconds": report.seconds,
        "write_seconds": pulled.write_seconds,
        "total_seconds": pulled.seconds,
        "phases": report.phases.as_dict(),
        "sources": {
            source: {"blocks": share.blocks, "bytes": share.nbytes, "transport": share.transport}
            for source, share in report.sources.items()
        },
        "attempts": [
            {"source": attempt.source, **error_as_data(attempt.cause, options)} for attempt in report.attempts
        ],
        "identity": msgspec.to_builtins(report.identity),
        "files": [str(file) for file in pulled.files],
    }
