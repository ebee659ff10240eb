"""Whether a prompt of the process before this one can still run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_execution.graph import NodeNotFoundError, node_class
from comfy_execution.inputs import hidden_names
from comfy_execution.prompt_queue import QueueItem, Restored
from comfy_execution.prompt_validation import validate_prompt

MOST_STARTS = 2


class RestartError(RuntimeError):
    """A prompt that was queued before the server was started again cannot run any more."""


def _secrets_asked_for(prompt: Mapping[str, Any], keys: Iterable[str]) -> list[tuple[str, str]]:
    """(node id, key of extra_data) of the nodes that get one of these keys as a hidden input."""
    wanted = {key.upper(): key for key in keys}  # extra_data's names are those of the hidden kinds in lower case
    asked = []
    for node_id, node in prompt.items():
        try:
            declared: Any = node_class(node["class_type"])
        except NodeNotFoundError:
            continue
        for _, kind in hidden_names(declared.INPUT_TYPES().get("hidden")):
            if isinstance(kind, str) and kind in wanted:
                asked.append((node_id, wanted[kind]))
    return asked


async def check(item: QueueItem, restored: Restored) -> QueueItem:
    """The item as it can run now: with those of its outputs that are still valid.

    Raises RestartError when it was begun too often, when a node or file it needs is gone, or when it needs a key or
    token, which are never written to disk.
    """
    _, prompt_id, prompt, _, outputs = item[:5]
    if restored.starts >= MOST_STARTS:
        raise RestartError(
            "the server ended twice while this prompt ran, so it is not run a third time; what the console said last "
            "before each end names the cause, and queueing the prompt again tries it again"
        )
    valid, problem, valid_outputs, _ = await validate_prompt(prompt_id, prompt, list(outputs))
    if not valid:
        details = f" ({problem['details']})" if problem and problem.get("details") else ""
        raise RestartError(
            "the server was started again, and this prompt cannot run any more: "
            f"{problem['message'] if problem else 'it is not valid'}{details}"
        )
    asked = _secrets_asked_for(prompt, restored.withheld)
    if asked:
        node_id, key = asked[0]
        raise RestartError(
            f"the server was started again, and node {node_id} needs {key}, which is never written to disk; "
            "queue the prompt again"
        )
    return (*item[:4], valid_outputs, *item[5:])
