"""These tests run on a simulated device, in a separate process: see `tests.npu_sim.test_simulator`."""

from __future__ import annotations

import importlib.util
import os

collect_ignore_glob = []
if os.environ.get("NETLOADER_NPU_SIM") != "1" or importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import torch_npu

    if torch_npu.__version__ != "0.0.sim":
        raise RuntimeError(f"these tests need the simulated torch_npu, found {torch_npu.__version__}")

    from collections.abc import Iterator

    import pytest
    from torch_npu._traffic import traffic

    @pytest.fixture(autouse=True)
    def one_window_at_a_time() -> Iterator[None]:
        """Check after each test that no two links of one device moved data at the same time."""
        traffic.overlaps.clear()
        yield
        assert not traffic.overlaps
