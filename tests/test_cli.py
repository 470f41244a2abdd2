"""The command line against real servers: in processes where signals and exit statuses matter, else in the test."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from netloader import ModelIdentity, sync
from netloader.checkpoint import make_demo_checkpoint, open_checkpoint
from netloader.cli import main
from netloader.cli.arguments import size
from netloader.cli.console import exit_for
from netloader.cli.demo_run import compare_checkpoints
from netloader.errors import (
    AttemptFailed,
    CheckpointError,
    ConfigError,
    DigestMismatch,
    NetloaderError,
    NoSourceLeft,
    PeerLost,
    RefusedError,
    RootMismatch,
    TransportUnavailable,
)
from netloader.observe import SessionEnded
from netloader.observe.events import Event
from netloader.tensors import hold
from netloader.transports import registry
from netloader.transports.faults import Fault, FaultKind, Faults, FaultyTransport
from tests.commands import PATIENCE, Serving, command, no_traceback, run, serving, untouched_logging

BYTES = 8 << 20
ZERO_ROOT = "0" * 64
BY_GLOO = ("--transport", "gloo")


@pytest.fixture(autouse=True)
def logging_stays() -> Iterator[None]:
    with untouched_logging():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_demo_checkpoint(folder, BYTES)
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Serving]:
    with serving(model, *BY_GLOO) as process:
        yield process


@pytest.fixture
def unused_address() -> Iterator[str]:
    with socket.socket() as bound:  # bound and not listening: no other process can take the port meanwhile
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def same(original: Path, copy: Path) -> bool:
    found = compare_checkpoints(original, copy)
    assert found.tensors > 0
    return found.problems == ()


# --- without a server -------------------------------------------------------------------------------------------------


def test_version_and_help_need_no_torch() -> None:
    done = run("--version", fresh=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "netloader")
    done = run("--help", fresh=True)
    assert done.returncode == 0
    for word in ("demo", "serve", "pull", "probe", "transports", "exit status"):
        assert word in done.stdout


def test_a_pull_without_a_source_and_without_a_registry_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "-o", str(tmp_path / "out")]) == 2
    assert "at least one host:port, or --discovery URL" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["pull", "127.0.0.1:1"],
        ["pull", "127.0.0.1:1", "--discovery", "dir:folder"],
        ["pull", "127.0.0.1:1", "-o", "out", "--expect-root", "abc"],
        ["pull", "127.0.0.1:1", "-o", "out", "--timeout", "soon"],
        ["serve", "folder", "--port", "65536"],
        ["serve", "folder", "--max-clients", "0"],
        ["demo", "--bytes", "many"],
        ["probe", "127.0.0.1:1", "--root", ZERO_ROOT, "--against", "folder"],
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "netloader" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("4096", 4096), ("64M", 64_000_000), ("1.5GB", 1_500_000_000), ("2GiB", 1 << 31), ("3 kB", 3000), ("0", 0)],
)
def test_sizes_are_parsed_with_their_units(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["", "B", "-1", "1e9", "1 parsec", "1.G"])
def test_texts_that_are_not_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="size"):
        size(text)


def _no_source(*causes: NetloaderError) -> NoSourceLeft:
    return NoSourceLeft([AttemptFailed("10.0.0.7:1", cause) for cause in causes])


def _full_disk() -> CheckpointError:
    error = CheckpointError("model.safetensors cannot be written")
    error.__cause__ = OSError(28, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (_no_source(), 1),
        (_no_source(PeerLost("gone")), 1),
        (_no_source(PeerLost("gone"), DigestMismatch(1, ["w"], "00", "01"), PeerLost("gone")), 3),
        (_no_source(RootMismatch("00", "01", "EXPECT_ROOT")), 3),
        (_no_source(RefusedError("root", "this server holds another root")), 3),
        (_no_source(RefusedError("identity", "the models differ")), 1),
        (_no_source(TransportUnavailable("none fits both")), 1),
        (TransportUnavailable("none here"), 2),
        (ConfigError(field="f", value=1, allowed="2"), 2),
        (CheckpointError("no such folder"), 2),
        (_full_disk(), 1),
        (ImportError("No module named 'torch'"), 2),
        (OSError(5, "Input/output error"), 1),
        (ZeroDivisionError(), 1),
    ],
)
def test_exit_statuses(error: BaseException, status: int) -> None:
    assert exit_for(error) == status


def test_only_the_command_as_a_process_freezes_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append("freeze"))
    assert main(["transports"]) == 0
    assert gc.isenabled()
    assert not calls, "a program that calls the command line goes on"
    monkeypatch.setattr(sys, "argv", ["netloader", "transports"])
    assert main() == 0
    assert calls == ["freeze"], "a process of its own ends here"
    assert gc.isenabled()
    capsys.readouterr()


def test_transports_lists_what_can_run_and_what_auto_selects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transports"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "tcp: runs here" in lines
    for name in ("gloo", "memory"):
        assert f"{name}: runs here, when it is asked for by name" in lines
    assert lines[-1].startswith("auto: ")
    assert lines[-1].endswith("tcp")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pull", "127.0.0.1", "-o", "{tmp}/out"], 2, ["127.0.0.1", "the port is missing"]),
        (["pull", "127.0.0.1:1", "-o", "{tmp}/out", "--transport", "pigeon"], 2, ["pigeon", "gloo"]),
        (["pull", "127.0.0.1:1", "-o", "{tmp}/out", "--token-file", "{tmp}/none"], 2, ["token", "none"]),
        (["pull", "127.0.0.1:1", "-o", "{tmp}"], 2, ["not empty", "--overwrite"]),
        (["pull", "127.0.0.1:1", "-o", "{tmp}/file"], 2, ["it is a file"]),
        (["probe", "127.0.0.1:1"], 1, ["127.0.0.1:1 cannot be reached"]),
        (["serve", "{tmp}/nowhere"], 2, ["nowhere does not exist"]),
        (["serve", "{tmp}"], 2, ["has no safetensors file"]),
        (["serve", "{tmp}", "--fault", "melt:1"], 2, ["melt:1", "corrupt:BLOCK"]),
        (["demo", "--fault", "melt:1"], 2, ["melt:1", "corrupt:BLOCK"]),
        (["demo", "--keep", "{tmp}"], 2, ["--keep", "empty"]),
    ],
)
def test_errors_are_one_line_and_a_hint(
    arguments: list[str], status: int, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert [line for line in lines if not line.startswith(("netloader: error: ", "netloader: hint: "))] == []
    assert sum(line.startswith("netloader: error: ") for line in lines) == 1
    for word in words:
        assert word.lower() in shown.err.lower()


def test_debug_shows_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


# --- pull -------------------------------------------------------------------------------------------------------------


def test_pull_works_as_a_process(server: Serving, model: Path, tmp_path: Path) -> None:
    done = run("pull", server.address, "-o", tmp_path / "copy", *BY_GLOO, fresh=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verified: all tensors bit-exact"
    assert any(line.startswith("pulled 8.39 MB of tiny-llama (target, ") for line in lines)
    assert any("config.json" in line and "not part" in line for line in lines)
    assert f"source {server.address}: " in done.stdout
    assert "pulled 8.39 MB of 8.39 MB" not in done.stderr, "the summary says it, once"
    assert all(line.startswith("netloader: ") for line in done.stderr.splitlines())
    assert same(model, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["model.safetensors"]


def test_serve_and_pull_find_each_other_in_a_registry(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    there = ("--discovery", f"dir:{folder}")
    with serving(model, *there, "--model", "org/model") as process:
        assert main(["pull", *there, "--model", "org/model", "-o", str(tmp_path / "copy"), "--wait", "60"]) == 0
        assert f"source {process.address}: " in capsys.readouterr().out
        assert same(model, tmp_path / "copy")
        assert main(["pull", *there, "--model", "other", "-o", str(tmp_path / "other")]) == 1
        assert "org/model" in capsys.readouterr().err
        process.process.terminate()
        process.read_to_end()
    assert list(folder.iterdir()) == [], "it is withdrawn when the server stops"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["pull"], "SOURCE = []"),
        (["pull", "--discovery", "dir:/tmp"], "--model"),
        (["pull", "--discovery", "nothing:x", "--model", "m"], "discovery[0]"),
        (["pull", "a:1", "--zone", "a b"], "zone"),
        (["config", "check", '{"DISCOVERY": "nothing:x"}'], "DISCOVERY"),
        (["config", "check", '{"DISCOVERY": "dir:/tmp", "ORIGIN": "lease"}'], "can't give a lease"),
    ],
)
def test_wrong_registries_are_refused_by_name(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", str(tmp_path / "copy")] if arguments[0] == "pull" else []
    assert main([*arguments, *output]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_pull_draws_a_bar_on_a_terminal(
    server: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO, "--log-level", "info"]) == 0
    shown = terminal.getvalue()
    assert "\r\x1b[K 100% |#" in shown
    assert re.search("8[.]39 MB of 8[.]39 MB  .*/s  0:00 left\n", shown)
    # A log line starts by clearing the bar.
    assert all(line.startswith("\r\x1b[K") for line in shown.split("\n") if " INFO " in line)
    assert "verified: all tensors bit-exact" in capsys.readouterr().out


def test_ctrl_c_ends_a_pull_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, "--transport", "gloo", "--fault", "stall:1") as server,
        _pulling(server.address, tmp_path) as pull,
    ):
        _read_until(server, "TRANSFER over gloo")
        began = time.monotonic()
        pull.send_signal(signal.SIGINT)
        status = pull.wait(PATIENCE)
        took = time.monotonic() - began
        server_status = server.process.poll()
    said = (tmp_path / "said").read_text()
    assert status == 130, f"{took:.1f} s after Ctrl-C, the server's status being {server_status}: {said}"
    assert not (tmp_path / "copy").exists()


def test_pull_overwrites_weights_only_with_the_option(
    server: Serving, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    make_demo_checkpoint(copy, 1 << 20, seed=5)
    assert main(["pull", server.address, "-o", str(copy), *BY_GLOO]) == 2
    assert not same(model, copy)
    assert main(["pull", server.address, "-o", str(copy), *BY_GLOO, "--overwrite"]) == 0
    assert same(model, copy)
    assert (copy / "config.json").exists()
    capsys.readouterr()


def test_pull_prints_json(server: Serving, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is True
    assert said["bytes"] == sum(tensor.nbytes for tensor in open_checkpoint(model).tensors.values())
    assert said["sources"][server.address]["bytes"] == said["bytes"]
    assert said["identity"]["model"] == model.name
    assert said["files"] == [str(tmp_path / "copy" / "model.safetensors")]
    assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit"], said["error"]) == (False, 2, "ConfigError")


def test_pull_goes_on_to_the_next_source(
    server: Serving, model: Path, unused_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", unused_address, server.address, "-o", str(tmp_path / "copy"), *BY_GLOO]) == 0
    assert f"failed before: {unused_address}" in capsys.readouterr().out
    assert same(model, tmp_path / "copy")


def test_pull_without_a_reachable_source_fails(
    unused_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", unused_address, "-o", str(tmp_path / "copy"), "--wait", "0.1"]) == 1
    shown = capsys.readouterr()
    assert "verified" not in shown.out
    assert f"{unused_address}: cannot be reached" in shown.err
    assert not (tmp_path / "copy").exists()


def test_pull_refuses_a_root_other_than_the_expected_one(
    server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO, "--expect-root", ZERO_ROOT]) == 3
    assert ZERO_ROOT in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_a_server_with_a_token_requires_it(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text("correct horse battery staple")
    token.chmod(0o600)
    with serving(model, "--transport", "gloo", "--token-file", token) as server:
        assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO]) == 1
        assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO, "--token-file", str(token)]) == 0
    assert "correct horse" not in capsys.readouterr().err
    assert same(model, tmp_path / "copy")


# --- pull when bytes are corrupted ------------------------------------------------------------------------------------


def faulty(*faults: Fault) -> FaultyTransport:
    return FaultyTransport(registry.load("gloo"), Faults(faults))


def test_a_flipped_bit_at_ten_random_offsets_is_detected(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    tensors = open_checkpoint(model).tensors
    identity = ModelIdentity(model="tiny", layout="checkpoint")
    announced = hold(tensors, identity).announcement
    for number in range(10):
        block = chance.choice(announced.plan.blocks)
        byte = chance.randrange(block.nbytes)
        where = f"seed {seed}, block {block.number}, byte {byte}"
        transport = faulty(Fault(FaultKind.CORRUPT, block.number, byte=byte, times=None))
        with sync.serve(tensors, identity, host="127.0.0.1", transport=transport) as server:
            status = main(["pull", server.address, "-o", str(tmp_path / str(number)), "--transport", "gloo"])
        shown = capsys.readouterr()
        assert status == 3, f"{where}: {shown.err}"
        lines = shown.out.splitlines()
        assert lines[0] == f"corrupt: block {block.number} from {server.address}", where
        named = tuple(line.split()[1] for line in lines if line.startswith("  tensor"))
        assert named == announced.plan.tensors_of(block.number), where
        digest = announced.digests[block.number * 16 :][:16].hex()
        assert f"  announced {digest}" in lines, where
        (arrived,) = (line.split()[1] for line in lines if line.startswith("  arrived"))
        assert len(arrived) == len(digest), where
        assert arrived != digest, where
        assert "verified" not in shown.out, where
        assert not (tmp_path / str(number)).exists(), where


def test_corruption_is_reported_as_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = open_checkpoint(model).tensors
    transport = faulty(Fault(FaultKind.CORRUPT, 1, byte=7, times=None))
    with sync.serve(tensors, ModelIdentity(layout="checkpoint"), host="127.0.0.1", transport=transport) as server:
        assert main(["pull", server.address, "-o", str(tmp_path / "copy"), *BY_GLOO, "--json"]) == 3
    (attempt,) = json.loads(capsys.readouterr().out)["attempts"]
    assert (attempt["error"], attempt["block"]) == ("DigestMismatch", 1)
    assert attempt["announced"] != attempt["arrived"]


def test_a_good_source_replaces_a_corrupting_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good source starts when the corrupting one has failed, because otherwise it might send every block."""
    tensors, identity = open_checkpoint(model).tensors, ModelIdentity(layout="checkpoint")
    failed, over, reserved = threading.Event(), threading.Event(), socket.socket()
    reserved.bind(("127.0.0.1", 0))
    port = reserved.getsockname()[1]

    def note(event: Event) -> None:
        if isinstance(event, SessionEnded) and event.transport:
            failed.set()

    def serve_good() -> None:
        assert failed.wait(PATIENCE)
        reserved.close()
        with sync.serve(tensors, identity, host="127.0.0.1", port=port, transport="gloo"):
            over.wait(PATIENCE)

    transport = faulty(Fault(FaultKind.CORRUPT, 1, times=None))
    with (
        reserved,
        ThreadPoolExecutor(1) as threads,
        sync.serve(tensors, identity, host="127.0.0.1", transport=transport, observers=[note]) as bad,
    ):
        good = threads.submit(serve_good)
        arguments = [bad.address, f"127.0.0.1:{port}", "-o", str(tmp_path / "copy"), "--wait", "30", *BY_GLOO]
        try:
            assert main(["pull", *arguments]) == 0
        finally:
            over.set()
        good.result()
    assert f"failed before: {bad.address}: block 1" in capsys.readouterr().out
    assert same(model, tmp_path / "copy")


@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.STALL])
def test_a_source_that_disconnects_or_stalls_is_reported(
    kind: FaultKind, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = open_checkpoint(model).tensors
    transport = faulty(Fault(kind, 1, times=None))
    with sync.serve(tensors, ModelIdentity(layout="checkpoint"), host="127.0.0.1", transport=transport) as server:
        arguments = ["pull", server.address, "-o", str(tmp_path / "copy"), "--transport", "gloo"]
        assert main([*arguments, "--stall-timeout", "0.5"]) == 1
    shown = capsys.readouterr()
    assert "corrupt" not in shown.out
    assert no_traceback(shown.err)
    assert not (tmp_path / "copy").exists()


# --- probe ------------------------------------------------------------------------------------------------------------


def probed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["probe", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_probe_prints_what_is_held(server: Serving, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = probed(capsys, server.address)
    assert status == 0
    assert "transports gloo" in text
    assert f"identity   model = {model.name}" in text
    assert "identity   layout = checkpoint" in text
    assert "matches" not in text
    status, text = probed(capsys, server.address, "--json")
    said = json.loads(text)
    assert said["transports"] == ["gloo"]
    assert said["bytes"] == sum(entry["bytes"] for entry in said["tensors"])
    assert {entry["name"] for entry in said["tensors"]} == set(open_checkpoint(model).tensors)
    assert f"root {said['root']}\n" in server.lines
    assert said["software"].startswith("netloader ")
    assert "matches" not in said


def test_probe_compares_roots(server: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    root = json.loads(probed(capsys, server.address, "--json")[1])["root"]
    status, text = probed(capsys, server.address, "--root", root.upper())
    assert (status, "matches: yes" in text) == (0, True)
    status, text = probed(capsys, server.address, "--root", ZERO_ROOT)
    assert (status, "matches: no" in text) == (3, True)
    assert f"root: expected {ZERO_ROOT}" in text


def _other_weights(model: Path, folder: Path) -> str:
    make_demo_checkpoint(folder, BYTES, seed=1)
    return "same shape, other contents"


def _other_shapes(model: Path, folder: Path) -> str:
    make_demo_checkpoint(folder, 1 << 20)
    return "shape is"


def _one_bit(model: Path, folder: Path) -> str:
    shutil.copytree(model, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    return "lm_head.weight"  # the last one in the file


@pytest.mark.parametrize("make", [_other_weights, _other_shapes, _one_bit])
def test_probe_names_the_difference_of_a_folder(
    make: Callable[[Path, Path], str],
    server: Serving,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = make(model, tmp_path / "other")
    status, text = probed(capsys, server.address, "--against", tmp_path / "other")
    assert status == 3
    assert "matches: no\n  " in text
    assert len(text.partition("matches: no\n")[2].splitlines()) <= 11
    status, text = probed(capsys, server.address, "--against", tmp_path / "other", "--json")
    said = json.loads(text)
    assert (status, said["matches"]) == (3, False)
    assert any(words in reason for reason in said["reasons"])


def test_probe_reports_that_a_folder_matches(server: Serving, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = probed(capsys, server.address, "--against", model)
    assert status == 0
    assert "matches: yes" in text


# --- serve ------------------------------------------------------------------------------------------------------------


@contextmanager
def _pulling(address: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = command("pull", address, "-o", folder / "copy", "--transport", "gloo")
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=said)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)


def _read_until(server: Serving, words: str) -> None:
    for line in server.process.stdout or ():
        server.lines.append(line)
        if words in line:
            return
    raise AssertionError(f"the server never said {words!r}: {''.join(server.lines)}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_server_whose_client_is_stuck(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "address"
    arguments = [model, "--transport", "gloo", "--fault", "stall:1", "--address-file", file, "--progress-every", "0.05"]
    with serving(*arguments) as server:
        address = file.read_text()
        assert address == server.address
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=PATIENCE), _pulling(address, tmp_path) as pull:
            _read_until(server, "TRANSFER over gloo")
            server.process.send_signal(number)
            said = server.read_to_end()
            assert server.process.returncode == 0, said
            assert said.endswith("stopped\n")
            assert no_traceback(said)
            assert not file.exists()
            assert pull.wait(PATIENCE) == 1, (tmp_path / "said").read_text()


def test_a_server_ends_with_its_parent(model: Path) -> None:
    with serving(model, "--transport", "gloo", "--stop-on-eof") as server:
        assert server.process.stdin is not None
        server.process.stdin.close()
        server.process.stdin = None
        assert server.read_to_end().endswith("stopped\n")
        assert server.process.returncode == 0


def test_a_port_in_use_is_an_error(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", model, "--host", "127.0.0.1", "--port", port)
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert no_traceback(done.stderr)
