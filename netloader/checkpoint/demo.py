"""A generated checkpoint for demonstrations and benchmarks: the shapes of a Llama model, with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from netloader.checkpoint.writing import Entry, write_entries
from netloader.errors import CheckpointError

__all__ = ["make_demo_checkpoint"]

_ITEM = 2
_SMALLEST = 1 << 20
_SMALL_MODEL = 64 << 20
_LARGE_MODEL = 4 << 30


@dataclass(frozen=True, slots=True)
class _Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


def make_demo_checkpoint(folder: Path | str, nbytes: int, seed: int = 0) -> list[Path]:
    """Write a checkpoint with the names and proportions of a Llama in bfloat16, and its ``config.json``.

    Args:
        folder: Created when it does not exist; must hold no weight files.
        nbytes: Bytes of weights, at least 1 MiB. The result differs by less than one row of the embeddings.
        seed: Equal seeds give equal bytes on every machine.

    Returns:
        The files written.

    Raises:
        CheckpointError: `nbytes` is too small, there are weight files already, or a file can't be written.
    """
    if nbytes < _SMALLEST:
        raise CheckpointError(f"a demo checkpoint has at least {_SMALLEST} bytes, not {nbytes}")
    folder = Path(folder)
    shape = _shape_for(nbytes)
    entries = [
        Entry(name, "bfloat16", sizes, math.prod(sizes) * _ITEM, partial(_random, math.prod(sizes), seed, index))
        for index, (name, sizes) in enumerate(_tensors(shape))
    ]
    written = write_entries(entries, folder, {"format": "pt"}, {}, overwrite=False)
    config = folder / "config.json"
    try:
        config.write_bytes(_config(shape))
    except OSError as error:
        raise CheckpointError(f"{config} cannot be written: {error}", hint="choose another folder") from error
    return [*written, config]


def _shape_for(nbytes: int) -> _Shape:
    layers = 4 if nbytes < _SMALL_MODEL else 16 if nbytes < _LARGE_MODEL else 32
    head = 16 if nbytes < _SMALL_MODEL else 64
    # Four fifths of the bytes are in the layers, whose matrices have 10.75 hidden**2 elements each, and the rest in the
    # embeddings. Four heads share one key and value head, so the hidden size is a multiple of four heads.
    hidden = max(1, int(math.sqrt(nbytes * 0.8 / _ITEM / (10.75 * layers))) // (4 * head)) * 4 * head
    heads = hidden // head
    shape = _Shape(hidden, hidden * 11 // 4, layers, heads, heads // 4, 0)
    body = sum(math.prod(sizes) for _, sizes in _tensors(shape))
    return replace(shape, vocabulary=(nbytes // _ITEM - body) // (2 * hidden))


def _tensors(shape: _Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (shape.intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (shape.intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, shape.intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocabulary, hidden)


def _random(elements: int, seed: int, index: int) -> memoryview:
    """Bytes of `elements` random bfloat16 numbers of magnitude 2**-7 to 2**-3, as in real models, and never NaN."""
    import numpy as np

    words = np.random.PCG64([seed, index]).random_raw(-(-elements // 4)).astype("<u8", copy=False)
    # Keep the sign, the mantissa and two bits of the exponent. The other bits of the exponent are those of 2**-7.
    words &= np.uint64(0x81FF_81FF_81FF_81FF)
    words |= np.uint64(0x3C00_3C00_3C00_3C00)
    return words.view(np.uint8).data[: elements * _ITEM]


def _config(shape: _Shape) -> bytes:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
    }
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
