"""Tiny real checkpoints, made in seconds, for tests that load them with a real engine.

Every maker writes a complete Hugging Face folder (config, tokenizer, safetensors) and returns its path. Needs torch,
transformers and tokenizers; needs no engine. The weights are random but scaled so that greedy decoding varies: a
model that repeats one token would look right even with wrong weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PROMPTS: tuple[str, ...] = (
    "the weights of a model",
    "a server holds tensors",
    "the client pulls blocks",
    "one two three four",
    "every byte is checked",
    "rank zero and rank one",
    "hello",
    "a manifest, a root, a ledger",
)
VOCABULARY = 512
PROCESSED_METHOD = "netloader_test"
"""Name of the quantisation method of `tests/vllm/processed_method.py`, which has to be imported before it is used."""

DENSE = "2_Dense/model.safetensors"
"""Where an embedder has the weights of its projector."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".safetensors.index.json", ".bin.index.json")

_CORPUS = [
    *PROMPTS,
    "the quick brown fox jumps over the lazy dog",
    "a source names a host and a port; the first root that is accepted is pinned",
    "blocks are pending, in flight, received and verified",
    "weights move from one engine to the next while both of them answer requests",
]


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer of at most VOCABULARY entries into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def make_llama(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    tied: bool = False,
    seed: int = 1,
    layers: int = 4,
    hidden: int = 256,
) -> Path:
    """A Llama of about 3 million parameters in `dtype` ("bfloat16", "float16" or "float32")."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _save(folder, LlamaForCausalLM, config, dtype=dtype, seed=seed)


def make_qwen3_moe(folder: Path, *, dtype: str = "bfloat16", seed: int = 2) -> Path:
    """A Qwen3-MoE with 2 layers of 8 experts and tied embeddings."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return _save(folder, Qwen3MoeForCausalLM, config, dtype=dtype, seed=seed)


def make_w8a8(folder: Path, *, seed: int = 3) -> Path:
    """The Llama quantised to W8A8 int8 as compressed-tensors writes it: int8 weights, one scale per output channel."""
    make_llama(folder, seed=seed)
    rewrite_weights(folder, _quantised)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = _W8A8
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def make_untied_by_file(folder: Path, *, seed: int = 4) -> Path:
    """A Llama whose config says that embeddings are tied while its file has an `lm_head` of its own."""
    make_llama(folder, seed=seed)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = True
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def make_without_dtype(folder: Path, *, seed: int = 13) -> Path:
    """A float16 Llama whose config does not say so."""
    make_llama(folder, dtype="float16", seed=seed)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def make_eagle(folder: Path, *, embeddings: str = "", seed: int = 7) -> Path:
    """An EAGLE head for `make_llama`'s model: one layer, no output head.

    Args:
        folder: Where to.
        embeddings: ``""`` for none, ``"own"``, or ``"equal"`` to the target's.
        seed: Of the random weights.
    """

    def change(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if name.startswith("model.layers.") and "input_layernorm" not in name
        }
        own = tensors["model.embed_tokens.weight"]
        hidden = own.shape[1]
        result["fc.weight"] = _random(hidden, 2 * hidden, seed=seed).to(own.dtype)
        if embeddings == "own":
            result["embed_tokens.weight"] = own
        elif embeddings == "equal":
            with tempfile.TemporaryDirectory() as other:
                target = make_llama(Path(other) / "target")
                result["embed_tokens.weight"] = load_weights(target)["model.embed_tokens.weight"]
        return result

    make_llama(folder, seed=seed, layers=1)
    rewrite_weights(folder, change)
    return folder


def make_eagle3(folder: Path, *, seed: int = 8) -> Path:
    """An EAGLE-3 head for `make_llama`'s model: a vocabulary and an output head of its own, no embeddings."""
    import torch

    small = VOCABULARY // 2

    def change(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        layer = "model.layers.0."
        result = {"midlayer." + n.removeprefix(layer): t for n, t in tensors.items() if n.startswith(layer)}
        norm = tensors["model.norm.weight"]
        hidden = norm.shape[0]
        for name in ("q_proj", "k_proj", "v_proj"):
            full = f"midlayer.self_attn.{name}.weight"
            result[full] = _random(result[full].shape[0], 2 * hidden, seed=seed).to(norm.dtype)
        result["midlayer.hidden_norm.weight"] = norm.clone()
        result["norm.weight"] = norm
        result["fc.weight"] = _random(hidden, 3 * hidden, seed=seed + 1).to(norm.dtype)
        result["lm_head.weight"] = tensors["lm_head.weight"][:small].clone()
        result["d2t"] = torch.arange(small)
        return result

    make_llama(folder, seed=seed, layers=1)
    rewrite_weights(folder, change)
    changes = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": small}
    # The layers of the target that it reads: the default would select one of four layers twice.
    _change_config(folder, {**changes, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]})
    return folder


def make_mimo(folder: Path, *, seed: int = 9) -> Path:
    """A MiMo: a Qwen2 with one MTP layer in the same files."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden = 128

    def change(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = dict(tensors)
        layer, mtp = "model.layers.0.", "model.mtp_layers.0."
        for name, tensor in tensors.items():
            if name.startswith(layer):
                result[mtp + name.removeprefix(layer)] = tensor.flip(0).contiguous()
        dtype = tensors["lm_head.weight"].dtype
        for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            result[f"{mtp}{norm}.weight"] = torch.ones(hidden, dtype=dtype)
        result[f"{mtp}input_proj.weight"] = _random(hidden, 2 * hidden, seed=seed).to(dtype)
        return result

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    _save(folder, Qwen2ForCausalLM, config, dtype="bfloat16", seed=seed)
    rewrite_weights(folder, change)
    _change_config(folder, {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1})
    return folder


def make_embedder(folder: Path, *, seed: int = 10, dense: int | None = 10) -> Path:
    """A BERT for embeddings as sentence-transformers writes it.

    Args:
        folder: Where.
        seed: Of BERT's weights.
        dense: Seed of the Dense projector 128 -> 64 that has a folder of its own; None for a model without one.
    """
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    _save(folder, BertModel, config, dtype="float32", seed=seed)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"} | ({} if dense is None else {"2_Dense": "Dense"})
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    _write(folder / "modules.json", modules)
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 128, "pooling_mode_mean_tokens": True})
    if dense is not None:
        activation = "torch.nn.modules.activation.Tanh"
        settings = {"in_features": 128, "out_features": 64, "bias": True, "activation_function": activation}
        _write(folder / "2_Dense" / "config.json", settings)
        weights = {"linear.weight": _random(64, 128, seed=dense), "linear.bias": _random(1, 64, seed=dense + 1)[0]}
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / DENSE)
    return folder


def with_processed_method(folder: Path) -> Path:
    """Have the plain model in `folder` quantised by PROCESSED_METHOD when it is loaded."""
    _change_config(folder, {"quantization_config": {"quant_method": PROCESSED_METHOD}})
    return folder


def strip_weights(folder: Path, target: Path) -> Path:
    """Copy `folder` to `target` without its weight files: what a client starts from."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)))
    return target


def change_weight(folder: Path, target: Path, name: str) -> Path:
    """Copy `folder` to `target` with the tensor `name` changed: same shapes, same headers, other weights."""

    def change(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = dict(tensors)
        changed[name] = changed[name].flip(0).contiguous()
        return changed

    shutil.copytree(folder, target)
    rewrite_weights(target, change)
    return target


def rewrite_weights(folder: Path, change: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the tensors of a one-file checkpoint by what `change` makes of them."""
    from safetensors.torch import save_file

    save_file(change(load_weights(folder)), folder / "model.safetensors", metadata={"format": "pt"})


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a one-file checkpoint."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return tensors


@dataclass
class ModelStore:
    """Makes each kind of model once below `root` and hands out its folder.

    Callers must not write into a folder they are handed; copy it first. `llama-blocks` is large enough (48 MB) for a
    transfer to have a middle.
    """

    root: Path
    _made: dict[str, Path] = field(default_factory=dict)

    def get(self, kind: str) -> Path:
        """The folder of `kind`, one of KINDS, made when first asked for."""
        if kind not in self._made:
            self._made[kind] = KINDS[kind](self.root / kind)
        return self._made[kind]

    def bare(self, kind: str) -> Path:
        """The same folder without weight files."""
        name = f"{kind}-bare"
        if name not in self._made:
            self._made[name] = strip_weights(self.get(kind), self.root / name)
        return self._made[name]


KINDS: Mapping[str, Callable[[Path], Path]] = {
    "llama-bf16": make_llama,
    "llama-bf16-other": lambda folder: make_llama(folder, seed=11),
    "llama-blocks": lambda folder: make_llama(folder, seed=12, layers=8, hidden=512),
    "llama-blocks-other": lambda folder: make_llama(folder, seed=14, layers=8, hidden=512),
    "llama-fp16": lambda folder: make_llama(folder, dtype="float16"),
    "llama-fp32": lambda folder: make_llama(folder, dtype="float32"),
    "llama-tied": lambda folder: make_llama(folder, tied=True, seed=5),
    "llama-untied-by-file": make_untied_by_file,
    "llama-no-dtype": make_without_dtype,
    "llama-w8a8": make_w8a8,
    "processed": lambda folder: with_processed_method(make_llama(folder)),
    "processed-tied": lambda folder: with_processed_method(make_llama(folder, tied=True, seed=5)),
    "processed-untied-by-file": lambda folder: with_processed_method(make_untied_by_file(folder)),
    "qwen3-moe": make_qwen3_moe,
    "qwen3-moe-other": lambda folder: make_qwen3_moe(folder, seed=12),
    "draft": lambda folder: make_llama(folder, seed=6, layers=1, hidden=128),
    "eagle": make_eagle,
    "eagle-own": lambda folder: make_eagle(folder, embeddings="own"),
    "eagle-equal": lambda folder: make_eagle(folder, embeddings="equal"),
    "eagle3": make_eagle3,
    "mimo": make_mimo,
    "embedder": make_embedder,
    "embedder-other-dense": lambda folder: make_embedder(folder, dense=20),
    "embedder-plain": lambda folder: make_embedder(folder, dense=None),
}

_W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
    "quantization_status": "compressed",
}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}, indent=2), encoding="utf-8")


def _random(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    import torch

    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def _save(folder: Path, model_class: Any, config: Any, *, dtype: str, seed: int) -> Path:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        if config.tie_word_embeddings:
            _let_layers_decide(model)
    model = model.to(getattr(torch, dtype))
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _let_layers_decide(model: Any) -> None:
    # With tied embeddings and random layers the likeliest next token is the last one, again and again. Weak
    # embeddings under a strong final norm leave the choice to the layers.
    import torch

    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.05)
        model.model.norm.weight.mul_(20)


def _quantised(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
        result[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
        result[name + "_scale"] = scale.to(tensor.dtype)
    return result
