"""The entry point: whatever goes wrong in it, an engine with another load format starts."""

from __future__ import annotations

import logging

import pytest

from netloader.vllm import plugin


@pytest.mark.parametrize("step", ["join_vllm_log", "_let_ascend_register_first", "_register"])
@pytest.mark.parametrize("error", [AttributeError("gone"), ImportError("no vllm"), TypeError("other arguments")])
def test_an_error_while_registering_is_logged_and_not_raised(
    step: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    for name in ("join_vllm_log", "_let_ascend_register_first", "_register", "check_configuration_early"):
        monkeypatch.setattr(plugin, name, fail if name == step else lambda: None)
    plugin.register()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line == (
        f"netloader does not fit this vLLM, and its load formats are not registered: {type(error).__name__}: {error}"
    )
