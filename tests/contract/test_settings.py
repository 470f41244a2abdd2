"""Every field of vLLM's configuration, and every environment variable of vLLM, has a class in settings.toml."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from netloader.core.identity import ModelIdentity
from netloader.vllm.model import settings
from netloader.vllm.model.settings import ADDITIONAL, ASCEND_ENVIRONMENT, ENVIRONMENT, Entry, read_table
from scripts import settings_docs
from tests.contract.names import NEWEST, NEWEST_THAT_RUNS, OLDEST
from tests.contract.sources import Sources
from tests.contract.test_vllm import release

RELEASES = (OLDEST, NEWEST_THAT_RUNS, NEWEST)
"""A release that is supported is added here; the test then names every field of it that is not classed."""

TABLE = read_table()

CLASS_IT = (
    "read in vLLM's sources what it does to the tensors of a model, and add it to the group of "
    "netloader/vllm/model/settings.toml whose `decides` and `why` fit (or to a new group); then run `make diagram`"
)

Fields = dict[tuple[str, str], None]
"""Pairs of class and field, in order."""


def fields_of(sources: Sources, table: Mapping[str, Mapping[str, Entry]] = TABLE) -> Fields:
    """Every field of `VllmConfig`, and of the configurations in it, and every environment variable."""
    found: Fields = dict.fromkeys(types_of(sources, table))
    found.update(dict.fromkeys((ENVIRONMENT, name) for name in _variables(sources)))
    return found


def types_of(sources: Sources, table: Mapping[str, Mapping[str, Entry]] = TABLE) -> Mapping[tuple[str, str], ast.expr]:
    """The type of every field of `VllmConfig`, and of the configurations in it."""
    found: dict[tuple[str, str], ast.expr] = {}
    queue = [_class_of(sources, "vllm.config", "VllmConfig")]
    for module, owner in queue:
        for name, annotation in _fields(sources, module, owner):
            found[owner.name, name] = annotation
            entry = table.get(owner.name, {}).get(name)
            if entry is None or entry.decides == "inside":
                queue += [each for each in _configs(sources, module, annotation) if each not in queue]
    return found


Class = tuple[str, ast.ClassDef]
"""A class, and the module that defines it."""


def _class_of(sources: Sources, module: str, name: str) -> Class:
    found = sources.find(module, name)
    assert found is not None, name
    where, node = found
    assert isinstance(node, ast.ClassDef), name
    return where, node


def _fields(sources: Sources, module: str, owner: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for base in owner.bases:
        if sources.find(module, ast.unparse(base)) is not None:
            yield from _fields(sources, *_class_of(sources, module, ast.unparse(base)))
    for node in owner.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                # A variable of the class is no field. An argument that is no field is passed on to another field.
                if not ast.unparse(annotation).startswith(("ClassVar", "InitVar")):
                    yield name, annotation


def _configs(sources: Sources, module: str, annotation: ast.expr) -> Iterator[Class]:
    """The configurations that a type names."""
    if isinstance(annotation, ast.Constant):
        annotation = ast.parse(str(annotation.value), mode="eval").body
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            found = sources.find(module, node.id)
            if found is not None and isinstance(found[1], ast.ClassDef) and _is_config(found[1]):
                yield found[0], found[1]


def _is_config(node: ast.ClassDef) -> bool:
    return any(ast.unparse(decorator).partition("(")[0] == "config" for decorator in node.decorator_list)


def _variables(sources: Sources) -> Iterator[str]:
    found = sources.find("vllm.envs", "environment_variables")
    assert found is not None
    assert isinstance(found[1], ast.AnnAssign)
    assert isinstance(found[1].value, ast.Dict)
    for key in found[1].value.keys:
        assert isinstance(key, ast.Constant)
        yield str(key.value)


def unclassed(found: Fields, table: Mapping[str, Mapping[str, Entry]] = TABLE) -> list[str]:
    """What is not in the table, as the test tells it."""
    return [f"{owner}.{name}" for owner, name in found if name not in table.get(owner, {})]


@pytest.mark.parametrize("number", RELEASES)
def test_every_field_is_classed(number: str) -> None:
    new = unclassed(fields_of(release(number)))
    assert not new, f"vLLM {number} has {', '.join(new)}: {CLASS_IT}"


def test_a_field_that_is_new_is_named() -> None:
    found = fields_of(release(NEWEST))
    with_new = {**found, ("KernelConfig", "invented"): None, (ENVIRONMENT, "VLLM_INVENTED"): None}
    assert unclassed(with_new) == ["KernelConfig.invented", f"{ENVIRONMENT}.VLLM_INVENTED"]
    without = {owner: {n: e for n, e in names.items() if n != "moe_backend"} for owner, names in TABLE.items()}
    assert "KernelConfig.moe_backend" in unclassed(found, without)


def test_a_new_configuration_is_walked_through() -> None:
    """The field that holds it is not in the table, and its own fields are found all the same."""
    without = {owner: names for owner, names in TABLE.items() if owner != "AttentionConfig"}
    without["VllmConfig"] = {n: e for n, e in TABLE["VllmConfig"].items() if n != "attention_config"}
    new = unclassed(fields_of(release(NEWEST), without), without)
    assert new[0] == "VllmConfig.attention_config"
    assert "AttentionConfig.backend" in new


def test_every_entry_is_a_field_of_some_release() -> None:
    found = {pair for number in RELEASES for pair in fields_of(release(number))}
    of_vllm = {owner: names for owner, names in TABLE.items() if owner not in (ADDITIONAL, ASCEND_ENVIRONMENT)}
    gone = [f"{owner}.{name}" for owner, names in of_vllm.items() for name in names if (owner, name) not in found]
    assert not gone, f"no supported release has {', '.join(gone)}: remove them from netloader/vllm/model/settings.toml"


def test_the_walk_reaches_what_it_should() -> None:
    """A walk that finds nothing would pass all others."""
    for number in RELEASES:
        found = fields_of(release(number))
        owners = {owner for owner, _ in found}
        assert {
            "ModelConfig",
            "MultiModalConfig",
            "EPLBConfig",
            "UVAOffloadConfig",
            "KernelConfig",
            "PassConfig",
        } <= owners
        assert len(found) > 500


def test_entries_say_what_they_have_to() -> None:
    for owner, names in TABLE.items():
        for name, entry in names.items():
            assert entry.decides in settings_docs.DECIDES, (owner, name)
            assert entry.why, (owner, name)
            assert bool(entry.by) == (entry.decides == "elsewhere"), (owner, name)
            assert set(entry.by) <= {*ModelIdentity.__struct_fields__, "refused"}, (owner, name)
            compared = entry.neutral is not None or entry.always or entry.file or entry.variable
            assert not compared or entry.decides in ("weights", "processed"), (owner, name)
            assert not entry.file or owner not in (ENVIRONMENT, ASCEND_ENVIRONMENT), (owner, name)
            assert not entry.variable or owner == ADDITIONAL, (owner, name)


def _is_number_or_none(annotation: ast.expr) -> bool:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    none = any(isinstance(node, ast.Constant) and node.value is None for node in ast.walk(annotation))
    return (none or "Optional" in names) and bool(names & {"bool", "int", "float"})


@pytest.mark.parametrize("number", RELEASES)
def test_the_table_says_whether_false_and_0_are_the_same_as_none(number: str) -> None:
    """None may leave the choice to vLLM, where false forbids something."""
    numbers = [pair for pair, annotation in types_of(release(number)).items() if _is_number_or_none(annotation)]
    assert ("AttentionConfig", "use_trtllm_attention") in numbers
    deciding = [(pair, TABLE[pair[0]][pair[1]]) for pair in numbers]
    unclear = [
        ".".join(pair)
        for pair, entry in deciding
        if entry.decides in ("weights", "processed") and entry.neutral is None and not entry.always
    ]
    assert not unclear, f"{', '.join(unclear)} may be None: give the group `neutral`, [] if false and 0 do something"


def test_every_field_that_names_a_file_is_compared_by_its_contents() -> None:
    words = ("path", "file", "folder", "dir", "location")
    paths = [
        f"{owner}.{name}"
        for owner, names in TABLE.items()
        for name, entry in names.items()
        if entry.decides in ("weights", "processed") and not entry.file and set(name.lower().split("_")) & {*words}
    ]
    assert not paths, f"{', '.join(paths)}: a path says nothing about another host; add `file = true`"


def test_no_field_is_listed_twice() -> None:
    for owner, groups in tomllib.loads(Path(settings.__file__).with_name("settings.toml").read_text("utf-8")).items():
        count = Counter(name for group in groups for name in group["fields"])
        assert [name for name in count if count[name] > 1] == [], owner


def test_the_page_says_what_the_table_has() -> None:
    assert settings_docs.PAGE.read_text("utf-8") == settings_docs.page(), "run `make diagram`"
