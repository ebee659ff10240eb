"""Where the official front end, its templates, blueprints and node help lie: in pip packages, used as they are."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import importlib.util
import os
from typing import Any

FRONTEND = "comfyui-frontend-package"
TEMPLATES = "comfyui-workflow-templates"
DOCS = "comfyui-embedded-docs"
BLUEPRINTS = "comfyui-subgraph-blueprints"
# the newest release the facts of this program were checked with
TESTED_FRONTEND = "1.58.1"
TESTED_TEMPLATES = "0.11.97"
# the parts of TEMPLATES that are needed; the package itself adds previews, half a gigabyte of them
TEMPLATE_PARTS = {"comfyui-workflow-templates-core": "0.3.388", "comfyui-workflow-templates-json": "0.1.123"}

MISSING_PAGE = f"""<!doctype html><meta charset="utf-8"><title>TACO-DiT</title>
<h1>The server is running, its web page is not installed</h1>
<p>Install the official front end and restart:</p>
<pre>pip install {FRONTEND} {TEMPLATES} {DOCS}</pre>
<p>or start with <code>--front-end-root FOLDER</code>. The API works without it.</p>
"""


def package_folder(package: str, *parts: str) -> str | None:
    """A folder inside an installed package; None when it is not there."""
    module = package.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        return None
    path = str(importlib.resources.files(module).joinpath(*parts))
    return path if os.path.isdir(path) else None


def installed_version(package: str) -> str | None:
    """Version of an installed package, None when it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def frontend_folder(front_end_root: str | None) -> str | None:
    """Folder of index.html: the one given, else the package's. Raises FileNotFoundError when the given one has none."""
    if front_end_root is None:
        return package_folder(FRONTEND, "static")
    if not os.path.isfile(os.path.join(front_end_root, "index.html")):
        raise FileNotFoundError(f"--front-end-root {front_end_root} has no index.html; give the folder of a built page")
    return front_end_root


def docs_folder() -> str | None:
    return package_folder(DOCS, "docs")


def blueprints_folder() -> str | None:
    return package_folder(BLUEPRINTS, "blueprints") or package_folder(BLUEPRINTS)


def template_file(name: str) -> str | None:
    """Path of a file of the templates packages: workflows and indices as JSON, thumbnails; None when missing."""
    from app.paths import UnsafePath, inside

    folders = [
        package_folder("comfyui-workflow-templates-json", "templates"),
        package_folder(TEMPLATES, "templates"),
    ]
    for folder in folders:
        if folder is not None:
            try:
                path = inside(folder, name)
            except UnsafePath:
                return None
            if os.path.isfile(path):
                return path
    if importlib.util.find_spec("comfyui_workflow_templates_core") is None or name.endswith(".json"):
        return None
    return _template_asset(name)


def _template_asset(name: str) -> str | None:
    import comfyui_workflow_templates_core as core

    # thumbnails are called <template>-<number>.<extension>
    template = name.rsplit("-", 1)[0]
    try:
        return str(core.get_asset_path(template, name))
    except (FileNotFoundError, KeyError, ValueError):
        return None


def template_packages() -> dict[str, str]:
    """The packages the templates come from, and the release of each that was tested."""
    return {TEMPLATES: TESTED_TEMPLATES} if installed_version(TEMPLATES) is not None else TEMPLATE_PARTS


def versions() -> dict[str, Any]:
    """What /system_stats says about these packages.

    The templates' version is that of the whole package, or of the first part when only the parts are installed; the
    page warns when it is not the required one.
    """
    packages = template_packages()
    name, required = next(iter(packages.items()))
    return {
        "required_frontend_version": TESTED_FRONTEND,
        "installed_templates_version": installed_version(name),
        "required_templates_version": required,
        "comfy_package_versions": [
            {"name": name, "installed": installed_version(name), "required": required}
            for name, required in {FRONTEND: TESTED_FRONTEND, **packages}.items()
        ],
    }
