"""Values of a configuration: what can be compared, by its class and not by the class's name."""

from __future__ import annotations

import pytest
import torch

from netloader.vllm.model.plain_values import NotComparable, plain


def test_a_dtype_is_its_text() -> None:
    assert plain({"dtype": torch.bfloat16}, strict=True) == {"dtype": "torch.bfloat16"}


def test_a_class_of_the_same_name_is_no_dtype() -> None:
    made = type("dtype", (), {"__str__": lambda self: "torch.bfloat16"})()
    assert plain(made, strict=False) == "dtype"
    with pytest.raises(NotComparable, match="dtype"):
        plain(made, strict=True)
