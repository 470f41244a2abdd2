"""Hypothesis strategies for the core: manifests, identities, ranges, and every control message."""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from netloader.core import messages as m
from netloader.core.identity import MODEL, REPOSITORY, SERVED, Layout, ModelIdentity, Role
from netloader.core.manifest import ITEM_BYTES, MAX_NAME, Manifest, TensorSpec
from netloader.core.plan import Ranges, to_ranges

# Names as in checkpoints, and unusual names.
names = st.from_regex(r"[a-z]{1,6}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24
)
dtypes = st.sampled_from(sorted(ITEM_BYTES))
shapes = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 16, 63]) | st.integers(0, 4000), max_size=3).map(tuple)


@st.composite
def dense_strides(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a permutation of dimensions: dense, seldom row-major."""
    order = draw(st.permutations(range(len(shape))))
    stride, step = [0] * len(shape), 1
    for dim in order:
        stride[dim] = step
        step *= max(shape[dim], 1)
    return tuple(stride)


@st.composite
def manifests(draw: st.DrawFn, max_tensors: int = 12, max_bytes: int = 1 << 20) -> Manifest:
    """Manifests that pass `check`: all dtypes, 0-dim, empty, transposed and tied; at most `max_bytes` each."""
    specs: list[TensorSpec] = []
    for name in draw(st.lists(names, max_size=max_tensors, unique=True)):
        owners = [spec for spec in specs if not spec.alias_of]
        tied = draw(st.booleans())
        if owners and tied:
            owner = draw(st.sampled_from(owners))
            specs.append(TensorSpec(name, owner.dtype, owner.shape, owner.stride, owner.format, alias_of=owner.name))
            continue
        dtype, shape = draw(dtypes), draw(shapes)
        spec = TensorSpec(name, dtype, shape)
        if spec.nbytes > max_bytes:
            spec = TensorSpec(name, dtype, (max_bytes // ITEM_BYTES[dtype],))
        if draw(st.integers(0, 3)) == 0:
            spec = TensorSpec(name, dtype, spec.shape, draw(dense_strides(spec.shape)))
        specs.append(spec)
    return Manifest(tuple(specs))


short_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
hexes = st.text("0123456789abcdef", max_size=64)
layouts = st.sampled_from(get_args(Layout))
roles = st.sampled_from(get_args(Role))
codes = st.sampled_from(get_args(m.RefusalCode))
nonces = st.binary(min_size=m.NONCE_BYTES, max_size=m.NONCE_BYTES)
sources = st.lists(short_text, max_size=3).map(tuple)

settings = st.none() | st.dictionaries(st.sampled_from(["a.b", "a.c", "d"]), short_text, max_size=3)
identities = st.builds(
    ModelIdentity,
    model=short_text,
    architecture=short_text,
    revision=short_text,
    dtype=short_text,
    quantization=short_text,
    quantization_config=short_text,
    layout=layouts,
    role=roles,
    tp_size=st.integers(1, 8),
    tp_rank=st.integers(0, 7),
    pp_size=st.integers(1, 8),
    pp_rank=st.integers(0, 7),
    ep_size=st.integers(1, 8),
    ep_rank=st.integers(0, 7),
    expert_placement=short_text,
    tied=st.none() | st.booleans(),
    load_state=st.dictionaries(short_text, st.booleans(), max_size=2),
    engine=short_text,
    fingerprint=short_text,
    load=short_text,
    names=st.none() | st.dictionaries(st.sampled_from([MODEL, SERVED, REPOSITORY, "other"]), short_text, max_size=4),
    settings=settings,
    processed_settings=settings,
)


def ranges(blocks: int = 1 << 20, min_size: int = 0) -> st.SearchStrategy[Ranges]:
    """Ascending, disjoint ranges of blocks below `blocks`."""
    return st.sets(st.integers(0, blocks - 1), min_size=min_size, max_size=8).map(to_ranges)


wire_ranges = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 1 << 20)), max_size=5).map(tuple)
abilities = st.lists(
    st.builds(m.Ability, name=short_text, facts=st.dictionaries(short_text, short_text, max_size=2)), max_size=3
).map(tuple)
blobs = st.binary(max_size=40)

message_strategies: dict[type, st.SearchStrategy[m.ClientMessage | m.ServerMessage]] = {
    m.Hello: st.builds(
        m.Hello,
        protocol=st.integers(1, 9),
        oldest=st.integers(1, 9),
        nonce=nonces,
        abilities=abilities,
        software=short_text,
    ),
    m.Welcome: st.builds(
        m.Welcome,
        protocol=st.integers(1, 9),
        nonce=nonces,
        proof=st.binary(max_size=32),
        abilities=abilities,
        software=short_text,
    ),
    m.Identify: st.builds(
        m.Identify,
        identity=st.none() | identities,
        role=roles,
        layouts=st.lists(layouts, max_size=3).map(tuple),
        proof=st.binary(max_size=32),
        manifest=hexes,
        root=hexes,
        probe=st.booleans(),
        node=hexes,
        relay=st.integers(0, 65535),
        follow=st.booleans(),
        avoid=sources,
        others=st.booleans(),
    ),
    m.Waiting: st.builds(m.Waiting, reason=short_text, position=st.integers(0, 1 << 40)),
    m.Accepted: st.builds(m.Accepted, identity=identities),
    m.Announce: st.builds(
        m.Announce,
        manifest=st.none() | manifests(max_tensors=4),
        block_bytes=st.integers(1024, 1 << 30),
        algorithm=short_text,
        digests=blobs,
        root=hexes,
        plan=hexes,
        node=hexes,
        chain=st.lists(hexes, max_size=4).map(tuple),
        metadata=st.none() | st.dictionaries(short_text, short_text, max_size=4),
        partial=st.booleans(),
        shared=st.booleans(),
    ),
    m.Agree: st.builds(m.Agree, plan=hexes, transport=short_text),
    m.ChannelOffer: st.builds(m.ChannelOffer, transport=short_text, offer=blobs),
    m.Signal: st.builds(m.Signal, data=blobs),
    m.Want: st.builds(m.Want, ranges=wire_ranges),
    m.Grant: st.builds(m.Grant, ranges=wire_ranges),
    m.Gone: st.builds(m.Gone, ranges=wire_ranges, reason=short_text, sources=sources),
    m.Upstream: st.builds(m.Upstream, chain=st.lists(hexes, max_size=4).map(tuple)),
    m.Progress: st.builds(m.Progress, has=wire_ranges, sent=wire_ranges),
    m.Verdict: st.builds(
        m.Verdict,
        outcome=st.sampled_from(get_args(m.Outcome)),
        blocks=st.integers(0, 1 << 40),
        nbytes=st.integers(0, 1 << 60),
    ),
    m.Refusal: st.builds(
        m.Refusal,
        code=codes,
        message=short_text,
        hint=short_text,
        retry_after=st.none() | st.floats(0, 86400),
        sources=sources,
    ),
    m.Goodbye: st.builds(m.Goodbye, code=st.just("done") | codes, reason=short_text),
}
"""One strategy for each message; a test checks that none is missing."""

client_messages = st.one_of(*(message_strategies[kind] for kind in get_args(m.ClientMessage)))
server_messages = st.one_of(*(message_strategies[kind] for kind in get_args(m.ServerMessage)))
any_message = st.one_of(*message_strategies.values())

LONG_NAME = "n" * MAX_NAME
