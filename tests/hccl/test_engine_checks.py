"""The checks with engines, on an engine double: without a fault all pass, and each fault turns the check red that is
meant to find it. `tests/e2e/test_checklist.py` runs them with real engines.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scripts import hccl_checklist
from scripts.checklist import Checklist, Line
from scripts.engine_checks import REMEDIES, Box, EngineChecks
from tests.hccl import engine_double
from tests.preloaded import PYTHON

ALL = list(REMEDIES)
FOUND_BY = {
    "answers by chance": ("engine_reference", "answers differently when it is asked again: 8 of 8 prompts"),
    "serves nobody": ("engine_serve", "of 1 ranks only [] serve; the log"),
    "answers otherwise while it is pulled": ("engine_beside", "the answers of the seed are not the same while"),
    "fails requests while it is pulled": (
        "engine_beside",
        "a request failed: EngineFailed: /v1/completions",
    ),
    "does not start with a source": ("engine_pull", "the engine ended with status 1 before it was ready; the log"),
    "says nothing of a pull": ("engine_pull", "0 of 1 ranks say that they pulled"),
    "computes otherwise after a pull": ("engine_equal", "by the engine that pulled"),
    "serves other weights than it pulled": ("engine_serve_again", "and the seed had"),
    "serves while it sleeps": ("engine_sleep", "a client of the sleeping engine was not refused"),
    "wakes up with zeros": ("engine_sleep", "by the engine that woke up"),
    "does not wake up": ("engine_sleep", "/wake_up answered 500"),
    "reloads zeros": ("engine_reload", "by the engine after a reload"),
    "says nothing of a reload": ("engine_reload", "0 of 1 ranks say that they reloaded"),
    "fails to reload": ("engine_reload", "/collective_rpc answered 500"),
    "does not end": ("engine_stop", "still running"),
}
"""Fault -> the first check that fails, and what it says."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return made(tmp_path / "model", 1)


def made(folder: Path, seed: int) -> Path:
    """The folder of a model."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    weights = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    save_file({"embed": weights, "head": weights.flip(0).contiguous()}, folder / "model.safetensors")
    return folder


def checked(model: Path, folder: Path, fault: str = "", last: str = ALL[-1], **more: Any) -> dict[str, Line]:
    """The lines of the checks up to the `last` one."""
    command = (PYTHON, "-m", "tests.hccl.engine_double", fault)
    settings: dict[str, Any] = {"pulls": 3, "timeout": 60.0, "sleep": True, "stop_timeout": 5.0, "wait": 10.0, **more}
    checklist = Checklist()
    with EngineChecks(Box(model, folder, command=command, **settings)) as engines:
        for name, run in list(engines.named().items())[: ALL.index(last) + 1]:
            checklist.run(name, run, REMEDIES[name])
    return {line.name: line for line in checklist.lines}


def test_all_checks_pass_on_engines_without_a_fault(model: Path, tmp_path: Path) -> None:
    lines = checked(model, tmp_path)
    assert {name: line.outcome for name, line in lines.items()} == dict.fromkeys(ALL, "PASS"), lines
    assert "3 pulls over " in lines["engine_beside"].text
    assert "1 of 1 ranks reloaded" in lines["engine_reload"].text
    assert not list((tmp_path / "without-weights").glob("*.safetensors"))


def test_each_fault_is_looked_for() -> None:
    assert set(engine_double.FAULTS) == FOUND_BY.keys() | {"refuses to reload"}
    assert {check for check, _ in FOUND_BY.values()} == set(ALL)


@pytest.mark.parametrize("fault", FOUND_BY)
def test_a_fault_turns_the_check_red(model: Path, tmp_path: Path, fault: str) -> None:
    name, text = FOUND_BY[fault]
    lines = checked(model, tmp_path, fault, last=name)
    assert text in lines[name].text
    assert lines[name].outcome == "FAIL"
    assert lines[name].remedy == REMEDIES[name]
    before = [lines[one].outcome for one in ALL[: ALL.index(name)]]
    assert before == ["PASS"] * len(before), lines
    assert len(lines) == len(before) + 1


def test_a_seed_with_other_weights_turns_the_comparison_red(model: Path, tmp_path: Path) -> None:
    lines = checked(model, tmp_path, last="engine_equal", seed_model=made(tmp_path / "other", 2))
    assert lines["engine_equal"].outcome == "FAIL"
    assert "8 of 8 prompts are answered differently" in lines["engine_equal"].text
    assert "by the engine that serves" in lines["engine_equal"].text
    assert lines["engine_pull"].outcome == "PASS", "nothing else says which weights are meant"


def test_what_needs_an_engine_that_is_not_there_is_skipped(model: Path, tmp_path: Path) -> None:
    lines = checked(model, tmp_path, "serves nobody")
    outcomes = {name: (line.outcome, line.text) for name, line in lines.items()}
    assert outcomes["engine_beside"] == outcomes["engine_pull"] == ("SKIP", "engine_serve did not pass")
    assert outcomes["engine_sleep"] == ("SKIP", "engine_pull did not pass")


def test_a_reload_may_be_refused_by_name(model: Path, tmp_path: Path) -> None:
    line = checked(model, tmp_path, "refuses to reload", last="engine_reload")["engine_reload"]
    assert line.text == "refused, and the answers are the same: the model has tied weights"
    assert line.outcome == "PASS"


def test_without_sleep_mode_the_line_says_what_to_do(model: Path, tmp_path: Path) -> None:
    line = checked(model, tmp_path, last="engine_sleep", sleep=False)["engine_sleep"]
    assert (line.outcome, line.text) == (
        "MANUAL",
        "no engine sleeps here: run the checklist on an NPU, without --no-sleep",
    )


def test_a_pull_between_cards_has_to_go_over_hccl(model: Path, tmp_path: Path) -> None:
    """The double has no card, so it pulls over another transport."""
    lines = checked(model, tmp_path, last="engine_pull", seed_cards=["0"], client_cards=[""])
    for name in ("engine_beside", "engine_pull"):
        assert lines[name].outcome == "FAIL"
        assert "over hccl" in lines[name].text
    settings = {"TRANSPORT": "tcp"}
    lines = checked(model, tmp_path, last="engine_pull", seed_cards=["0"], client_cards=[""], settings=settings)
    assert lines["engine_pull"].outcome == "PASS", "a second run into the same folder, with a transport that was chosen"


def test_a_check_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> str:
        raise RuntimeError("first\nsecond")

    Checklist().run("engine_stop", fails, "this")
    assert capsys.readouterr().out == "FAIL engine_stop: RuntimeError: first / second To do: this\n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hccl_checklist", *arguments])
    return hccl_checklist.main()


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A command `vllm` that is the double."""
    command = tmp_path / "vllm"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.hccl.engine_double "" "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return command


def test_the_command_writes_a_report(
    model: Path, vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = "engine_reference,engine_serve"
    report = tmp_path / "report"
    common = (str(model), "--cpu", "--vllm", str(vllm), "--report", str(report), "--timeout", "60")
    assert run(monkeypatch, *common, "--only", only, "--", "--max-model-len", "512") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["PASS engine_reference", "PASS engine_serve", "report"]
    assert (report / "report.txt").read_text(encoding="utf-8").splitlines() == printed[:-1]
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert found["platform"] == "cpu"
    assert found["arguments"] == ["--max-model-len", "512"]
    assert found["failed"] is False
    assert [(check["name"], check["outcome"]) for check in found["checks"]] == [
        ("engine_reference", "PASS"),
        ("engine_serve", "PASS"),
    ]
    assert (report / "seed.log").is_file()


def test_the_command_reports_a_failure(
    model: Path, vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.write_text("#!/bin/sh\necho ValueError: no such model\nexit 1\n", encoding="utf-8")
    assert run(monkeypatch, str(model), "--cpu", "--vllm", str(vllm), "--report", str(tmp_path)) == 1
    printed = capsys.readouterr().out.splitlines()
    log = tmp_path / "reference.log"
    assert printed[0] == (
        f"FAIL engine_reference: the engine ended with status 1 before it was ready; the log {log} says: "
        f"ValueError: no such model To do: {REMEDIES['engine_reference']}"
    )
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["failed"] is True
    assert [line.partition(":")[0] for line in printed[-3:-1]] == ["MANUAL engine_two_hosts", "MANUAL engine_ranks"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cpu"], "--cpu needs a model"),
        (["/nonexistent", "--cpu"], "/nonexistent is not the folder of a model"),
        (["--only", "engine_pull"], "no such check: engine_pull"),
        (["{model}", "--cpu", "--only", "one_pull"], "no such check: one_pull"),
        (["{model}", "--cpu", "--settings", '{"TOKEN_FILE": "x"}'], "leave TOKEN_FILE out"),
    ],
)
def test_arguments_that_fit_nothing_are_refused(
    arguments: list[str], text: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *(argument.replace("{model}", str(model)) for argument in arguments))
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(("visible", "cards"), [(None, ["0", "1"]), ("4,5,6", ["4", "5"])])
def test_devices_are_those_that_this_process_sees(
    visible: str | None, cards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    assert hccl_checklist._cards(["npu:0", "npu:1"]) == cards
