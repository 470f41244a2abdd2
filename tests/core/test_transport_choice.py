"""Choosing a transport from what both sides listed."""

from __future__ import annotations

import pytest
from hypothesis import given

from netloader.core.messages import Ability
from netloader.core.protocol.transport_choice import choose_transport, why_not_chosen
from netloader.errors import TransportUnavailable
from tests.core.strategies import abilities

TCP, GLOO, SHM = Ability("tcp"), Ability("gloo"), Ability("shm", {"host": "a", "user": "1"})


def test_the_preference_of_this_side_decides() -> None:
    assert choose_transport([TCP, GLOO], [GLOO, TCP]) == (TCP, TCP)
    assert choose_transport([GLOO, TCP], [GLOO, TCP]) == (GLOO, GLOO)


def test_facts_that_differ_rule_a_transport_out() -> None:
    elsewhere = Ability("shm", {"host": "b", "user": "1"})
    assert choose_transport([SHM, TCP], [TCP, elsewhere]) == (TCP, TCP)
    same = Ability("shm", {"host": "a", "user": "1", "extra": "x"})
    assert choose_transport([SHM, TCP], [TCP, same]) == (SHM, same)
    silent = Ability("shm", {"host": "a"})
    assert choose_transport([SHM], [silent]) == (SHM, silent), "a fact that one side does not state is not compared"


def test_the_reason_names_each_transport() -> None:
    with pytest.raises(TransportUnavailable) as caught:
        choose_transport([SHM, GLOO], [TCP, Ability("shm", {"host": "b", "user": "2"})])
    assert "shm: the two sides differ in host, user" in caught.value.message
    assert "gloo: the peer does not have it" in caught.value.message
    assert caught.value.hint == "the peer has shm, tcp; name one on both sides: TRANSPORT gloo or tcp"
    with pytest.raises(TransportUnavailable, match="this side has none"):
        choose_transport([], [TCP])


def test_where_facts_alone_keep_them_apart_no_name_is_proposed() -> None:
    with pytest.raises(TransportUnavailable) as caught:
        choose_transport([SHM], [Ability("shm", {"host": "b", "user": "1"})])
    assert caught.value.hint == "the peer has shm; allow another one on both sides"


@pytest.mark.parametrize("swapped", [False, True])
def test_what_one_side_uses_by_name_only_is_proposed_to_both(swapped: bool) -> None:
    sides = [SHM, TCP], [GLOO]
    with pytest.raises(TransportUnavailable, match="name one on both sides: TRANSPORT gloo or shm or tcp"):
        choose_transport(*(reversed(sides) if swapped else sides))


def test_a_name_listed_twice_counts_where_it_comes_first() -> None:
    first, second = Ability("tcp", {"x": "1"}), Ability("tcp", {"x": "2"})
    assert choose_transport([TCP], [first, second]) == (TCP, first)


def test_the_log_says_why_others_could_not_be_chosen_and_leaves_out_the_less_preferred() -> None:
    elsewhere = Ability("shm", {"host": "b", "user": "1"})
    rdma = Ability("rdma")
    ours, theirs = [SHM, rdma, TCP, GLOO], [Ability("other"), GLOO, TCP, elsewhere]
    assert why_not_chosen("tcp", ours, theirs, {"hccl": "there is no NPU here"}) == [
        "shm: the two sides differ in host",
        "rdma: the peer does not have it",
        "hccl: there is no NPU here",
        "other: not used on this side",
    ]
    assert why_not_chosen("tcp", [TCP], [TCP], {}) == []


@given(ours=abilities, theirs=abilities)
def test_the_choice_is_in_both_lists_or_there_is_none(ours: tuple[Ability, ...], theirs: tuple[Ability, ...]) -> None:
    def fits(a: Ability, b: Ability) -> bool:
        return a.name == b.name and all(b.facts.get(key, value) == value for key, value in a.facts.items())

    first = {ability.name: ability for ability in reversed(theirs)}
    possible = [a for a in ours if a.name in first and fits(a, first[a.name])]
    if possible:
        assert choose_transport(ours, theirs) == (possible[0], first[possible[0].name])
    else:
        with pytest.raises(TransportUnavailable) as caught:
            choose_transport(ours, theirs)
        assert caught.value.hint
