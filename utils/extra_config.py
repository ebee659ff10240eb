"""Model folders named in extra_model_paths.yaml."""

from __future__ import annotations

import logging
import os
from typing import Any

import yaml

import folder_paths


def _absolute(path: str, beside: str) -> str:
    path = os.path.expanduser(os.path.expandvars(path))
    return os.path.normpath(path if os.path.isabs(path) else os.path.join(beside, path))


def _add_section(section: dict[str, Any], beside: str) -> None:
    base = section.get("base_path")
    is_default = bool(section.get("is_default", False))
    root = _absolute(base, beside) if base else beside
    for kind, listed in section.items():
        if kind in ("base_path", "is_default") or not listed:
            continue
        for line in str(listed).split("\n"):
            if line.strip():
                path = _absolute(line.strip(), root)
                logging.info("Adding extra search path %s %s", kind, path)
                folder_paths.add_model_folder_path(kind, path, is_default)


def load_extra_path_config(yaml_path: str) -> None:
    """Add the search paths of one YAML file: `{section: {base_path?, is_default?, <kind>: "path\\npath"}}`.

    Relative paths start at the section's `base_path`, which itself may be relative to the file.
    Raises OSError when the file cannot be read and ValueError when it is not such a mapping.
    """
    with open(yaml_path, encoding="utf-8") as stream:
        sections = yaml.safe_load(stream) or {}
    if not isinstance(sections, dict):
        raise ValueError(f"{yaml_path}: expected sections with model folders, found {type(sections).__name__}")
    beside = os.path.dirname(os.path.abspath(yaml_path))
    for name, section in sections.items():
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ValueError(f"{yaml_path}: section {name!r} must map folder kinds to paths")
        _add_section(section, beside)
