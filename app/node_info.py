"""What the page learns about a node (`/object_info`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any


def _inputs(class_def: Any) -> dict[str, Any]:
    """INPUT_TYPES with objects that only answer `in` and `[]` shown as empty groups."""
    return {
        group: dict(entries) if isinstance(entries, Mapping) else {}
        for group, entries in class_def.INPUT_TYPES().items()
    }


def node_info(node_class: str) -> dict[str, Any]:
    """Description of a registered node class. Raises whatever its INPUT_TYPES raises."""
    import nodes

    class_def = nodes.NODE_CLASS_MAPPINGS[node_class]
    if hasattr(class_def, "GET_NODE_INFO_V1"):
        return class_def.GET_NODE_INFO_V1()
    inputs = _inputs(class_def)
    outputs = list(class_def.RETURN_TYPES)
    info: dict[str, Any] = {
        "input": inputs,
        "input_order": {group: list(entries) for group, entries in inputs.items()},
        "output": outputs,
        "output_is_list": list(getattr(class_def, "OUTPUT_IS_LIST", [False] * len(outputs))),
        "output_name": list(getattr(class_def, "RETURN_NAMES", outputs)),
        "name": node_class,
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(node_class, node_class),
        "description": getattr(class_def, "DESCRIPTION", ""),
        "python_module": getattr(class_def, "RELATIVE_PYTHON_MODULE", "nodes"),
        "category": getattr(class_def, "CATEGORY", "sd"),
        "output_node": bool(getattr(class_def, "OUTPUT_NODE", False)),
    }
    if hasattr(class_def, "OUTPUT_TOOLTIPS"):
        info["output_tooltips"] = list(class_def.OUTPUT_TOOLTIPS)
    for key in ("DEPRECATED", "EXPERIMENTAL", "API_NODE"):
        if getattr(class_def, key, False):
            info[key.lower()] = True
    return info


def all_node_info() -> dict[str, Any]:
    """Descriptions of all nodes; one that cannot describe itself is logged and left out."""
    import folder_paths
    import nodes

    result = {}
    with folder_paths.cache_helper:
        for name in list(nodes.NODE_CLASS_MAPPINGS):
            try:
                result[name] = node_info(name)
            except Exception:  # noqa: BLE001 - one broken node must not empty the page
                logging.exception("[ERROR] An error occurred while retrieving information for the '%s' node.", name)
    return result
