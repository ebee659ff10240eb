"""What node packs bring for the page besides nodes: translations, example workflows, sub-graph blueprints."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from app.frontend_management import blueprints_folder
from app.responses import json_response

EXAMPLE_FOLDERS = ("example_workflows", "example", "examples", "workflow", "workflows")
_TRANSLATION_FILES = {"nodeDefs": "nodeDefs.json", "commands": "commands.json", "settings": "settings.json"}


def merged(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings in one; where both have a plain value, `other` wins."""
    result = dict(base)
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except (OSError, ValueError) as error:
        logging.warning("%s cannot be read: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def translations(pack_folders: Mapping[str, str]) -> dict[str, Any]:
    """`{language: texts}` merged over all packs' locales/<language>/*.json."""
    result: dict[str, Any] = {}
    for _, folder in sorted(pack_folders.items()):
        locales = os.path.join(folder, "locales")
        if not os.path.isdir(locales):
            continue
        for language in sorted(os.listdir(locales)):
            at = os.path.join(locales, language)
            main = os.path.join(at, "main.json")
            texts = _read_json(main) if os.path.isfile(main) else {}
            for key, name in _TRANSLATION_FILES.items():
                if os.path.isfile(os.path.join(at, name)):
                    texts[key] = _read_json(os.path.join(at, name))
            if texts:
                result[language] = merged(result.get(language, {}), texts)
    return result


def example_folder(pack_folder: str) -> str | None:
    """Folder of a pack's example workflows, None when it has none."""
    for name in EXAMPLE_FOLDERS:
        path = os.path.join(pack_folder, name)
        if os.path.isdir(path):
            return path
    return None


def _packs() -> dict[str, str]:
    """Custom packs by name; built-in extra nodes have neither translations nor examples of their own."""
    import nodes

    return {
        name: folder
        for name, folder in nodes.LOADED_MODULE_DIRS.items()
        if os.path.basename(folder) not in ("comfy_extras", "custom_nodes")
    }


def _blueprint_files() -> dict[str, tuple[str, str]]:
    """Blueprint id -> (path, where it is from)."""
    found: dict[str, tuple[str, str]] = {}
    sources = [
        (folder, f"custom_nodes.{name}")
        for name, pack in _packs().items()
        if os.path.isdir(folder := os.path.join(pack, "subgraphs"))
    ]
    official = blueprints_folder()
    if official is not None:
        sources.append((official, "templates"))
    for folder, source in sources:
        for name in sorted(os.listdir(folder)):
            if name.endswith(".json"):
                key = hashlib.sha256(f"{source}/{name}".encode()).hexdigest()
                found[key] = (os.path.join(folder, name), source)
    return found


def _blueprint(path: str, source: str, with_data: bool) -> dict[str, Any]:
    name = os.path.splitext(os.path.basename(path))[0]
    entry: dict[str, Any] = {"source": source.split(".")[0], "name": name, "info": {"node_pack": source}}
    if with_data:
        with open(path, encoding="utf-8") as stream:
            entry["data"] = stream.read()
    return entry


class CustomNodeManager:
    """Serves /i18n, /workflow_templates and /global_subgraphs."""

    def add_routes(self, routes: web.RouteTableDef) -> None:
        @routes.get("/i18n")
        async def i18n(request: web.Request) -> web.Response:
            return json_response(await asyncio.to_thread(translations, _packs()))

        @routes.get("/workflow_templates")
        async def workflow_templates(request: web.Request) -> web.Response:
            result = {}
            for name, folder in _packs().items():
                examples = example_folder(folder)
                if examples is not None:
                    result[name] = sorted(
                        os.path.splitext(file)[0] for file in os.listdir(examples) if file.endswith(".json")
                    )
            return json_response(result)

        @routes.get("/global_subgraphs")
        async def subgraphs(request: web.Request) -> web.Response:
            return json_response(
                {key: _blueprint(path, source, False) for key, (path, source) in _blueprint_files().items()}
            )

        @routes.get("/global_subgraphs/{id}")
        async def subgraph(request: web.Request) -> web.Response:
            found = _blueprint_files().get(request.match_info["id"])
            if found is None:
                raise web.HTTPNotFound()
            return json_response(_blueprint(*found, True))

    def add_static(self, app: web.Application) -> None:
        """Serve the packs' example workflows."""
        for name, folder in _packs().items():
            examples = example_folder(folder)
            if examples is not None:
                app.add_routes([web.static(f"/api/workflow_templates/{name}", examples)])
