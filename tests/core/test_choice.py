"""Which of many equal sources a client prefers: the nearest, then the least busy, then its own share."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import example, given
from hypothesis import strategies as st

from netloader.core.choice import BOOT, HOST, NAME, ZONE, Here, busy_class, distance, preference

HERE = Here(client="me", host="node-1", boot="b1", zone="z1", name="m")

NAMES = st.text(max_size=8)
VALUES = st.sampled_from(["", "b1", "node-1", "z1", "m", "x"])
LABELS = st.dictionaries(st.sampled_from([HOST, BOOT, ZONE, NAME]), VALUES)
LOADS = st.floats(0, 1e12)


def ranking(client: str, sources: list[str]) -> list[str]:
    return sorted(sources, key=lambda source: preference(Here(client=client), source, {}, 0.0))


def test_the_nearest_comes_first_then_the_least_busy() -> None:
    on_host = {BOOT: "b1", HOST: "a-container", ZONE: "z1"}
    in_zone = {BOOT: "b2", HOST: "node-2", ZONE: "z1"}
    elsewhere = {BOOT: "b3", HOST: "node-3", ZONE: "z2"}
    full = 4.0
    wanted = [(on_host, full), (in_zone, 0.0), (in_zone, full), (elsewhere, 0.0), ({}, 0.7)]
    for given_order in itertools.permutations(wanted):
        assert sorted(given_order, key=lambda item: preference(HERE, "s", *item)) == wanted


def test_a_source_with_another_name_comes_last_and_one_without_a_name_does_not() -> None:
    named = [({NAME: "m"}, 9.0), ({}, 9.5), ({NAME: "other", BOOT: "b1"}, 0.0)]
    assert sorted(named, key=lambda item: preference(HERE, "s", *item)) in (named, [named[1], named[0], named[2]])
    assert not preference(Here(), "s", {NAME: "other"}, 0.0).other_name


def test_equal_host_names_of_two_kernels_are_two_hosts() -> None:
    assert distance(HERE, {HOST: "node-1", BOOT: "b2"}) == 2
    assert distance(HERE, {HOST: "node-1"}) == 0
    assert distance(Here(), {}) == 2


def test_the_class_of_a_load() -> None:
    assert [busy_class(load) for load in (0, 0.49, 0.5, 0.99, 1, 1.9, 2, 4, 8)] == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    assert busy_class(1e300) == busy_class(float("inf"))  # bounded


@given(LOADS, LOADS)
def test_more_load_is_never_preferred(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert busy_class(low) <= busy_class(high)


@given(NAMES, LABELS, LOADS)
@example("\ud800", {}, 0.0)
def test_the_preference_is_deterministic(source: str, labels: dict[str, str], load: float) -> None:
    assert preference(HERE, source, labels, load) == preference(HERE, source, dict(labels), load)


def test_the_hash_is_the_same_in_every_process() -> None:
    assert preference(Here(client="c"), "s", {}, 0.0).share == 16254844473791757814


@given(st.lists(NAMES, min_size=2, max_size=12, unique=True), NAMES, st.data())
def test_when_a_source_leaves_only_its_own_clients_move(sources: list[str], client: str, data: st.DataObject) -> None:
    before = ranking(client, sources)
    gone = data.draw(st.sampled_from(sources))
    after = ranking(client, [source for source in sources if source != gone])
    assert after == [source for source in before if source != gone]


@given(st.integers(2, 16), st.integers(0, 1 << 30))
def test_clients_are_spread_evenly(count: int, seed: int) -> None:
    sources, clients = [f"{seed}:{place}" for place in range(count)], 200 * count
    chosen = Counter(ranking(f"client {seed} {number}", sources)[0] for number in range(clients))
    # 200 on average for each, with a standard deviation of at most 14.1: six of them are not met by chance.
    assert all(abs(chosen[source] - 200) < 6 * 14.2 for source in sources)
