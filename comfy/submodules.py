"""Modules of a package as its attributes, imported when they are first asked for.

ComfyUI has imported most of its modules when packs are loaded, and they say `import comfy` and then `comfy.sdxl_clip.X`.
Here a module that no other needs is imported at that moment.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType


def submodules(package: str) -> Callable[[str], ModuleType]:
    """The `__getattr__` of a package: its modules by name. Raises AttributeError for a name that no module has."""

    def look_up(name: str) -> ModuleType:
        full_name = f"{package}.{name}"
        # special names are asked for by the import system and tools; a module of that name is never meant
        if name.startswith("__") or importlib.util.find_spec(full_name) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(full_name)

    return look_up
