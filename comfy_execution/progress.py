"""Progress of the running prompt: a registry of node states and the handlers that show them.

A `progress_state` message carries every node that was started, so sending one per event would cost quadratic time.
`WebUIProgressHandler` sends at once while that is cheap and else at most every `INTERVAL` seconds, in proportion less
often where there are very many nodes; a timer and `reset` send what was held back, so that the last state always arrives.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC
from enum import Enum
from typing import Any, TypedDict

from comfy_execution.message_types import BinaryEventTypes
from comfy_execution.utils import get_executing_context


class NodeState(Enum):
    Pending = "pending"
    Running = "running"
    Finished = "finished"
    Error = "error"


class NodeProgressState(TypedDict):
    state: NodeState
    value: float
    max: float


class ProgressHandler(ABC):  # noqa: B024 - handlers override the events they care for
    """Receives the progress events of nodes. `state` is shared: read it, do not keep or change it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.enabled = True

    def set_registry(self, registry: ProgressRegistry) -> None:  # noqa: B027
        """Called when the handler is added to a registry."""

    def start_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:  # noqa: B027
        """A node starts."""

    def update_handler(  # noqa: B027
        self, node_id: str, value: float, max_value: float, state: NodeProgressState, prompt_id: str, image: Any = None
    ) -> None:
        """A node reports `value` of `max_value`; `image` is (format, PIL image, max size) or None."""

    def finish_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:  # noqa: B027
        """A node is done."""

    def reset(self) -> None:  # noqa: B027
        """The prompt is over."""


class WebUIProgressHandler(ProgressHandler):
    """Sends `progress_state` messages and previews to the page that queued the prompt."""

    INTERVAL = 0.05
    SMALL = 24
    LARGE = 500  # nodes from which on the interval grows with their number

    def __init__(self, server_instance: Any) -> None:
        super().__init__("webui")
        self.server_instance = server_instance
        self.registry: ProgressRegistry | None = None
        self._lock = threading.Lock()
        self._sent_at = 0.0
        self._dirty = False
        self._timer: threading.Timer | None = None

    def set_registry(self, registry: ProgressRegistry) -> None:
        self.registry = registry

    def _describe(self, node_id: str) -> dict[str, Any]:
        registry = self.registry
        assert registry is not None
        prompt = registry.dynprompt
        return {
            "node_id": node_id,
            "prompt_id": registry.prompt_id,
            "display_node_id": prompt.get_display_node_id(node_id),
            "parent_node_id": prompt.get_parent_node_id(node_id),
            "real_node_id": prompt.get_real_node_id(node_id),
        }

    def _send(self) -> None:
        registry = self.registry
        if registry is None or self.server_instance is None:
            return
        self._dirty = False
        self._sent_at = time.monotonic()
        nodes = {
            node_id: {
                "value": state["value"],
                "max": state["max"],
                "state": state["state"].value,
                **self._describe(node_id),
            }
            for node_id, state in list(registry.nodes.items())
            if state["state"] is not NodeState.Pending
        }
        message = {"prompt_id": registry.prompt_id, "nodes": nodes}
        self.server_instance.send_sync("progress_state", message, self.server_instance.client_id)

    def _changed(self) -> None:
        registry = self.registry
        if registry is None:
            return
        with self._lock:
            interval = self.INTERVAL * max(1.0, len(registry.nodes) / self.LARGE)
            wait = self._sent_at + interval - time.monotonic()
            if len(registry.nodes) <= self.SMALL or wait <= 0:
                self._send()
                return
            self._dirty = True
            if self._timer is None:
                self._timer = threading.Timer(wait, self._flush)
                self._timer.daemon = True
                self._timer.start()

    def _flush(self) -> None:
        with self._lock:
            self._timer = None
            if self._dirty:
                self._send()

    def start_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        self._changed()

    def update_handler(
        self, node_id: str, value: float, max_value: float, state: NodeProgressState, prompt_id: str, image: Any = None
    ) -> None:
        self._changed()
        if image is None or self.server_instance is None:
            return
        from comfy_api import feature_flags

        server = self.server_instance
        if feature_flags.supports_feature(server.sockets_metadata, server.client_id, "supports_preview_metadata"):
            server.send_sync(
                BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, (image, self._describe(node_id)), server.client_id
            )

    def finish_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        self._changed()

    def reset(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._dirty:
                self._send()
            self.registry = None


class CLIProgressHandler(ProgressHandler):
    """Shows a bar per running node on the console."""

    def __init__(self) -> None:
        super().__init__("cli")
        self._bars: dict[str, Any] = {}

    def start_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        self._bar(node_id, state["max"])

    def _bar(self, node_id: str, total: float) -> Any:
        from tqdm import tqdm

        if node_id not in self._bars:
            self._bars[node_id] = tqdm(total=total, desc=f"Node {node_id}", unit="steps", leave=True)
        return self._bars[node_id]

    def update_handler(
        self, node_id: str, value: float, max_value: float, state: NodeProgressState, prompt_id: str, image: Any = None
    ) -> None:
        bar = self._bar(node_id, max_value)
        bar.total = max_value
        bar.update(value - bar.n)

    def finish_handler(self, node_id: str, state: NodeProgressState, prompt_id: str) -> None:
        bar = self._bars.pop(node_id, None)
        if bar is not None:
            bar.update(state["max"] - bar.n)
            bar.close()

    def reset(self) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()


class ProgressRegistry:
    """States of the nodes of one prompt."""

    def __init__(self, prompt_id: str, dynprompt: Any) -> None:
        self.prompt_id = prompt_id
        self.dynprompt = dynprompt
        self.nodes: dict[str, NodeProgressState] = {}
        self.handlers: dict[str, ProgressHandler] = {}

    def register_handler(self, handler: ProgressHandler) -> None:
        self.handlers[handler.name] = handler

    def unregister_handler(self, handler_name: str) -> None:
        self.handlers.pop(handler_name, None)

    def enable_handler(self, handler_name: str, enabled: bool = True) -> None:
        """Let a handler receive events again; nothing happens when there is none of that name."""
        handler = self.handlers.get(handler_name)
        if handler is not None:
            handler.enabled = enabled

    def disable_handler(self, handler_name: str) -> None:
        self.enable_handler(handler_name, enabled=False)

    def ensure_entry(self, node_id: str) -> NodeProgressState:
        """State of a node; new ones are pending."""
        return self.nodes.setdefault(node_id, NodeProgressState(state=NodeState.Pending, value=0, max=1))

    def _tell(self, event: str, *args: Any) -> None:
        for handler in list(self.handlers.values()):
            if handler.enabled:
                getattr(handler, event)(*args)

    def start_progress(self, node_id: str) -> None:
        entry = self.ensure_entry(node_id)
        entry.update({"state": NodeState.Running, "value": 0, "max": 1})
        self._tell("start_handler", node_id, entry, self.prompt_id)

    def update_progress(self, node_id: str, value: float, max_value: float, image: Any = None) -> None:
        entry = self.ensure_entry(node_id)
        entry.update({"state": NodeState.Running, "value": value, "max": max_value})
        self._tell("update_handler", node_id, value, max_value, entry, self.prompt_id, image)

    def finish_progress(self, node_id: str) -> None:
        entry = self.ensure_entry(node_id)
        entry.update({"state": NodeState.Finished, "value": entry["max"], "max": entry["max"]})
        self._tell("finish_handler", node_id, entry, self.prompt_id)

    def reset_handlers(self) -> None:
        """The prompt is over. A handler that fails is logged: it must not fail the next prompt, which resets it again."""
        for handler in list(self.handlers.values()):
            try:
                handler.reset()
            except Exception:  # noqa: BLE001 - packs add handlers
                logging.exception("progress handler %r failed at the end of prompt %s", handler.name, self.prompt_id)


class _NoPrompt:
    def get_display_node_id(self, node_id: str) -> str:
        return node_id

    get_real_node_id = get_display_node_id

    def get_parent_node_id(self, node_id: str) -> str | None:
        return None


global_progress_registry: ProgressRegistry | None = None


def reset_progress_state(prompt_id: str, dynprompt: Any) -> None:
    """Start the registry of a new prompt; handlers of the last one are finished."""
    global global_progress_registry
    if global_progress_registry is not None:
        global_progress_registry.reset_handlers()
    global_progress_registry = ProgressRegistry(prompt_id, dynprompt)


def get_progress_state() -> ProgressRegistry:
    """The running prompt's registry; an idle one before the first prompt."""
    global global_progress_registry
    if global_progress_registry is None:
        global_progress_registry = ProgressRegistry("", _NoPrompt())
    return global_progress_registry


def add_progress_handler(handler: ProgressHandler) -> None:
    """Show the running prompt's progress through `handler`, too."""
    registry = get_progress_state()
    handler.set_registry(registry)
    registry.register_handler(handler)


def install_progress_hook(server: Any) -> None:
    """Let `comfy.utils.ProgressBar` report to the page, and a cancelled prompt end at its next tick."""
    import comfy.model_management
    import comfy.utils

    def hook(value: float, total: float, preview: Any = None, prompt_id: Any = None, node_id: Any = None) -> None:
        context = get_executing_context()
        if context is not None:
            prompt_id = context.prompt_id if prompt_id is None else prompt_id
            node_id = context.node_id if node_id is None else node_id
        comfy.model_management.throw_exception_if_processing_interrupted()
        prompt_id = server.last_prompt_id if prompt_id is None else prompt_id
        node_id = server.last_node_id if node_id is None else node_id
        if node_id is None:
            logging.debug("progress outside of a node: %s of %s", value, total)
            return
        get_progress_state().update_progress(node_id, value, total, preview)
        message = {"value": value, "max": total, "prompt_id": prompt_id, "node": node_id}
        server.send_sync("progress", message, server.client_id)
        if preview is not None:
            from comfy_api import feature_flags

            if not feature_flags.supports_feature(
                server.sockets_metadata, server.client_id, "supports_preview_metadata"
            ):
                server.send_sync(BinaryEventTypes.UNENCODED_PREVIEW_IMAGE, preview, server.client_id)

    comfy.utils.set_progress_bar_global_hook(hook)
