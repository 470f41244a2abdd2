"""Names of models: which of them are compared, and what decides if no name is equal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import netloader
from netloader.checkpoint import fingerprint_of
from netloader.core.identity import ModelIdentity, Severity, differences
from netloader.vllm.model.identity import names_of

COMMIT, LATER = "a" * 40, "b" * 40


def identity(names: dict[str, str] | None, model: str = "/m/x", fingerprint: str = "") -> ModelIdentity:
    return ModelIdentity(model=model, names=names, fingerprint=fingerprint)


def verdict(ours: ModelIdentity, theirs: ModelIdentity, *, same_root: bool = False) -> Severity | None:
    (forward, backward) = (
        {d.field: d.severity for d in differences(one, other, same_root=same_root)}
        for one, other in ((ours, theirs), (theirs, ours))
    )
    assert forward == backward, "both sides reach the same verdict"
    assert forward.keys() <= {"model", "fingerprint"}
    if forward.get("fingerprint"):
        return Severity.REFUSE
    return forward.get("model")


M, S, R = "MODEL", "served", "repository"

EQUAL: list[tuple[dict[str, str], dict[str, str]]] = [
    ({M: "a"}, {M: "a"}),
    ({M: "a", S: "x", R: "o/x"}, {M: "a", S: "y", R: "o/y"}),  # MODEL is what the user says to netloader
    ({M: "a"}, {S: "a"}),
    ({M: "o/a"}, {R: f"o/a@{COMMIT}"}),
    ({S: "a"}, {S: "a"}),
    ({R: f"o/a@{COMMIT}"}, {R: f"o/a@{COMMIT}"}),
    ({R: f"o/a@{COMMIT}"}, {R: "o/a"}),
    ({R: "o/a", S: "for-one-team"}, {R: "o/a", S: "for-another"}),
]

NOT_EQUAL: list[tuple[dict[str, str], dict[str, str]]] = [
    ({}, {}),
    ({}, {S: "a"}),
    ({}, {M: "a", S: "b", R: "o/c"}),
    ({M: ""}, {M: ""}),
    ({M: ""}, {}),
    ({S: "", R: ""}, {S: "", R: ""}),
    ({M: "b", S: "a"}, {S: "a"}),
    ({S: "a"}, {S: "b"}),
    ({M: "a"}, {S: "b"}),
    ({S: "o/a"}, {R: "o/a"}),  # `--served-model-name` is a name if both sides were given it
]

OTHERS: list[tuple[dict[str, str], dict[str, str]]] = [
    ({R: "@c"}, {R: "@c"}),
    ({R: "o/a"}, {R: "o/b"}),
    ({R: f"o/a@{COMMIT}"}, {R: f"o/a@{LATER}"}),
    ({S: "llm", R: "o/a"}, {S: "llm", R: "o/b"}),  # one name for the users of another model
    ({S: "llm", R: f"o/a@{COMMIT}"}, {S: "llm", R: f"o/a@{LATER}"}),
    ({M: "llm", R: "o/a"}, {S: "llm", R: "o/b"}),
]


@pytest.mark.parametrize(("ours", "theirs"), EQUAL)
def test_an_equal_name_is_accepted_whatever_the_paths_are(ours: dict[str, str], theirs: dict[str, str]) -> None:
    assert verdict(identity(ours, "/m/tiny"), identity(theirs, "/m/bare")) is None


@pytest.mark.parametrize(("ours", "theirs"), NOT_EQUAL)
def test_without_an_equal_name_both_fingerprints_must_be_known_and_equal(
    ours: dict[str, str], theirs: dict[str, str]
) -> None:
    def sides(one: str, other: str) -> tuple[ModelIdentity, ModelIdentity]:
        return identity(ours, fingerprint=one), identity(theirs, fingerprint=other)

    assert verdict(*sides("", "")) is Severity.REFUSE, "also if both sides have one path"
    assert verdict(*sides("f", "")) is Severity.REFUSE
    assert verdict(*sides("f", "g")) is Severity.REFUSE
    assert verdict(*sides("f", "f")) is Severity.WARN


@pytest.mark.parametrize(("ours", "theirs"), OTHERS)
def test_two_repositories_or_commits_are_not_one_model_because_samples_of_their_files_are_equal(
    ours: dict[str, str], theirs: dict[str, str]
) -> None:
    assert verdict(identity(ours, fingerprint="f"), identity(theirs, fingerprint="f")) is Severity.REFUSE


def test_one_row_of_a_large_tensor_is_missed_by_the_fingerprint(tmp_path: Path) -> None:
    """What the rule above is for: a release that only changes a few embeddings."""
    weights = {"embed": torch.zeros(40_000, 64), "head": torch.zeros(40_000, 64)}
    prints = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        prints.add(fingerprint_of(tmp_path / name))
        weights["embed"][39_000] += 1
    assert len(prints) == 1


@pytest.mark.parametrize("names", [{S: "a"}, {R: "o/a"}])
@pytest.mark.parametrize(("ours", "theirs"), [("v2", ""), ("", "v2"), ("v1", "v2")])
def test_a_revision_of_one_side_is_another_model_unless_the_commit_is_known(
    names: dict[str, str], ours: str, theirs: str
) -> None:
    """Without files of one side, nothing shows which commit the other side calls so."""

    def severity(names: dict[str, str]) -> Severity | None:
        sides = (ModelIdentity(names=names, revision=revision) for revision in (ours, theirs))
        return {d.field: d.severity for d in differences(*sides)}.get("model")

    assert severity(names) is Severity.REFUSE
    assert severity({R: f"o/a@{COMMIT}"}) is None
    assert severity({M: "a"}) is None


@pytest.mark.parametrize(("ours", "theirs"), [*NOT_EQUAL, *OTHERS])
def test_one_root_shows_more_than_names(ours: dict[str, str], theirs: dict[str, str]) -> None:
    assert verdict(identity(ours), identity(theirs), same_root=True) is Severity.WARN


def test_two_values_of_model_are_refused_whatever_else_is_equal() -> None:
    ours, theirs = (identity({M: name, S: "s", R: "o/r"}, fingerprint="f") for name in ("a", "b"))
    assert verdict(ours, theirs, same_root=True) is Severity.REFUSE


@pytest.mark.parametrize(("ours", "theirs"), EQUAL)
def test_an_equal_name_does_not_outweigh_other_weights(ours: dict[str, str], theirs: dict[str, str]) -> None:
    assert verdict(identity(ours, fingerprint="f"), identity(theirs, fingerprint="g")) is Severity.REFUSE


@pytest.mark.parametrize("names", [{}, {S: "a"}])
def test_a_path_is_no_name_for_a_peer_that_states_no_names_either(names: dict[str, str]) -> None:
    assert verdict(identity(names, "/m/x"), identity(None, "/m/x")) is Severity.REFUSE
    assert verdict(identity(names, "/m/x", "f"), identity(None, "/m/x")) is Severity.REFUSE
    assert verdict(identity(names, "/m/x", "f"), identity(None, "/m/x", "f")) is Severity.WARN
    assert verdict(identity(names, "/m/x"), identity(None, "/m/x"), same_root=True) is Severity.WARN


@pytest.mark.parametrize("names", [None, {M: "a"}, {S: "/m/x", R: "o/x"}])
def test_a_peer_that_states_no_names_is_compared_by_its_text(names: dict[str, str] | None) -> None:
    """A peer of protocol 1, or a program that uses the library. An absent field states nothing."""
    assert verdict(identity(names, "/m/x"), identity(None, "/m/x")) is None
    assert verdict(identity(names, "/m/x", "f"), identity(None, "/m/y", "f"), same_root=True) is Severity.REFUSE


_few = st.sampled_from(["", "a", "b", "o/a", f"o/a@{COMMIT}", f"o/a@{LATER}"])
_identities = st.builds(
    ModelIdentity,
    model=st.sampled_from(["/m/x", "/m/y"]),
    names=st.none() | st.dictionaries(st.sampled_from([M, S, R, "of a later release"]), _few),
    fingerprint=st.sampled_from(["", "f", "g"]),
)


@given(ours=_identities, theirs=_identities, same_root=st.booleans())
def test_both_sides_reach_the_same_verdict_and_never_accept_without_a_reason(
    ours: ModelIdentity, theirs: ModelIdentity, same_root: bool
) -> None:
    found = verdict(ours, theirs, same_root=same_root)
    proven = bool(ours.fingerprint) and ours.fingerprint == theirs.fingerprint
    shared = ({n.partition("@")[0] for n in (i.names or {}).values()} for i in (ours, theirs))
    if found is not Severity.REFUSE:
        assert (
            proven
            or same_root
            or set.intersection(*shared) - {""}
            or (None in (ours.names, theirs.names) and ours.model == theirs.model)
        )
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(theirs), type=ModelIdentity)
    assert verdict(ours, decoded, same_root=same_root) is found, "and the wire changes nothing"


def test_a_refusal_says_where_each_name_came_from() -> None:
    ours = identity({S: "b", R: f"o/c@{COMMIT}"})
    (found,) = differences(ours, identity({}, "/m/bare"))
    assert (found.ours, found.our_origin) == (f"o/c@{COMMIT}", "repository")
    assert (found.theirs, found.their_origin) == ("/m/bare", "path, which is no name")
    (found,) = differences(ours, identity({S: "c"}))
    assert (found.ours, found.theirs) == ("b", "c"), "names of one origin, if both sides have one"
    assert str(found) == ("model: ours is 'b', theirs is 'c' (from --served-model-name and --served-model-name)")


def config(model: str, served: str | None = None, **more: Any) -> Any:
    return SimpleNamespace(model=model, served_model_name=served or model, revision=None, model_weights="", **more)


def names(model_config: Any, given: str | None = None) -> dict[str, str]:
    return names_of(model_config, given=given, served=model_config.served_model_name)


def test_a_path_is_no_name(tmp_path: Path) -> None:
    assert names(config(str(tmp_path))) == {}
    assert names(config(str(tmp_path / "absent"))) == {}
    assert names(config("s3://bucket/m")) == {}


def test_served_model_name_counts_if_it_was_given(tmp_path: Path) -> None:
    assert names(config(str(tmp_path), "tiny")) == {S: "tiny"}
    assert names(config(str(tmp_path), f"{tmp_path}/")) == {}, "a path that is served under itself stays a path"


def test_both_fields_are_kept_apart(tmp_path: Path) -> None:
    assert names(config(str(tmp_path), "tiny"), "llama") == {M: "llama", S: "tiny"}


def test_slashes_at_the_end_are_dropped(tmp_path: Path) -> None:
    assert names(config(str(tmp_path), "org/tiny/"), "llama/") == {M: "llama", S: "org/tiny"}


def snapshot(home: Path, repository: str = "models--org--tiny", commit: str = COMMIT) -> Path:
    folder = home / repository / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def test_the_repository_id_is_found_again_in_two_different_caches(tmp_path: Path) -> None:
    found = [names(config(str(snapshot(tmp_path / home)))) for home in ("one", "two")]
    assert found == [{R: f"org/tiny@{COMMIT}"}] * 2


def test_a_link_to_a_snapshot_is_that_snapshot_and_a_part_of_one_is_not(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    assert names(config(f"{tmp_path}/link/")) == {R: f"org/tiny@{COMMIT}"}
    (folder / "fp8").mkdir()
    assert names(config(str(folder / "fp8"))) == {}


def test_an_id_that_is_not_in_the_cache_is_a_name_as_it_is() -> None:
    assert names(config("netloader-tests/is-in-no-cache")) == {R: "netloader-tests/is-in-no-cache"}


def test_weights_of_an_object_store_are_named_by_their_url(tmp_path: Path) -> None:
    pulled = config(str(tmp_path), "s3://bucket/m")
    pulled.model_weights = "s3://bucket/m/"
    assert names(pulled) == {R: "s3://bucket/m"}
    pulled.model_weights = "s3://user:secret@bucket/m"
    assert names(pulled) == {}


PATH_ONLY = ModelIdentity(model="/m/bare", names={})
NAMED = ModelIdentity(model="/m/tiny", names={S: "tiny"})


async def pulled(ours: ModelIdentity, theirs: ModelIdentity, *, expect: bool) -> netloader.PullReport:
    weights, empty = {"w": torch.arange(64.0)}, {"w": torch.zeros(64)}
    async with netloader.Server(weights, theirs, host="127.0.0.1", transport="tcp") as server:
        (held,) = server.holdings.held()
        root = held.announcement.root if expect else None
        report = await netloader.pull(
            empty, ours, sources=[str(server.address)], transport="tcp", expect_root=root, timeout=20
        )
    assert torch.equal(empty["w"], weights["w"])
    return report


async def test_a_client_without_a_name_is_refused_with_the_settings_that_help() -> None:
    with pytest.raises(netloader.NoSourceLeft) as caught:
        await pulled(PATH_ONLY, NAMED, expect=False)
    text = str(caught.value)
    assert "model is 'tiny' at the server and '/m/bare' at the client" in text
    assert "the server has its name from its --served-model-name, the client from its path, which is no name" in text
    assert "set MODEL to one name on both sides, or leave it out and set EXPECT_ROOT on the client" in text


async def test_a_draft_without_a_name_is_refused_with_its_own_setting() -> None:
    ours, theirs = (msgspec.structs.replace(i, role="draft") for i in (PATH_ONLY, NAMED))
    with pytest.raises(netloader.NoSourceLeft, match="set DRAFT_MODEL to one name on both sides"):
        await pulled(ours, theirs, expect=False)


async def test_expect_root_is_enough_where_a_name_is_missing() -> None:
    assert (await pulled(PATH_ONLY, NAMED, expect=True)).nbytes == 256
    with pytest.raises(netloader.NoSourceLeft, match="the identities differ: model is 'b"):
        await pulled(identity({M: "a"}), identity({M: "b"}), expect=True)


async def test_a_pull_by_an_equal_name_from_another_path() -> None:
    assert (await pulled(identity({S: "tiny"}, "/m/bare"), NAMED, expect=False)).nbytes == 256
