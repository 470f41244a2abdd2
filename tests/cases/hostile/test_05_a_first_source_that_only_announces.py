"""A source that announces a root and delivers nothing does not decide which weights the others have to hold."""

from __future__ import annotations

import pytest

from netloader.core import messages as m
from netloader.core import pull_events as p
from netloader.core.report import PullReport
from netloader.errors import NoSourceLeft
from tests.core.pull_world import Source, World, announcement
from tests.core.test_pull import ONE, TWO, begun
from tests.drivers import kit
from tests.drivers.test_completion import HUB

WEIGHTS = kit.weights()
HOLDING = kit.held(WEIGHTS)
OTHER = kit.held(kit.weights(seed=1))


@pytest.mark.parametrize("adopts", [False, True])
@pytest.mark.parametrize("rogue", [Source(salt=b"other", mute=True), Source(salt=b"other", mute=True, only="plain")])
@pytest.mark.parametrize("stripe", [1, 2])
def test_honest_sources_that_were_refused_for_its_root_are_tried_again(
    rogue: Source, stripe: int, *, adopts: bool
) -> None:
    world = World(6, [rogue, Source(), Source()], [0, 1, 2], stripe=stripe, adopts=adopts)
    world.run()
    assert isinstance(world.outcome, p.Succeed)
    assert world.verified.total() == 6


def test_a_root_is_final_with_the_first_verified_block_and_a_required_one_from_the_start() -> None:
    known = announcement(3)
    pull, _ = begun(ONE, TWO, expect_root=known.root)
    pull.handle(p.HoldingAnnounced(1, known), 0.0)
    pull.handle(p.SessionEnded(1, NoSourceLeft([])), 1.0)
    assert pull.ledger.plan is None
    assert (pull.ledger.root, pull.ledger.pinned_by) == (known.root, "EXPECT_ROOT")


async def test_a_rogue_first_source_costs_its_session_and_not_the_pull() -> None:
    async def announces_others_and_leaves(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(HUB.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Accepted(identity=kit.IDENTITY), kit.announce(OTHER))
        await wire.hear_until(m.Agree)
        await wire.say(m.Refusal(code="transport", message="it can't be set up"))

    async def pulled(into: kit.Tensors | None) -> PullReport:
        async with (
            kit.fake_server(announces_others_and_leaves) as rogue,
            kit.serving(HUB.transport, HOLDING) as honest,
        ):
            return await kit.pull(into, [rogue.address, kit.at(honest)], HUB.transport, stripe=1)

    into = kit.blank(WEIGHTS)
    assert (await pulled(into)).root == HOLDING.announcement.root
    assert kit.contents(into) == kit.contents(WEIGHTS)
    assert (await pulled(None)).root == HOLDING.announcement.root
