"""Joining JSON data, for node packs: settings and translations of several files."""

from __future__ import annotations

from typing import Any


def merge_json_recursive(base: Any, update: Any) -> Any:
    """`base` with `update` on top, as a new value: objects by key, arrays one after the other, else `update` wins."""
    if isinstance(base, dict) and isinstance(update, dict):
        changed = {key: merge_json_recursive(base[key], update[key]) for key in base.keys() & update.keys()}
        return {**base, **update, **changed}
    if isinstance(base, list) and isinstance(update, list):
        return [*base, *update]
    return update
