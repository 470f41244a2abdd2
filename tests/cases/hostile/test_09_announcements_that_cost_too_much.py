"""A hostile announcement costs little: it is limited before it is decoded, compared or planned, and not on the loop."""

from __future__ import annotations

import pytest

from netloader.client.connect import _frame_cap
from netloader.codecs.frames import SERVER_FRAME_CAP, encode_frame, server_messages
from netloader.core import manifest as manifests
from netloader.core import messages as m
from netloader.core.manifest import MAX_SIZES, MAX_TENSORS, Manifest, TensorSpec, compare
from netloader.core.options import PullOptions
from netloader.core.protocol import ClientTerms, announcement
from netloader.core.protocol.announcement import examine
from netloader.core.protocol.effects import Examine
from netloader.errors import ManifestError, RemoteProtocolError
from netloader.session.off_loop import FEW_TENSORS, examined_quickly
from tests.core.pull_world import announcement as known_weights
from tests.drivers import kit
from tests.drivers.test_completion import HUB

DEEP = (1,) * 64


def announce(manifest: Manifest | None, digests: bytes = b"", block_bytes: int = 1024) -> m.Announce:
    return m.Announce(manifest=manifest, block_bytes=block_bytes, algorithm="x", digests=digests, root="00", plan="00")


def deep(count: int) -> Manifest:
    return Manifest(tuple(TensorSpec(f"t{number}", "uint8", DEEP, DEEP) for number in range(count)))


def test_more_sizes_and_strides_than_any_model_has_are_refused_while_the_frame_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert MAX_SIZES == 4 * MAX_TENSORS
    monkeypatch.setattr(manifests, "MAX_SIZES", 100_000)
    frame = encode_frame(announce(deep(9000)))
    with pytest.raises(RemoteProtocolError, match="more than 100000 sizes and strides"):
        server_messages().feed(frame)
    with pytest.raises(ManifestError, match="more than 100000 sizes and strides"):
        deep(9000).check()


def test_a_client_that_knows_its_tensors_accepts_no_frame_much_larger_than_their_announcement() -> None:
    ours = known_weights(3).manifest
    assert _frame_cap(ours) < 20 << 20
    assert _frame_cap(None) == SERVER_FRAME_CAP
    assert len(encode_frame(announce(ours, bytes(16 << 20)))) < _frame_cap(ours)
    with pytest.raises(RemoteProtocolError, match="at most"):
        server_messages(_frame_cap(ours)).feed((158 << 20).to_bytes(4, "big"))


def test_with_tensors_of_its_own_a_client_compares_and_checks_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "check", lambda self: pytest.fail("it is not ours, and was checked"))
    terms = ClientTerms(PullOptions(), manifest=known_weights(3).manifest, manifest_digest="ab")
    with pytest.raises(ManifestError, match="51 tensors differ"):
        examine(Examine(announce(deep(50)), terms, None, probing=False))


def test_of_any_number_of_differences_and_faults_some_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Manifest(tuple(TensorSpec(f"t{number}", "uint8", (4,)) for number in range(500)))
    found = compare(ours, deep(500))
    assert len(found) == 500
    assert len({mismatch.reason for mismatch in found[100:]}) == 1
    checked: list[str] = []
    problem = manifests._problem

    def counted(spec: TensorSpec, seen: dict[str, TensorSpec]) -> str:
        checked.append(spec.name)
        return problem(spec, seen)

    monkeypatch.setattr(manifests, "_problem", counted)
    with pytest.raises(ManifestError, match="at least 100 unusable tensors"):
        Manifest(tuple(TensorSpec(f"t{number}", "?", (4,)) for number in range(500))).check()
    assert len(checked) == 100


def test_blocks_that_do_not_fit_the_digests_are_refused_before_they_are_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(announcement, "make_plan", lambda *_: pytest.fail("it was planned"))
    million = Manifest((TensorSpec("w", "uint8", (1 << 30,)),))
    with pytest.raises(RemoteProtocolError, match="different blocks"):
        examine(Examine(announce(million, bytes(16 * 100)), ClientTerms(), None, probing=False))


def test_only_what_is_examined_within_milliseconds_is_examined_on_the_event_loop() -> None:
    assert examined_quickly(announce(known_weights(3).manifest, bytes(48)), None)
    assert examined_quickly(announce(None, bytes(48)), known_weights(3).manifest)
    assert not examined_quickly(announce(deep(FEW_TENSORS)), None)
    assert not examined_quickly(announce(deep(FEW_TENSORS + 1)), None)
    assert not examined_quickly(announce(known_weights(3).manifest, bytes(1 << 20)), None)


async def test_a_hostile_announcement_costs_its_source_and_not_the_pull(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "MAX_SIZES", 100_000)
    weights = kit.weights()

    async def announces_the_deep(wire: kit.Wire[m.ClientMessage]) -> None:
        await wire.hear_until(m.Hello)
        await wire.say(kit.welcome(HUB.transport))
        await wire.hear_until(m.Identify)
        await wire.say(m.Accepted(identity=kit.IDENTITY), announce(deep(3000)))
        await wire.closed()

    async with kit.fake_server(announces_the_deep) as fake, kit.serving(HUB.transport, kit.held(weights)) as server:
        into = kit.blank(weights)
        report = await kit.pull(into, [fake.address, kit.at(server)], HUB.transport)
    assert kit.contents(into) == kit.contents(weights)
    (attempt,) = report.attempts
    assert "more than 100000 sizes and strides" in attempt.message, "it was compared"
