"""The arguments of every command."""

from __future__ import annotations

import argparse
import math
import re
from importlib.metadata import version
from pathlib import Path

from netloader.config.fields import is_root
from netloader.core.rates import ALLOWED_RATE, parse_rate

__all__ = ["make_parser", "size"]

_EXIT_CODES = """\
exit status:
  0    done
  1    failed: no source could be pulled from, the source broke off or stalled, or the disk is full,
       read-only or broken
  2    usage: an argument, a file or this installation is not what the command needs
  3    not verified: bytes arrived other than announced and no other source gave them right, or the
       weights are not the ones asked for
  130  ended by Ctrl-C; 143 by SIGTERM, 129 by SIGHUP: 128 plus the number of the signal
"""

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_HIGHEST_PORT = 65535


def size(text: str) -> int:
    """Read a number of bytes: ``4096``, ``64M``, ``1.5GB``, ``2GiB``.

    Raises:
        ArgumentTypeError: `text` is not a size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4096, 64M, 1.5GB or 2GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 604_800:  # noqa: PLR2004 - a week, as in the configuration
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 604800")
    return value


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > _HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {_HIGHEST_PORT}")
    return int(text)


def _clients(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of clients from 1")
    return int(text)


def _rate(text: str) -> float:
    rate = parse_rate(text if not text.isascii() or not text.isdigit() else int(text))
    if rate is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate; allowed: {ALLOWED_RATE}")
    return rate


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of transports like gloo or auto or tcp,gloo")
    return names


def _root(text: str) -> str:
    if not is_root(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a root: 64 hexadecimal digits")
    return text.lower()


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. ``command`` is the chosen command."""
    parser = argparse.ArgumentParser(
        prog="netloader",
        description="Move model weights from where they are held to where they are needed, with every byte checked.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"netloader {version('netloader')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_serve(commands)
    _add_pull(commands)
    _add_probe(commands)
    _add_config(commands)
    _add_command(commands, "transports", "show what can carry tensors on this machine, and why the rest can't")
    return parser


Commands = argparse._SubParsersAction  # noqa: SLF001 - argparse has no public name for it


def _add_command(
    commands: Commands[argparse.ArgumentParser], name: str, summary: str, *, log_level: str = "warning"
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = parser.add_argument_group("log")
    levels = ("debug", "info", "warning", "error")
    common.add_argument(
        "--log-level", choices=levels, default=log_level, help="what to log on standard error (default: %(default)s)"
    )
    common.add_argument("--debug", action="store_true", help="show where an error happened, not only what it was")
    return parser


def _add_demo(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add_command(
        commands, "demo", "make a checkpoint, pull it from one process into another, compare both file by file"
    )
    parser.add_argument("--bytes", type=size, default=size("256MB"), metavar="SIZE", help="how much (default: 256MB)")
    parser.add_argument(
        "--fault",
        metavar="KIND:BLOCK[:BYTE]",
        help="harm a block on its way: corrupt:BLOCK[:BYTE] turns a bit over (exit status 3), cut:BLOCK[:BYTE] closes "
        "the data path, stall:BLOCK stops sending (both: exit status 1); blocks and bytes count from 0",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep both checkpoints in this new or empty folder")
    parser.add_argument("--transport", type=_names, default=["gloo"], metavar="NAME", help="default: gloo")


def _add_serve(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add_command(
        commands, "serve", "serve the safetensors files of a folder, without an engine, until stopped", log_level="info"
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="MODEL_DIR",
        help="folder with *.safetensors, or the id of a model in the Hugging Face cache",
    )
    parser.add_argument("--host", help="address to listen at (default: all)")
    parser.add_argument("--port", type=_port, default=0, help="port to listen at (default: a free one)")
    parser.add_argument("--model", metavar="NAME", help="name told to clients (default: id or folder of the model)")
    parser.add_argument("--max-clients", type=_clients, default=8, metavar="N", help="served at once; others wait (8)")
    _add_discovery(parser, "publish there while serving")
    parser.add_argument(
        "--max-bandwidth", type=_rate, metavar="RATE", help="most that all clients are sent, like 500MB/s (no limit)"
    )
    parser.add_argument("--address-file", type=Path, metavar="FILE", help="write host:port there while serving")
    parser.add_argument(
        "--metrics-port", type=_port, metavar="PORT", help="answer /metrics, /healthz and /readyz there (default: no)"
    )
    parser.add_argument(
        "--stop-on-eof", action="store_true", help="stop when standard input ends: no parent process, no server"
    )
    parser.add_argument(
        "--fault", metavar="KIND:BLOCK[:BYTE]", help="harm this block in every transfer, to try clients: see demo"
    )
    _add_common(parser, every=5.0)


def _add_pull(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, "pull", "pull what a source holds into a folder, as safetensors")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="host:port; the next one is tried when one fails")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--overwrite", action="store_true", help="replace weight files that are in DIR")
    parser.add_argument("--expect-root", type=_root, metavar="HEX", help="accept these exact weights only")
    parser.add_argument(
        "--model", metavar="NAME", help="pull the checkpoint of this name only, as `netloader serve` names it"
    )
    _add_discovery(parser, "find sources there, beside those given; needs --model or --expect-root")
    parser.add_argument("--role", choices=("target", "draft"), default="target", help="which model of an engine")
    parser.add_argument("--timeout", type=_seconds, default=1200.0, metavar="SECONDS", help="for it all (1200)")
    parser.add_argument(
        "--wait", type=_seconds, default=0.0, metavar="SECONDS", help="keep trying sources that are not ready (0)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    _add_common(parser, every=5.0)


def _add_probe(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, "probe", "ask a source what it holds; nothing is pulled")
    parser.add_argument("source", metavar="SOURCE", help="host:port")
    parser.add_argument("--role", choices=("target", "draft"), default="target", help="which model of an engine")
    expected = parser.add_mutually_exclusive_group()
    expected.add_argument(
        "--against", type=Path, metavar="MODEL_DIR", help="compare with this folder: would a pull give the same?"
    )
    expected.add_argument("--root", type=_root, metavar="HEX", help="compare with this root")
    parser.add_argument("--timeout", type=_seconds, default=30.0, metavar="SECONDS", help="for it all (30)")
    parser.add_argument("--token-file", metavar="FILE", help="secret that both sides know")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_discovery(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--discovery", action="append", metavar="URL", help=f"registry: {what}; may be repeated")
    parser.add_argument(
        "--zone", metavar="NAME", help="zone of this host, for choosing near sources (default: $NETLOADER_ZONE)"
    )


def _add_config(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, "config", "check a configuration of the vLLM adapter, without vLLM")
    parser.add_argument("action", choices=("check",), help="what to do with it")
    parser.add_argument(
        "configuration", metavar="FILE|JSON", help="a JSON file, or the text for --model-loader-extra-config"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_common(parser: argparse.ArgumentParser, *, every: float) -> None:
    parser.add_argument("--token-file", metavar="FILE", help="secret that both sides know")
    parser.add_argument(
        "--transport",
        type=_names,
        default=["auto"],
        metavar="NAME[,NAME]",
        help="what may be used; gloo only if named (auto)",
    )
    parser.add_argument(
        "--stall-timeout", type=_seconds, default=30.0, metavar="SECONDS", help="longest time without progress (30)"
    )
    parser.add_argument(
        "--progress-every", type=_seconds, default=every, metavar="SECONDS", help=f"between two lines ({every:g})"
    )
