"""``netloader config check``: checks a configuration of the vLLM adapter, without vLLM, torch or a network."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import msgspec

from netloader.cli.console import Exit, print_json, say
from netloader.config import Config, load_config
from netloader.discovery.address_file import AddressFile
from netloader.discovery.configured import registries_of
from netloader.errors import ConfigError

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Check the configuration; print every fault, or that there is none."""
    config = load_config(_given(options.configuration))
    registries_of(config)
    warnings = [*config.warnings, *_folder_warnings(config)]
    overrides = [str(override) for override in config.overrides]
    if options.json:
        print_json({"ok": True, "exit": Exit.OK, "warnings": warnings, "overrides": overrides})
        return Exit.OK
    for override in overrides:
        say(f"note: {override}")
    for warning in warnings:
        say(f"warning: {warning}")
    say("the configuration is valid")
    return Exit.OK


def _given(text: str) -> Mapping[str, object]:
    """The fields: an object as it would be given to vLLM, or one that names the file.

    Raises:
        ConfigError: The text is neither a JSON object nor the name of a file.
    """
    if not text.lstrip().startswith("{"):
        return {"CONFIG_FILE": text}
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise ConfigError(field="JSON", value=text, allowed="one JSON object", reason=str(error)) from error


def _folder_warnings(config: Config) -> list[str]:
    """What speaks against the folder of OUTPUT_PREFIX on this host; the worker may run on another one."""
    if config.output_prefix is None:
        return []
    problem = AddressFile(Path(f"{config.output_prefix}0.txt"), hint="").problem()
    return [] if problem is None else [f"OUTPUT_PREFIX: {problem.message}"]
