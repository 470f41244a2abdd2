"""A configuration is checked in a second, without vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from netloader.cli import main
from tests.commands import run

WRONG = {"WAIT": -1, "PORT": 3, "TOKEN_FILE": "/nowhere/token"}


def test_all_faults_are_named_at_once_each_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", json.dumps(WRONG)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
    assert [line.split()[2] for line in lines] == ["WAIT", "PORT", "TOKEN_FILE"]


def test_a_file_is_checked_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "netloader.json"
    file.write_text(json.dumps(WRONG))
    assert main(["config", "check", str(file), "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["exit"]) == (False, 2)
    assert [fault["field"] for fault in said["faults"]] == ["WAIT", "PORT", "TOKEN_FILE"]
    assert str(file) in said["faults"][0]["message"]
    file.write_text('{"WAIT": 1 "PORT": 2}')
    assert main(["config", "check", str(file)]) == 2
    assert "line 1, column 12" in capsys.readouterr().err


def test_a_valid_configuration_is_told_with_what_is_odd_about_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", '{"WAIT": 60}']) == 0
    assert capsys.readouterr().out == "the configuration is valid\n"
    prefix = f"{tmp_path}/none/rank-"
    assert main(["config", "check", json.dumps({"OUTPUT_PREFIX": prefix, "INT8_CACHE_NAME": ["a"]})]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert f"{tmp_path}/none is not there" in lines[1]


@pytest.mark.parametrize("text", ["{", '{"a": }', "{}{}"])
def test_a_text_that_is_no_object_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", text]) == 2
    assert "one JSON object" in capsys.readouterr().err


def test_neither_torch_nor_vllm_is_imported() -> None:
    check = "import sys; from netloader.cli import main; main(['config', 'check', '{}']); "
    done = run_python(check + "print(sorted({'torch', 'vllm', 'numpy'} & set(sys.modules)))")
    assert done.splitlines()[-1] == "[]"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout


def test_it_works_as_a_process() -> None:
    assert run("config", "check", "{}", fresh=True).returncode == 0
