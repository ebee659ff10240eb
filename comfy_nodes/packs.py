"""Finding and importing node packs: comfy_extras, comfy_api_nodes and custom_nodes."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import comfy.missing
import folder_paths
from comfy_nodes import pack_failures
from comfy_nodes.pack_failures import PackFailure

# V1 packs' web folders by pack name, and the folder of every pack that was imported
EXTENSION_WEB_DIRS: dict[str, str] = {}
LOADED_MODULE_DIRS: dict[str, str] = {}
# packs and extra files that could not be imported, by module name
FAILED: dict[str, PackFailure] = {}


def get_module_name(module_path: str) -> str:
    """`custom_nodes/pack` -> `pack`; `comfy_extras/nodes_flux.py` -> `nodes_flux`."""
    base = os.path.basename(os.path.normpath(module_path))
    return os.path.splitext(base)[0] if os.path.isfile(module_path) else base


def _import(module_path: str, module_name: str, module_parent: str) -> ModuleType:
    # packs are imported under a name no ordinary import uses, with dots made harmless
    if module_parent == "comfy_extras":
        sys_name = f"comfy_extras.{module_name}"
    else:
        sys_name = module_path.replace(".", "_x_")
    # an extra file that another module has imported already
    if module_parent == "comfy_extras" and sys_name in sys.modules:
        return sys.modules[sys_name]
    file = module_path if os.path.isfile(module_path) else os.path.join(module_path, "__init__.py")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{module_path} has no __init__.py, so it is not a node pack")
    spec = importlib.util.spec_from_file_location(sys_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[sys_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(sys_name, None)
        raise
    return module


def _web_directory(module_path: str, module: ModuleType) -> str | None:
    folder = getattr(module, "WEB_DIRECTORY", None)
    beside = module_path if os.path.isdir(module_path) else os.path.dirname(module_path)
    if folder is None:
        return _web_directory_of_project(beside)
    path = os.path.abspath(os.path.join(beside, folder))
    return path if os.path.isdir(path) else None


def _web_directory_of_project(folder: str) -> str | None:
    """The web folder named in pyproject.toml under [tool.comfy] web."""
    file = os.path.join(folder, "pyproject.toml")
    if not os.path.isfile(file):
        return None
    import tomllib

    try:
        with open(file, "rb") as stream:
            web = tomllib.load(stream).get("tool", {}).get("comfy", {}).get("web")
    except (tomllib.TOMLDecodeError, OSError) as error:
        logging.warning("%s cannot be read: %s", file, error)
        return None
    path = os.path.abspath(os.path.join(folder, web)) if web else None
    return path if path and os.path.isdir(path) else None


def _register(classes: dict[str, Any], names: dict[str, str], origin: str, ignore: Collection[str]) -> None:
    import nodes

    for key, class_def in classes.items():
        if key not in ignore:
            nodes.NODE_CLASS_MAPPINGS[key] = class_def
            class_def.RELATIVE_PYTHON_MODULE = origin
    nodes.NODE_DISPLAY_NAME_MAPPINGS.update({key: name for key, name in names.items() if key not in ignore})


async def _register_extension(module: ModuleType, origin: str, ignore: Collection[str]) -> bool:
    """V3 packs: `comfy_entrypoint()` gives a ComfyExtension that lists its node classes."""
    import inspect

    entry = getattr(module, "comfy_entrypoint", None)
    if not callable(entry):
        return False
    extension = entry()
    if inspect.isawaitable(extension):
        extension = await extension
    await extension.on_load()
    classes, names = {}, {}
    for class_def in await extension.get_node_list():
        schema = class_def.GET_SCHEMA()
        classes[schema.node_id] = class_def
        if schema.display_name is not None:
            names[schema.node_id] = schema.display_name
    _register(classes, names, origin, ignore)
    return True


async def load_custom_node(module_path: str, ignore: Collection[str] = (), module_parent: str = "custom_nodes") -> bool:
    """Import a pack (file or folder) and register its nodes except those in `ignore`; whether that worked."""
    comfy.missing.provide_modules()
    module_name = get_module_name(module_path)
    origin = f"{module_parent}.{module_name}"
    try:
        module = _import(module_path, module_name, module_parent)
        LOADED_MODULE_DIRS[module_name] = os.path.abspath(
            module_path if os.path.isdir(module_path) else os.path.dirname(module_path)
        )
        web = _web_directory(module_path, module)
        if web is not None:
            EXTENSION_WEB_DIRS[module_name] = web
        classes = getattr(module, "NODE_CLASS_MAPPINGS", None)
        if classes is not None:
            _register(classes, getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", None) or {}, origin, ignore)
            return True
        if await _register_extension(module, origin, ignore):
            return True
        logging.warning("Skip %s: no NODE_CLASS_MAPPINGS and no comfy_entrypoint (not a node pack?)", module_path)
    except Exception as error:  # noqa: BLE001 - a broken pack must not stop the program
        logging.warning("%s", traceback.format_exc(), extra={"reported": True})
        FAILED[origin] = failure = pack_failures.explain(module_name, module_path, error)
        told = (module_path, failure.reason, failure.remedy)
        logging.warning("Cannot import %s module for custom nodes: %s. %s", *told, extra={"cure": ("", failure.remedy)})
    return False


Turn = Callable[[str], AbstractContextManager[None]]
Skips = Callable[[str], bool]


def _at_once(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def _nothing(path: str) -> bool:
    return False


async def init_external_custom_nodes(turn: Turn = _at_once, skips: Skips = _nothing) -> None:
    """Load every pack in the custom_nodes folders, as the flags and `skips(path)` allow, and log how long each took.

    With several ranks `turn(path)` says when this one may load a pack.
    """
    import nodes
    from comfy.cli_args import args

    known = set(nodes.NODE_CLASS_MAPPINGS)
    times: list[tuple[float, str, bool]] = []
    for folder in folder_paths.get_folder_paths("custom_nodes"):
        if not os.path.isdir(folder):
            continue
        for entry in sorted(os.listdir(os.path.realpath(folder))):
            path = os.path.join(folder, entry)
            if entry == "__pycache__" or entry.startswith(".") or entry.endswith(".disabled"):
                continue
            if os.path.isfile(path) and not entry.endswith(".py"):
                continue
            if args.disable_all_custom_nodes and entry not in args.whitelist_custom_nodes:
                logging.info("Skipping %s due to --disable-all-custom-nodes", entry)
                continue
            with turn(path):
                if skips(path):
                    continue
                before = time.perf_counter()
                loaded = await load_custom_node(path, known)
            times.append((time.perf_counter() - before, path, loaded))
    if times:
        logging.info("\nImport times for custom nodes:")
        for seconds, path, loaded in sorted(times):
            logging.info("%6.1f seconds%s: %s", seconds, "" if loaded else " (IMPORT FAILED)", path)


async def init_builtin_extra_nodes() -> list[str]:
    """Load comfy_extras/nodes_*.py; the names of those that failed."""
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "comfy_extras")
    names = sorted(name for name in os.listdir(folder) if name.startswith("nodes_") and name.endswith(".py"))
    return [
        name for name in names if not await load_custom_node(os.path.join(folder, name), module_parent="comfy_extras")
    ]


async def init_extra_nodes(
    init_custom_nodes: bool = True, init_api_nodes: bool = True, turn: Turn = _at_once, skips: Skips = _nothing
) -> list[str]:
    """Load the extra nodes, then the custom ones. Returns the built-in files that failed; they are logged as well.

    `skips(path)`: custom packs that are left out.

    `init_api_nodes` is there for callers written for ComfyUI: there are no remote, paid nodes here.
    """
    failed = await init_builtin_extra_nodes()
    if init_custom_nodes:
        await init_external_custom_nodes(turn, skips)
    if failed:
        logging.warning("WARNING: some comfy_extras nodes did not import: %s", ", ".join(failed))
    return failed
