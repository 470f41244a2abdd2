"""How the outcome of a tensor is found: what is taken for rewritten, lost, dropped, and overwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ascend.outcomes import Before, inverse
from tests.ascend.table import section


def values(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("now", "steps"),
    [
        (values(8, 4).t().contiguous(), ("transpose",)),
        (values(8, 4).reshape(32), ("reshape",)),
        (values(8, 4).float(), ("cast to int8",)),
        (values(8, 4).float().reshape(32), ("cast to int8", "reshape")),
        (values(8, 4).t().contiguous().view(torch.int32), ("view int8", "transpose")),
        (values(8, 4), ()),
        (values(8, 4).add(1), None),
        (values(8, 4).float().mul(1.5), None),
        (values(8, 4).reshape(4, 8).t().contiguous(), ("transpose", "reshape")),
        (values(8, 4).flatten().roll(1), None),
    ],
)
def test_the_shortest_exact_way_back(now: torch.Tensor, steps: tuple[str, ...] | None) -> None:
    assert inverse(now, values(8, 4)) == steps


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("kept", "turned", "overwritten", "gone"):
            self.register_parameter(name, torch.nn.Parameter(values(4, 3, dtype=torch.float32), requires_grad=False))


def test_the_outcomes_of_a_layer() -> None:
    layer: Any = Layer()
    model = torch.nn.Sequential(layer)
    before = Before(model)
    layer.turned.data = layer.turned.data.t().contiguous()
    layer.overwritten.data.add_(1)
    del layer.gone
    layer.extra = torch.ones(2)
    layer.factor = 0.5
    rows = {row["tensor"]: row for row in before.compare(model)}
    assert {name: (row["outcome"], row["held"]) for name, row in rows.items()} == {
        "kept": ("survives", "yes"),
        "turned": ("rewritten", "yes"),
        "overwritten": ("lost", "no"),
        "gone": ("dropped", "yes"),
        "extra": ("derived", ""),
        "factor": ("derived", ""),
    }
    assert rows["turned"]["inverse"] == "transpose"
    assert rows["factor"]["now"] == "plain value (float)"
    text = section("w8a8", list(rows.values()))
    assert "1 tensors of layers that are not quantised survive." in text
    assert "| * |  | `overwritten` | lost; a held reference was overwritten | float32, 2-D |  |" in text
    assert "| * |  | `turned` | rewritten | float32, 2-D | transpose |" in text
