"""Shows any value as text, and gives the text on."""

from __future__ import annotations

import json
from typing import Any


class PreviewAny:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*", {})}}

    RETURN_TYPES = ("STRING",)
    FUNCTION = "main"
    OUTPUT_NODE = True
    CATEGORY = "utils"

    def main(self, source: Any = None):
        if isinstance(source, str):
            shown = source
        elif source is None or isinstance(source, int | float | bool):
            shown = str(source)
        else:
            try:
                shown = json.dumps(source)
            except (TypeError, ValueError):
                shown = str(source)
        return {"ui": {"text": (shown,)}, "result": (shown,)}


NODE_CLASS_MAPPINGS = {"PreviewAny": PreviewAny}
NODE_DISPLAY_NAME_MAPPINGS = {"PreviewAny": "Preview Any"}
