"""No cycle of clients waits for itself, whoever joins and leaves whom in whatever order."""

from __future__ import annotations

from collections.abc import Hashable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from netloader.core.ledger import Ledger
from netloader.server.redirects import Redirects
from netloader.session.relay_progress import Supply

NODES = range(6)
nodes = st.sampled_from(NODES)


class Chains(RuleBasedStateMachine):
    """Replicas that join relays as sessions do: on what the relay says of its chain, and told of each change later.

    Changes of a chain travel as messages, in any order among different pairs: a join may rest on what was true before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.supplies = [Supply(Ledger()) for _ in NODES]
        self.parents: dict[tuple[int, int], tuple[str, ...]] = {}  # child, parent -> chain that the child knows
        self.on_the_way: list[tuple[int, int]] = []

    @initialize()
    def one_has_a_seed(self) -> None:
        self.joins_the_seed(0)

    @rule(child=nodes)
    def joins_the_seed(self, child: int) -> None:
        self._feeds(child, "seed", ())

    @rule(child=nodes)
    def loses_the_seed(self, child: int) -> None:
        self.supplies[child].ended("seed")
        self._tell(child)

    @rule(child=nodes, parent=nodes)
    def joins(self, child: int, parent: int) -> None:
        supply = self.supplies[parent]
        chain = (supply.node, *supply.chain)
        if not supply.live or self.supplies[child].node in chain or (child, parent) in self.parents:
            return
        self.parents[child, parent] = supply.chain
        self._feeds(child, parent, chain)

    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        if self.parents:
            self._leave(*data.draw(st.sampled_from(sorted(self.parents))))

    @rule(data=st.data())
    def news_arrive(self, data: st.DataObject) -> None:
        if self.on_the_way:
            self._hear(data.draw(st.integers(0, len(self.on_the_way) - 1)))

    def _feeds(self, child: int, session: Hashable, chain: tuple[str, ...]) -> None:
        before = self.supplies[child].chain
        self.supplies[child].feeds(session, chain)
        if self.supplies[child].chain != before:
            self._tell(child)

    def _tell(self, node: int) -> None:
        self.on_the_way += [pair for pair in self.parents if pair[1] == node and pair not in self.on_the_way]

    def _hear(self, place: int) -> None:
        child, parent = self.on_the_way.pop(place)
        if (child, parent) not in self.parents:
            return
        supply = self.supplies[parent]
        chain = (supply.node, *supply.chain)
        if self.supplies[child].node in chain:
            self._leave(child, parent)
            return
        self.parents[child, parent] = supply.chain
        self._feeds(child, parent, chain)

    def _leave(self, child: int, parent: int) -> None:
        del self.parents[child, parent]
        before = self.supplies[child].chain
        self.supplies[child].ended(parent)
        if self.supplies[child].chain != before:
            self._tell(child)

    @invariant()
    def nobody_follows_a_chain_that_it_knows_to_lead_back(self) -> None:
        for child, _ in self.parents:
            assert self.supplies[child].node not in self.supplies[child].chain

    def teardown(self) -> None:
        """When all news have arrived, there is no cycle."""
        for _ in range(10_000):
            if not self.on_the_way:
                break
            self._hear(0)
        else:
            raise AssertionError("the news never end")
        for start in NODES:
            seen: set[int] = set()
            todo = [parent for child, parent in self.parents if child == start]
            while todo:
                node = todo.pop()
                assert node != start, f"{start} waits for itself: {sorted(self.parents)}"
                if node not in seen:
                    seen.add(node)
                    todo += [parent for child, parent in self.parents if child == node]


TestChains = Chains.TestCase


def test_a_newcomer_is_sent_to_the_newest_relay_of_the_same_holding() -> None:
    relays = Redirects(fan_out=1)
    target, draft = object(), object()
    assert relays.relays_for(target, (), "10.0.0.9", "10.0.0.1") == ()
    relays.join("a", target, "10.0.0.2", 7000)
    relays.join("b", draft, "10.0.0.3", 7001)
    relays.join("c", target, "10.0.0.4", 7002)
    relays.join("d", target, "10.0.0.5", 0)  # does not pass anything on
    relays.join("e", target, "10.0.0.6", 7003)  # says so, and was not found there
    assert relays.undecided(target)
    assert relays.undecided(target, lambda session: session in ("a", "d", "e"))
    assert not relays.undecided(target, lambda session: session in ("b", "d"))  # nobody waits for one that does nothing
    for session in "abc":
        relays.confirm(session)
    assert not relays.undecided(target)
    assert relays.relays_for(target, (), "10.0.0.9", "10.0.0.1") == ("10.0.0.4:7002", "10.0.0.2:7000")
    assert relays.relays_for(target, ("10.0.0.4:7002",), "10.0.0.9", "10.0.0.1") == ("10.0.0.2:7000",)
    relays.leave("a")
    assert relays.relays_for(target, ("10.0.0.4:7002",), "10.0.0.9", "10.0.0.1") == ()
    relays.leave("c")
    assert relays.undecided(target)
    relays.deny("e")
    assert not relays.undecided(target)
    relays.confirm("e")  # it has been denied
    assert relays.relays_for(target, (), "10.0.0.9", "10.0.0.1") == ()


def test_a_relay_on_the_servers_own_host_is_named_by_the_address_that_others_can_reach() -> None:
    relays = Redirects(fan_out=1)
    holding = object()
    relays.join("a", holding, "127.0.0.1", 7000)
    relays.confirm("a")
    assert relays.relays_for(holding, (), "10.0.0.9", "10.0.0.1") == ("10.0.0.1:7000",)
    assert relays.relays_for(holding, (), "127.0.0.1", "127.0.0.1") == ("127.0.0.1:7000",)
    assert relays.relays_for(holding, (), "::1", "fd00::1") == ("127.0.0.1:7000",)
