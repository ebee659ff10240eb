"""The demo model among a person's models: where it lies, and its workflows."""

from __future__ import annotations

import json
import os
from typing import Any

import folder_paths

FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "demo")
MODELS = os.path.join(FOLDER, "models")
WORKFLOWS = os.path.join(FOLDER, "example_workflows")
CHECKPOINT = "taco_dit_demo.safetensors"
# what the page calls the group of our workflows among its templates
GROUP = "TACO-DiT"
_FIRST = os.path.join(WORKFLOWS, "1 Text to image.json")


def present() -> bool:
    """Whether loaders offer the demo model: its file is there, and its folder was added (not so with `--no-demo`)."""
    path = folder_paths.get_full_path("checkpoints", CHECKPOINT)
    return path is not None and path.startswith(MODELS)


def add_workflows() -> None:
    """Offer our workflows among the page's templates, as node packs offer theirs."""
    import nodes

    if present():
        nodes.LOADED_MODULE_DIRS[GROUP] = FOLDER


def first_graph() -> dict[str, Any] | None:
    """The demo's first workflow, in the page's form; None without the demo model."""
    if not present():
        return None
    with open(_FIRST, encoding="utf-8") as file:
        graph: dict[str, Any] = json.load(file)
    return graph
