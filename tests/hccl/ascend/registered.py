"""Loads vLLM's plugins in the given order and prints, as JSON, which loader vLLM has under which name.

registered.py ENTRY_POINT...        "-" before them: without the precaution of this package
"""

from __future__ import annotations

import importlib.metadata
import json
import sys


def main() -> None:
    import vllm_ascend

    # The release patches the vLLM it was made for when its plugins are loaded, which fails on a newer one. The tests
    # only need to know which loader has the name; loaders are registered as usual.
    vllm_ascend._GLOBAL_PATCH_APPLIED = True
    from vllm.model_executor import model_loader

    from netloader.vllm import plugin

    names = sys.argv[1:]
    if names[0] == "-":
        names = names[1:]
        plugin._let_ascend_register_first = lambda: None
    known = {entry.name: entry for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    for name in names:
        known[name].load()()
    table = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    print(json.dumps({name: table[name].__module__ for name in table if name.startswith("netloader")}))


if __name__ == "__main__":
    main()
