"""Metadata of safetensors files: kept, announced, compared, named, and written again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from netloader.checkpoint import open_checkpoint
from netloader.cli import main
from netloader.core import messages as m
from netloader.core import pull_events as p
from netloader.core.identity import ModelIdentity
from netloader.core.options import PullOptions
from netloader.core.protocol.announcement import examine
from netloader.core.protocol.context import ClientTerms
from netloader.core.protocol.effects import Examine
from netloader.core.pull_state import FirstFiles
from netloader.errors import CheckpointError, PeerLost, RemoteProtocolError, VerificationError
from netloader.tensors import hold
from tests.cases.files import metadata_of, save, served, tensors
from tests.commands import serving
from tests.core.pull_world import announcement
from tests.core.test_pull import ONE, TWO, begun

TORCHAO = {"format": "mlx", "tensor_names": '["a"]', "a": '{"_type": "Int8Tensor"}'}


def test_a_pulled_copy_has_the_metadata_of_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original = save(tmp_path / "m", "model.safetensors", tensors("a", "b"), TORCHAO)
    with serving(tmp_path / "m") as server:
        assert main(["pull", server.address, "-o", str(tmp_path / "copy")]) == 0
        said = capsys.readouterr().out
        assert "metadata: 3 entries (a, format, tensor_names)\n" in said
        assert main(["probe", server.address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["metadata"] == TORCHAO
        assert main(["probe", server.address, "--against", str(tmp_path / "copy")]) == 0
        capsys.readouterr()
        save(tmp_path / "other", "model.safetensors", tensors("a", "b"), {"format": "pt"})
        assert main(["probe", server.address, "--against", str(tmp_path / "other")]) == 3
        assert "metadata 'format': 'pt' here, 'mlx' at the source" in capsys.readouterr().out
    assert metadata_of(tmp_path / "copy" / "model.safetensors") == metadata_of(original) == TORCHAO


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_copy_of_a_file_with_little_metadata_is_no_other_file(
    metadata: dict[str, str] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "m", "model.safetensors", tensors("a"), metadata)
    with serving(tmp_path / "m") as server:
        assert main(["pull", server.address, "-o", str(tmp_path / "copy")]) == 0
    assert open_checkpoint(tmp_path / "copy").metadata == open_checkpoint(tmp_path / "m").metadata == (metadata or {})
    capsys.readouterr()


def test_tensors_that_come_from_no_file_get_the_usual_metadata_and_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tensors("a")) as address:
        assert main(["pull", address, "-o", str(tmp_path)]) == 0
    assert "metadata: not stated by the source, `format: pt` was written" in capsys.readouterr().out
    assert metadata_of(tmp_path / "model.safetensors") == {"format": "pt"}


def test_entries_of_several_files_are_merged_and_those_that_differ_are_left_out_and_said(tmp_path: Path) -> None:
    save(tmp_path, "model-00001-of-00002.safetensors", tensors("a"), {"format": "pt", "part": "1", "only": "here"})
    save(tmp_path, "model-00002-of-00002.safetensors", tensors("b"), {"format": "pt", "part": "2"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.metadata == {"format": "pt", "only": "here"}
    assert checkpoint.left_out == ("metadata part: the files have different values for it",)


def with_metadata(metadata: dict[str, str] | None) -> Any:
    return replace(announcement(3), metadata=metadata)


def test_sources_of_one_pull_have_to_state_the_same_metadata() -> None:
    pull, _ = begun(ONE, TWO, stripe=2)
    commands = pull.handle(p.HoldingAnnounced(1, with_metadata({"format": "mlx"})), 0.0)
    assert isinstance(commands[0], p.Accept)
    (reject,) = pull.handle(p.HoldingAnnounced(2, with_metadata({"format": "pt"})), 0.1)
    assert isinstance(reject, p.Reject)
    assert isinstance(reject.error, VerificationError)
    assert "'format' is 'pt', and 'mlx' at the first source" in str(reject.error)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"format": "mlx"}, None, "does not state the metadata of its files"),
        (None, {"format": "mlx"}, "the first source does not: none is kept"),
    ],
)
def test_a_source_that_does_not_state_it_is_accepted_with_a_note(
    first: dict[str, str] | None, second: dict[str, str] | None, words: str
) -> None:
    pull, _ = begun(ONE, TWO, stripe=2)
    pull.handle(p.HoldingAnnounced(1, with_metadata(first)), 0.0)
    accept, note = pull.handle(p.HoldingAnnounced(2, with_metadata(second)), 0.1)
    assert isinstance(accept, p.Accept)
    assert isinstance(note, p.Log)
    assert words in note.text


def test_memory_that_was_made_with_the_metadata_of_a_lost_source_is_made_again_with_that_of_the_next() -> None:
    pull, _ = begun(ONE, TWO, adopts=True)
    pull.handle(p.SessionQueued(1), 0.0)
    (allocate,) = pull.handle(p.HoldingAnnounced(1, with_metadata({"format": "mlx"})), 0.1)
    assert isinstance(allocate, p.Allocate)
    assert allocate.metadata == {"format": "mlx"}
    pull.handle(p.HoldingAnnounced(2, with_metadata({"format": "pt"})), 0.2)
    pull.handle(p.SessionEnded(1, PeerLost("gone")), 0.3)
    freed, again = pull.handle(p.MemoryAllocated(1), 0.4)
    assert (freed, again) == (p.FreeMemory(), p.Allocate(2, allocate.manifest, {"format": "pt"}))
    assert isinstance(pull.handle(p.MemoryAllocated(2), 0.5)[0], p.Accept)


def test_the_first_difference_is_named_also_where_an_entry_is_missing() -> None:
    files = FirstFiles()
    assert files.compare({"a": "1", "b": "2"}) == ()
    with pytest.raises(VerificationError, match="'b' is missing, and '2' at the first source"):
        files.compare({"a": "1"})


def test_an_empty_metadata_is_a_statement_on_the_wire_and_a_missing_one_is_not() -> None:
    def sent(metadata: dict[str, str] | None) -> dict[str, object]:
        message = m.Announce(block_bytes=1024, algorithm="x", digests=b"", root="", plan="", metadata=metadata)
        found: dict[str, object] = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        return found

    assert sent({})["metadata"] == {}
    assert "metadata" not in sent(None)


def test_a_source_that_announces_too_much_is_refused() -> None:
    held = hold(tensors("a"), ModelIdentity(), metadata={"a": "x" * m.MAX_METADATA_BYTES}).announcement
    announce = m.Announce(
        manifest=held.manifest,
        block_bytes=held.plan.block_bytes,
        algorithm=held.algorithm,
        digests=held.digests,
        root=held.root,
        plan=held.plan.digest,
        metadata=dict(held.metadata or {}),
    )
    question = Examine(announce, ClientTerms(PullOptions()), None, probing=False)
    with pytest.raises(RemoteProtocolError, match="bytes of metadata"):
        examine(question)


def test_files_with_too_much_metadata_are_not_served(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", tensors("a"), {"a": "x" * (m.MAX_METADATA_BYTES + 1)})
    with pytest.raises(CheckpointError, match="the metadata of the files has 1 entries"):
        open_checkpoint(tmp_path)
