"""One example of every message with every field set, and of every message with as few as possible.

`golden.json` holds their frames as they were first sent. They never change, because a release that reads or writes
other bytes for them is not compatible with earlier releases. To add frames for a new message or field, run
`python -m tests.core.golden`, which only adds.
"""

from __future__ import annotations

import json
from pathlib import Path

from netloader.codecs.frames import encode_frame
from netloader.core import messages as m
from netloader.core.identity import ModelIdentity
from netloader.core.manifest import Manifest, TensorSpec

FILE = Path(__file__).with_name("golden.json")

NONCE = bytes(range(16))
PROOF = bytes(range(32))
ABILITIES = (m.Ability("shm", {"host": "h", "user": "0"}), m.Ability("tcp"))
IDENTITY = ModelIdentity(
    model="m",
    architecture="LlamaForCausalLM",
    revision="r",
    dtype="bfloat16",
    quantization="q",
    quantization_config="qc",
    layout="processed",
    role="draft",
    tp_size=4,
    tp_rank=3,
    pp_size=2,
    pp_rank=1,
    ep_size=2,
    ep_rank=1,
    expert_placement="e",
    tied=True,
    load_state={"has_own_lm_head": False},
    engine="vllm 0",
    fingerprint="f",
    load="l",
)
NAMED = ModelIdentity(model="/m", names={"MODEL": "m", "repository": "o/m@c"})
SET = ModelIdentity(settings={"a.b": "2"}, processed_settings={"c": "d"})
"""Fields that are newer than the frames of IDENTITY, which never change."""

MANIFEST = Manifest(
    (
        TensorSpec("w", "bfloat16", (4, 3), (1, 4)),
        TensorSpec("b", "float32", ()),
        TensorSpec("tied", "float32", (), alias_of="b"),
    )
)

FULL: tuple[m.ClientMessage | m.ServerMessage, ...] = (
    m.Hello(protocol=3, oldest=2, nonce=NONCE, abilities=ABILITIES, software="netloader 0"),
    m.Welcome(protocol=3, nonce=NONCE, proof=PROOF, abilities=ABILITIES, software="netloader 0"),
    m.Identify(
        identity=IDENTITY,
        role="draft",
        layouts=("raw", "checkpoint"),
        proof=PROOF,
        manifest="aa" * 32,
        root="bb" * 32,
        probe=True,
        node="ef" * 8,
        relay=19374,
        follow=True,
        avoid=("h:1",),
    ),
    m.Waiting(reason="busy", position=2),
    m.Accepted(identity=IDENTITY),
    m.Announce(
        manifest=MANIFEST,
        block_bytes=4096,
        algorithm="xxh3-128",
        digests=PROOF,
        root="cc" * 32,
        plan="dd" * 32,
        node="ef" * 8,
        chain=("ab" * 8,),
    ),
    m.Agree(plan="dd" * 32, transport="tcp"),
    m.ChannelOffer(transport="tcp", offer=b"offer"),
    m.Signal(data=b"signal"),
    m.Want(ranges=((0, 3), (5, 6))),
    m.Grant(ranges=((0, 1),)),
    m.Gone(ranges=((1, 3),), reason="freed", sources=("h:1",)),
    m.Upstream(chain=("ab" * 8, "cd" * 8)),
    m.Verdict(outcome="partial", blocks=7, nbytes=1 << 40),
    m.Refusal(code="busy", message="full", hint="later", retry_after=1.5, sources=("h:1", "[::1]:2")),
    m.Goodbye(code="timeout", reason="slow"),
)

FULL_2: tuple[m.ClientMessage | m.ServerMessage, ...] = (
    m.Hello(protocol=3, oldest=2, nonce=NONCE, abilities=ABILITIES, software="netloader 0", proves=True),
    m.Announce(
        manifest=MANIFEST,
        block_bytes=4096,
        algorithm="xxh3-128",
        digests=PROOF,
        root="cc" * 32,
        plan="dd" * 32,
        node="ef" * 8,
        chain=("ab" * 8,),
        metadata={"format": "pt"},
    ),
    m.Progress(has=((0, 3), (5, 6)), sent=((3, 5),)),
)
"""Those again that have more fields since protocol 2."""

LEAST: tuple[m.ClientMessage | m.ServerMessage, ...] = (
    m.Hello(protocol=1, nonce=NONCE),
    m.Welcome(protocol=1, nonce=NONCE),
    m.Identify(),
    m.Waiting(reason=""),
    m.Accepted(identity=ModelIdentity()),
    m.Announce(block_bytes=1024, algorithm="", digests=b"", root="", plan=""),
    m.Gone(ranges=(), reason=""),
    m.Upstream(),
    m.Progress(),
    m.Verdict(outcome="complete"),
    m.Refusal(code="version", message=""),
    m.Goodbye(),
)

EXAMPLES: dict[str, m.ClientMessage | m.ServerMessage] = {
    **{f"{type(message).__name__}, full": message for message in FULL},
    **{f"{type(message).__name__}, full since protocol 2": message for message in FULL_2},
    **{f"{type(message).__name__}, least": message for message in LEAST},
    "Identify, others": m.Identify(node="ef" * 8, relay=19374, others=True),
    "Announce, partial": m.Announce(
        block_bytes=1024, algorithm="", digests=b"", root="", plan="", node="ef" * 8, partial=True, shared=True
    ),
    "Accepted, names": m.Accepted(identity=NAMED),
    "Accepted, settings": m.Accepted(identity=SET),
    "Accepted, no names": m.Accepted(identity=ModelIdentity(model="/m", names={})),
}


def load() -> dict[str, bytes]:
    return {name: bytes.fromhex(text) for name, text in json.loads(FILE.read_text()).items()}


def _add_missing() -> None:
    known: dict[str, str] = json.loads(FILE.read_text()) if FILE.exists() else {}
    new = {name: encode_frame(message).hex() for name, message in EXAMPLES.items() if name not in known}
    FILE.write_text(json.dumps(known | new, indent=1) + "\n")
    print(f"{len(new)} added to {FILE}")


if __name__ == "__main__":
    _add_missing()
