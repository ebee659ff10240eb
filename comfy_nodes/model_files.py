"""Nodes that load model files run again when their files change.

A result is kept as long as a node's inputs are the same; for these nodes size, time and inode of their files count as
inputs. That costs a look at the directory entry of each file and prompt, on rank 0, which decides for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import folder_paths
from comfy.weight_files import state_of

Node = TypeVar("Node", bound=type[Any])


def model_file_state(kind: str, name: Any) -> list[int] | None:
    """What tells one content of a model file from another; None when there is no such file, or no name yet."""
    path = folder_paths.get_full_path(kind, name) if isinstance(name, str) else None
    return path_state(path) if path else None


def path_state(path: str) -> list[int] | None:
    """`model_file_state` of a path."""
    state = state_of(path)
    return None if state is None else list(state)


def watches_files(**kinds: str) -> Callable[[Node], Node]:
    """Decorate a loader whose inputs `kinds` name files: `watches_files(lora_name="loras")`."""

    def states(cls: Any, **inputs: Any) -> list[list[int] | None]:
        return [model_file_state(kind, inputs.get(name)) for name, kind in kinds.items()]

    return watches(states)


def watches(states: Callable[..., Iterable[Any]]) -> Callable[[Node], Node]:
    """Decorate a loader with `states(cls, **inputs)`, which tells the states of its files."""

    def decorate(cls: Node) -> Node:
        name = "fingerprint_inputs" if hasattr(cls, "GET_SCHEMA") else "IS_CHANGED"
        setattr(cls, name, classmethod(states))
        return cls

    return decorate
