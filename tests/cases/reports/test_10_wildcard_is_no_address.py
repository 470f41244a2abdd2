"""VLLM_HOST_IP=0.0.0.0, as people advise: a wildcard is no address that clients can use."""

from __future__ import annotations

import pytest

from netloader.api import own_host
from netloader.config import load_config
from netloader.core.addresses import parse_address
from netloader.vllm.serve import serving


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::", " 0.0.0.0 ", "0:0:0:0:0:0:0:0", ""])
def test_a_wildcard_in_vllms_variable_announces_the_machine_s_own_address(
    wildcard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", wildcard)
    server = serving.worker_server(load_config({"TRANSPORT": "memory"}), 0, "cpu")
    try:
        assert server is not None
        assert parse_address(server.address).host == own_host("0.0.0.0")
    finally:
        serving.stop_server()
