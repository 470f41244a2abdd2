"""The hardware checklist: one line for each claim that only Ascend hardware can show.

    python -m scripts.hccl_checklist [MODEL] [options] [-- arguments of vllm serve]

Run it in a checkout, in an environment with torch_npu and netloader, on a host with at least two free NPUs. Without
MODEL it checks the hccl transport. With MODEL, the folder of a model with its weight files, it also starts engines of
vllm-ascend: one that vLLM loads by itself, one that serves, and one that pulls. It compares their tokens and logprobs.

The devices are used in their order: the first half belongs to the engine that serves, the second half to the one that
pulls. Two devices give each engine one card; four give it two, and tensor parallelism. What follows `--` goes to every
`vllm serve`, for example `-- --quantization ascend --max-model-len 4096`.

Each line is PASS, FAIL (with what to do), MANUAL (with the manual step), or SKIP (an earlier check failed), and says
what was measured. The same lines, with more details in JSON, and the logs of the engines are put into a folder.

Exit status: 0 if nothing failed, 1 if something failed, 3 if there is no NPU and nothing was checked. With `--cpu` the
engines run on the processor, and what needs an NPU is left out: that tests the checklist, and no claim about NPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from netloader.transports.hccl import HcclTransport
from scripts import engine_checks
from scripts.checklist import Checklist, Line
from scripts.engine_checks import Box, EngineChecks
from scripts.transport_checks import CHECKS, Where

NO_NPU = 3


def main() -> int:
    """Run the checks and print one line for each."""
    parser = _parser()
    given = sys.argv[1:]
    mark = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:mark])
    where = Where(
        args.seed_device,
        args.receiver_devices.split(","),
        args.large_mib,
        args.mib,
        args.peer,
        args.block_ports,
        args.peer_mib,
    )
    transports = [check for check in CHECKS if not args.cpu]
    wanted = set(filter(None, args.only.split(",")))
    unknown = wanted - {check.__name__ for check in transports} - (set(engine_checks.REMEDIES) if args.model else set())
    if unknown:
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    _refuse_what_does_not_fit(parser, args)
    for device in () if args.cpu else (where.source, *where.receivers):
        reason = HcclTransport().missing(device)
        if reason is not None:
            print(f"NOTHING CHECKED: {device} cannot be used: {reason}")
            return NO_NPU
    checklist = Checklist()
    for check in transports:
        if not wanted or check.__name__ in wanted:
            checklist.run(check.__name__, lambda check=check: check(where))  # type: ignore[misc]
    if args.model is None:
        if not wanted:
            checklist.add(Line("engines", "MANUAL", "name the folder of a model: the engines are checked then"))
        return 1 if checklist.failed else 0
    folder = Path(args.report or f"checklist-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    box = _box(args, given[mark + 1 :], where, folder)
    try:
        with EngineChecks(box) as engines:
            for name, run in engines.named().items():
                if not wanted or name in wanted:
                    checklist.run(name, run, engine_checks.REMEDIES[name])
        if not wanted:
            for name, what in engine_checks.by_hand(box).items():
                checklist.add(Line(name, "MANUAL", what))
    finally:  # also if somebody presses Ctrl-C
        checklist.write(folder, {**box.about(), "only": sorted(wanted)})
    print(f"report: {folder}")
    return 1 if checklist.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.hccl_checklist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", type=Path, help="folder of a model, for the checks with engines")
    parser.add_argument("--seed-device", default="npu:0")
    parser.add_argument("--receiver-devices", default="npu:1")
    parser.add_argument("--only", default="", help="names of checks, comma separated")
    parser.add_argument("--large-mib", type=int, default=8192)
    parser.add_argument("--mib", type=int, default=256, help="size of what is pulled where a pull has to have a middle")
    parser.add_argument("--peer", default="", help="HOST:PORT of a seed on another host, for two_hosts")
    parser.add_argument("--peer-mib", type=int, default=1024, help="what that seed was told as --mib")
    parser.add_argument("--block-ports", action="store_true", help="blocked_ports may change this host's firewall")
    engines = parser.add_argument_group("engines")
    engines.add_argument("--report", default="", help="folder for the report and the logs")
    engines.add_argument("--settings", type=json.loads, default={}, help="netloader's settings, as JSON")
    engines.add_argument("--pulls", type=int, default=100, help="pulls, and requests, of engine_beside")
    engines.add_argument("--timeout", type=float, default=1800.0, help="seconds for the start of an engine")
    engines.add_argument("--no-sleep", action="store_true", help="start no engine in sleep mode")
    engines.add_argument("--cpu", action="store_true", help="run engines on the processor: a test of the checklist")
    engines.add_argument("--vllm", default="vllm", help="the command")
    engines.add_argument(
        "--seed-model", type=Path, help="a control: folder with other weights for the seed. engine_equal has to fail"
    )
    return parser


def _refuse_what_does_not_fit(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.cpu and args.model is None:
        parser.error("--cpu needs a model")
    for model in (args.model, args.seed_model):
        if model is not None and not (model / "config.json").is_file():
            parser.error(f"{model} is not the folder of a model: it has no config.json")
    if "TOKEN_FILE" in args.settings:
        parser.error("the engines listen at 127.0.0.1 only, without a token: leave TOKEN_FILE out")


def _box(args: argparse.Namespace, arguments: Sequence[str], where: Where, folder: Path) -> Box:
    cards = [] if args.cpu else _cards(where.devices)
    ranks = len(cards) // 2
    return Box(
        model=args.model.resolve(),
        folder=folder,
        seed_cards=cards[:ranks],
        client_cards=cards[ranks : 2 * ranks],
        arguments=arguments,
        settings=args.settings,
        seed_model=None if args.seed_model is None else args.seed_model.resolve(),
        pulls=args.pulls,
        timeout=args.timeout,
        sleep=not (args.cpu or args.no_sleep),
        command=[args.vllm],
    )


def _cards(devices: Sequence[str]) -> list[str]:
    """The numbers of devices among all cards of the host, of which this process may see some only."""
    numbers = [int(device.partition(":")[2] or 0) for device in devices]
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return [visible.split(",")[number] if visible else str(number) for number in numbers]


if __name__ == "__main__":
    sys.exit(main())
