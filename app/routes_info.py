"""Routes that describe the program: nodes, machine, features, extensions."""

from __future__ import annotations

import glob
import os
import sys
from typing import Any

from aiohttp import web

from app.frontend_management import versions
from app.node_info import all_node_info, node_info
from app.responses import json_response
from comfy_api import feature_flags
from comfyui_version import __version__

_TOKEN_FLAG = "--auth-token"
_LARGEST = sys.float_info.max


def _without_token(argv: list[str]) -> list[str]:
    """A command line as it may be shown."""
    shown = []
    for position, word in enumerate(argv):
        if position and argv[position - 1] == _TOKEN_FLAG:
            word = "..."
        shown.append(_TOKEN_FLAG + "=..." if word.startswith(_TOKEN_FLAG + "=") else word)
    return shown


def system_stats() -> dict[str, Any]:
    """Machine and first device; sizes in bytes."""
    import torch

    import comfy.model_management as memory
    import comfy.taco_dit

    device = memory.get_torch_device()
    cpu = torch.device("cpu")
    vram_total, torch_total = memory.get_total_memory(device, torch_total_too=True)
    vram_free, torch_free = memory.get_free_memory(device, torch_free_too=True)
    return {
        "system": {
            "os": sys.platform,
            "ram_total": memory.get_total_memory(cpu),
            "ram_free": memory.get_free_memory(cpu),
            "comfyui_version": __version__,
            "taco_dit_version": comfy.taco_dit.__version__,
            **versions(),
            "python_version": sys.version,
            "pytorch_version": str(torch.__version__),
            "embedded_python": os.path.split(os.path.split(sys.executable)[0])[1] == "python_embeded",
            "argv": _without_token(sys.argv),
        },
        "devices": [
            {
                "name": memory.get_torch_device_name(device),
                "type": device.type,
                "index": device.index,
                "vram_total": vram_total,
                "vram_free": vram_free,
                "torch_vram_total": torch_total,
                "torch_vram_free": torch_free,
            }
        ],
    }


def _scripts(folder: str, prefix: str) -> list[str]:
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.js"), recursive=True))
    return [f"{prefix}/{os.path.relpath(path, folder).replace(os.sep, '/')}" for path in found]


def _add_extensions(routes: web.RouteTableDef, server: Any) -> None:
    @routes.get("/extensions")
    async def extensions(request: web.Request) -> web.Response:
        import nodes

        names: list[str] = []
        if server.web_root is not None:
            core = os.path.join(server.web_root, "extensions")
            names += _scripts(core, "/extensions")
        for pack, folder in nodes.EXTENSION_WEB_DIRS.items():
            names += _scripts(folder, f"/extensions/{pack}")
        return json_response(names)


def add_routes(routes: web.RouteTableDef, server: Any) -> None:
    """/object_info, /system_stats, /features and /extensions."""
    _add_extensions(routes, server)

    @routes.get("/object_info")
    async def object_info(request: web.Request) -> web.Response:
        # a limit may be infinite; the page takes numbers only
        return json_response(all_node_info(), infinity=_LARGEST)

    @routes.get("/object_info/{node_class}")
    async def object_info_node(request: web.Request) -> web.Response:
        import nodes

        name = request.match_info["node_class"]
        return json_response({name: node_info(name)} if name in nodes.NODE_CLASS_MAPPINGS else {}, infinity=_LARGEST)

    @routes.get("/system_stats")
    async def get_system_stats(request: web.Request) -> web.Response:
        return json_response(system_stats())

    @routes.get("/features")
    async def features(request: web.Request) -> web.Response:
        return json_response(feature_flags.get_server_features())
