"""The model families: one record each, found here by a file's content or by ComfyUI's public names.

A record (`base.Family`) is all that is declared of a family; its network is a file of its own that is imported only
when a model of the family is made. `comfy.supported_models`, `comfy.model_base` and `comfy.latent_formats` look the
families' public names up in the records.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

from comfy.families.base import Family
from comfy.missing import missing_names

__all__ = ["Family", "lookup", "record_of", "records", "register"]

# Modules of this package with a `FAMILY`, in the order in which their families are tried.
_NAMES = (
    "sd_unet", "sd3", "auraflow", "pixart", "hunyuan_dit", "flux", "ltx", "hunyuan_video", "lumina", "wan", "chroma",
    "qwen_image", "svd",
)  # fmt: skip
_registered: list[Family] = []


@functools.cache
def _own() -> tuple[Family, ...]:
    return tuple(importlib.import_module(f"comfy.families.{name}").FAMILY for name in _NAMES)


def records() -> tuple[Family, ...]:
    """All families, in the order in which they are tried on a file: those registered later come first."""
    return (*reversed(_registered), *_own())


def register(family: Family) -> None:
    """Add a family from outside this package. Raises ValueError when its name is taken."""
    if any(family.name == known.name for known in records()):
        raise ValueError(f"there is a model family {family.name!r} already; give the new one another name")
    _registered.append(family)
    supported = sys.modules.get("comfy.supported_models")
    if supported is not None and "models" in vars(supported):
        supported.models[:0] = family.configurations.values()


def record_of(network: Any) -> Family | None:
    """The family of a network (of a class derived from its network, or compiled by torch), or None."""
    network = getattr(network, "_orig_mod", network)
    families = {family.network: family for family in reversed(records())}
    names = (f"{kind.__module__}:{kind.__qualname__}" for kind in type(network).__mro__)
    return next((families[name] for name in names if name in families), None)


def lookup(kind: str, owner: str, features: dict[str, str]) -> Callable[[str], Any]:
    """A public module's `__getattr__`: names from the records' `kind`, else what `features` says is missing.

    kind: `configurations`, `models` or `latent_formats`. owner: the module's name.
    """
    absent = missing_names(owner, features)

    def look_up(name: str) -> Any:
        if not name.startswith("_"):
            for family in records():
                if name in getattr(family, kind):
                    return getattr(family, kind)[name]
        return absent(name)

    return look_up
