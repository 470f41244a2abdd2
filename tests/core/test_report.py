"""What a report says of a pull in one line."""

from __future__ import annotations

import pytest

from netloader.core.identity import ModelIdentity
from netloader.core.report import PullReport, SourceShare, summary
from netloader.core.texts import LINE
from netloader.errors import AttemptFailed, PeerLost, RefusedError


def report(**changes: object) -> PullReport:
    made = PullReport(root="ab" * 16, nbytes=404_000_000, blocks=97, tensors=39, seconds=1.5, transfer_seconds=1.0)
    made.identity = ModelIdentity(model="me/tiny")
    made.sources = {"10.0.0.7:19374": SourceShare(97, 404_000_000, "tcp")}
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_summary_says_what_how_much_how_fast_and_from_whom() -> None:
    expected = "pulled 404 MB of me/tiny (target, 39 tensors) in 1.50 s (404 MB/s) from 10.0.0.7:19374 over tcp"
    assert summary(report()) == expected
    assert report().lines()[0] == expected


@pytest.mark.parametrize(
    ("names", "name"),
    [
        ({"served": "tiny"}, "tiny"),
        ({"served": "tiny", "repository": "me/tiny@abc"}, "me/tiny@abc"),
        ({"served": "tiny", "MODEL": "mine"}, "mine"),
        ({}, "/models/a"),
        (None, "/models/a"),
    ],
)
def test_a_summary_has_the_name_of_the_model_and_a_path_only_without_one(
    names: dict[str, str] | None, name: str
) -> None:
    identity = ModelIdentity(model="/models/a", names=names)
    assert f" of {name} (target, " in summary(report(identity=identity))


def test_waiting_is_apart_from_the_rate() -> None:
    text = summary(report(seconds=94.55, waited=77.6, transfer_seconds=16.9))
    assert "in 94.55 s (23.9 MB/s, transfer 16.90 s, waited 77.60 s) from" in text


def test_skipped_sources_and_those_tried_again_are_named_with_the_reason() -> None:
    attempts = (
        AttemptFailed("10.0.0.8:19374", PeerLost("10.0.0.8:19374 cannot be reached: refused", hint="start it"), 2),
        AttemptFailed("10.0.0.7:19374", RefusedError("not-ready", "the model is loading"), 12),
    )
    text = summary(report(attempts=attempts))
    assert text.endswith(
        " from 10.0.0.7:19374 over tcp (tried again: the model is loading, 12 times)"
        "; skipped 10.0.0.8:19374 (cannot be reached: refused, 2 times)"
    )
    assert text.count("10.0.0.7") == text.count("10.0.0.8") == 1


def test_the_blocks_of_each_source_are_counted_where_several_gave_some() -> None:
    shares = {"10.0.0.7:19374": SourceShare(96, 403_000_000, "tcp"), "10.0.0.8:19374": SourceShare(1, 10, "shm")}
    assert summary(report(sources=shares)).endswith(
        " from 10.0.0.7:19374 over tcp (96 blocks), 10.0.0.8:19374 over shm (1 block)"
    )


def test_a_summary_is_one_line_of_bounded_length() -> None:
    attempts = tuple(AttemptFailed(f"10.0.{n}.8:19374", PeerLost(f"\x1b[2J\n{'x' * 10_000}")) for n in range(50))
    shares = {f"10.1.{n}.1:19374": SourceShare(1, 10, "tcp") for n in range(50)}
    text = summary(report(attempts=attempts, sources=shares, identity=ModelIdentity(model="m" * 10_000)))
    assert text.isprintable()
    assert len(text) < 500
    assert "over tcp (1 block) and 49 more; skipped" in text
    assert text.endswith(" and 49 more")
    assert len(summary(report(attempts=attempts, sources=shares))) <= LINE + 20


def test_a_report_without_times_of_transfer_has_the_rate_of_the_whole_pull() -> None:
    assert report(transfer_seconds=0.0, seconds=2.0).rate == 202_000_000
    assert PullReport().rate == 0
