"""Model folders named in extra_model_paths.yaml."""

from __future__ import annotations

import logging
import os
from typing import Any

import yaml

import folder_paths

EXTRA_MODEL_PATHS = "extra_model_paths.yaml"


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


def read_sections(yaml_path: str) -> dict[str, dict[str, Any]]:
    """The sections of one file, those without content left out.

    Raises OSError when the file cannot be read and ValueError when it is not YAML, or not such a mapping.
    """
    with open(yaml_path, encoding="utf-8") as stream:
        try:
            sections = yaml.safe_load(stream) or {}
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}" if mark is not None else ""
            raise ValueError(f"{yaml_path} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(sections, dict):
        raise ValueError(f"{yaml_path}: expected sections with model folders, found {type(sections).__name__}")
    for name, section in sections.items():
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"{yaml_path}: section {name!r} must map folder kinds to paths")
    return {name: section for name, section in sections.items() if section is not None}


def load_extra_path_config(yaml_path: str) -> None:
    """Add the search paths of one YAML file: `{section: {base_path?, is_default?, <kind>: "path\\npath"}}`.

    Relative paths start at the section's `base_path`, which itself may be relative to the file. Raises as `read_sections`.
    """
    beside = os.path.dirname(os.path.abspath(yaml_path))
    for section in read_sections(yaml_path).values():
        _add_section(section, beside)
