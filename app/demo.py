"""The demo model among a person's models: where it lies, its workflows, and what the page shows when it is the only one."""

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
_DIFFUSION_KINDS = ("checkpoints", "diffusion_models")


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
    """The workflow to begin with, in the page's form; None for a person with diffusion models of their own.

    Without models the page would begin with a workflow whose files are missing.
    """
    if not present() or any(folder_paths.has_own_files(kind) for kind in _DIFFUSION_KINDS):
        return None
    with open(_FIRST, encoding="utf-8") as file:
        graph: dict[str, Any] = json.load(file)
    return graph
