"""Every key of `additional_config` that vllm-ascend reads, and every variable of it, has a class in settings.toml."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from netloader.vllm.model.settings import ADDITIONAL, ASCEND_ENVIRONMENT, read_table
from tests.contract.sources import Sources
from tests.wheels import sources_of

MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"
PACKAGE = "vllm_ascend"
CONFIG = f"{PACKAGE}.ascend_config"
HOLDER = "additional_config"

CLASS_IT = (
    "read in the sources of vllm-ascend what it does to the tensors of a model, and add it to the group of "
    "netloader/vllm/model/settings.toml whose `decides` and `why` fit (or to a new group); then run `make diagram`"
)


@cache
def sources() -> Sources:
    found = re.search(r"^VLLM_ASCEND_VERSION := (\S+)$", MAKEFILE.read_text("utf-8"), re.MULTILINE)
    assert found is not None
    return Sources(sources_of(PACKAGE, found[1]))


def tree_of(module: str) -> ast.Module:
    tree = sources().tree(module)
    assert tree is not None, module
    return tree


def text_of(node: ast.expr) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def asked(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What is asked for a key, as source text, and the key: `x.get("k")`, `x["k"]`, `"k" in x`, `x.setdefault("k")`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=holder, attr="get" | "setdefault" | "pop"), args=[key, *_]):
                pass
            case ast.Subscript(value=holder, slice=key):
                pass
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[holder]):
                pass
            case ast.Call(func=ast.Attribute(attr="_get_config_value"), args=[holder, key, *_]):
                pass
            case _:
                continue
        name = text_of(key)
        if name is not None:
            yield ast.unparse(holder).removesuffix(" or {}").strip("()"), name


def top_level() -> set[str]:
    """The keys of `additional_config` that any module asks for."""
    found = set()
    for module in sources().modules():
        tree = sources().tree(module)
        if tree is not None and HOLDER in sources().text(module):
            found |= {key for holder, key in asked(tree) if holder.rpartition(".")[2] == HOLDER}
    return found


def classes() -> Iterator[tuple[str, str]]:
    """Pairs of a key and the class that is made from its value."""
    for node in ast.walk(tree_of(CONFIG)):
        match node:
            case ast.Assign(
                targets=[ast.Attribute(value=ast.Name(id="self"), attr=key)], value=ast.Call(func=ast.Name(id=owner))
            ) if owner.endswith("Config"):
                yield key, owner


def nested() -> set[str]:
    """The keys of the configurations in `additional_config`, with those that hold them."""
    found = set()
    for key, owner in classes():
        _, node = sources().find(CONFIG, owner) or ("", None)
        assert isinstance(node, ast.ClassDef), owner
        (made,) = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        # A configuration that is passed on as keywords has its keys as parameters.
        if made.args.kwarg is not None:
            found |= {f"{key}.{each.arg}" for each in made.args.args[1:]}
        found |= {f"{key}.{name}" for holder, name in asked(made) if not holder.startswith("self.")}
        for each in node.body:
            match each:
                case ast.Assign(targets=[ast.Name(id="_defaults")], value=ast.Dict(keys=keys)):
                    found |= {f"{key}.{text_of(name)}" for name in keys if name is not None}
    top = top_level()
    of_self = [(holder.removeprefix("self."), name) for holder, name in asked(tree_of(CONFIG))]
    return found | {f"{holder}.{name}" for holder, name in of_self if holder in top and holder != HOLDER}


def variables() -> set[str]:
    _, node = sources().find(f"{PACKAGE}.envs", "env_variables") or ("", None)
    assert isinstance(node, ast.AnnAssign)
    assert isinstance(node.value, ast.Dict)
    return {str(text_of(key)) for key in node.value.keys if key is not None}


def of_variables() -> dict[str, str]:
    """The keys whose value a variable has if they are not given."""
    found = {}
    for node in ast.walk(tree_of(CONFIG)):
        match node:
            case ast.Call(func=ast.Attribute(attr="_get_config_value"), args=[_, key, variable, _]):
                found[str(text_of(key))] = str(text_of(variable))
    return found


def test_every_key_is_classed() -> None:
    new = sorted((top_level() | nested()) - read_table()[ADDITIONAL].keys())
    assert not new, f"vllm-ascend has {', '.join(new)}: {CLASS_IT}"


def test_every_variable_is_classed() -> None:
    new = sorted(variables() - read_table()[ASCEND_ENVIRONMENT].keys())
    assert not new, f"vllm-ascend has {', '.join(new)}: {CLASS_IT}"


def test_every_entry_is_something_that_vllm_ascend_has() -> None:
    assert sorted(read_table()[ADDITIONAL].keys() - top_level() - nested()) == []
    assert sorted(read_table()[ASCEND_ENVIRONMENT].keys() - variables()) == []


def test_a_variable_stands_for_the_key_that_is_not_given() -> None:
    table, pairs = read_table()[ADDITIONAL], of_variables()
    assert pairs["weight_nz_mode"] == "VLLM_ASCEND_ENABLE_NZ"
    counted = {key: name for key, name in pairs.items() if table[key].decides in ("weights", "processed")}
    assert counted == {key: entry.variable for key, entry in table.items() if entry.variable}


def test_the_walk_reaches_what_it_should() -> None:
    """A walk that finds nothing would pass all others."""
    top, inner = top_level(), nested()
    assert {"enable_dsa_cp", "mix_placement", "weight_nz_mode", "layer_sharding", "refresh", "hamming_sparse"} <= top
    assert {
        "eplb_config.expert_map_path",
        "finegrained_tp_config.oproj_tensor_parallel_size",
        "ascend_compilation_config.enable_npugraph_ex",
        "ascend_compilation_config.fuse_muls_add",
        "hamming_sparse.sparse_json_location",
        "profiling_chunk_config.min_chunk",
    } <= inner
    assert len(top) > 40
    assert len(inner) >= 35
