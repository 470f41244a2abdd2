"""The fixed list of sources."""

from __future__ import annotations

from contextlib import aclosing

import pytest

import netloader
from netloader.core.addresses import Address
from netloader.core.sources import Source
from netloader.discovery import Appeared, FixedSources, SourceProvider
from netloader.errors import ConfigError

TWO = Source(Address("10.0.0.2", 1), load=2.0)


async def test_the_fixed_list_yields_its_sources_in_order_and_ends() -> None:
    fixed = FixedSources(["10.0.0.7:80", Address("10.0.0.8", 80), TWO])
    assert isinstance(fixed, SourceProvider)
    expected = [Source(Address("10.0.0.7", 80)), Source(Address("10.0.0.8", 80)), TWO]
    for _ in range(2):
        async with aclosing(fixed.watch()) as stream:
            assert [change async for change in stream] == [Appeared(source) for source in expected]


@pytest.mark.parametrize(
    ("sources", "field"), [(["10.0.0.7:80", "nowhere"], r"sources\[1\]"), ("10.0.0.7:80", "sources = ")]
)
def test_an_invalid_address_in_the_fixed_list_is_an_error_that_names_its_place(sources: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        FixedSources(sources)


def test_a_list_is_not_taken_for_a_source_provider() -> None:
    assert not isinstance(["10.0.0.7:80"], SourceProvider)
    assert netloader.SourceProvider is SourceProvider
