"""One turn of a node in the executor: its inputs, what the page is sent, where its results go."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from comfy_execution import writers
from comfy_execution.caching import CacheEntry, CacheSet
from comfy_execution.graph import node_class
from comfy_execution.graph_utils import ExecutionBlocker, is_link
from comfy_execution.inputs import SECRET_INPUTS, InputData, get_input_data, hidden_names
from comfy_execution.lockstep import RankError
from comfy_execution.outputs import format_value
from comfy_execution.progress import get_progress_state
from comfy_execution.ranks import Ranks
from comfy_execution.utils import full_type_name


class DuplicateNodeError(Exception):
    """A sub-graph uses a node id that the prompt already has."""


def failure(unique_id: str, error: BaseException, input_data_all: InputData | None) -> dict[str, Any]:
    inputs = {name: [format_value(value) for value in values] for name, values in (input_data_all or {}).items()}
    if isinstance(error, RankError):
        return {
            "node_id": unique_id,
            "exception_message": str(error),
            "exception_type": error.cause,
            "traceback": list(error.traceback),
            "current_inputs": inputs,
        }
    return {
        "node_id": unique_id,
        "exception_message": f"{error}\n",
        "exception_type": full_type_name(type(error)),
        "traceback": traceback.format_tb(error.__traceback__),
        "current_inputs": inputs,
    }


class NodeCall:
    """One turn of `execute` for one node: the steps that do not depend on the names custom nodes wrap."""

    def __init__(
        self,
        server: Any,
        dynprompt: Any,
        caches: CacheSet,
        unique_id: str,
        extra_data: Any,
        prompt_id: str,
        execution_list: Any,
    ) -> None:
        self.server = server
        self.dynprompt = dynprompt
        self.caches = caches
        self.unique_id = unique_id
        self.extra_data = extra_data
        self.prompt_id = prompt_id
        self.execution_list = execution_list
        self.ranks: Ranks = execution_list.ranks
        node = dynprompt.get_node(unique_id)
        self.inputs: dict[str, Any] = node["inputs"]
        self.class_type: str = node["class_type"]
        self.class_def: Any = node_class(self.class_type)
        self.display_node_id = dynprompt.get_display_node_id(unique_id)
        self.real_node_id = dynprompt.get_real_node_id(unique_id)
        self.first_only = self.ranks.first_only(unique_id)
        self.skipped = self.first_only and not self.ranks.lockstep.is_first
        self.input_data_all: InputData | None = None
        self.v3_data: dict[str, Any] = {}
        self.files: list[Future[None]] = []  # that the node is still writing
        self.announced = threading.Event()

    def instance(self) -> Any:
        obj = self.caches.objects.get(self.unique_id)
        if obj is None:
            obj = self.class_def()
            self.caches.objects.set(self.unique_id, obj)
        return obj

    def gather_inputs(self) -> dict[str, bool]:
        """Fill in the inputs; returns the names that are not there yet."""
        if not self.first_only:
            self.ranks.share_inputs(self.unique_id, self.execution_list.get_cache)
        return {} if self.skipped else self.read_inputs()

    def read_inputs(self) -> dict[str, bool]:
        """Fill in the inputs from what this rank has; the names that are not there yet."""
        self.input_data_all, missing, self.v3_data = get_input_data(
            self.inputs, self.class_def, self.unique_id, self.execution_list, self.dynprompt, self.extra_data
        )
        return missing

    def shown_inputs(self) -> InputData:
        """The inputs as an error report may show them: without keys and tokens."""
        hidden = self.class_def.INPUT_TYPES().get("hidden")
        secret = {name for name, kind in hidden_names(hidden) if isinstance(kind, str) and kind in SECRET_INPUTS}
        return {name: values for name, values in (self.input_data_all or {}).items() if name not in secret}

    def announce_start(self) -> None:
        self.server.last_node_id = self.display_node_id
        if self.ranks.lockstep.is_first:
            get_progress_state().start_progress(self.unique_id)
        if self.server.client_id is not None:
            message = {"node": self.unique_id, "display_node": self.display_node_id, "prompt_id": self.prompt_id}
            self.server.send_sync("executing", message, self.server.client_id)

    def announce_end(self) -> None:
        if self.ranks.lockstep.is_first:
            get_progress_state().finish_progress(self.unique_id)

    def wait_for_files(self) -> BaseException | None:
        """Wait until the node's files are written and the page was told; the first error."""
        self.announced.wait()
        errors = [future.exception() for future in self.files]
        return next((error for error in errors if error is not None), None)

    def announce_output(self, output: Any) -> None:
        if self.server.client_id is not None:
            message = {
                "node": self.unique_id,
                "display_node": self.display_node_id,
                "output": output,
                "prompt_id": self.prompt_id,
            }
            self.server.send_sync("executed", message, self.server.client_id)

    def announce_when_written(self, output: Any) -> None:
        """Send the page a node's output, as soon as its files are complete."""
        if self.files:
            self.execution_list.writing.append(self)
            self.announced = writers.when_done(self.files, partial(self.announce_output, output))
        else:
            self.announce_output(output)

    def blocked(self, executed: Any) -> Callable[[ExecutionBlocker], ExecutionBlocker]:
        """Handle a blocker that reaches this node: one with a message is reported, then blocks silently."""

        def report(block: ExecutionBlocker) -> ExecutionBlocker:
            if block.message is None:
                return block
            message = {
                "prompt_id": self.prompt_id,
                "node_id": self.unique_id,
                "node_type": self.class_type,
                "executed": list(executed),
                "exception_message": f"Execution Blocked: {block.message}",
                "exception_type": "ExecutionBlocked",
                "traceback": [],
                "current_inputs": [],
                "current_outputs": [],
            }
            self.server.send_sync("execution_error", message, self.server.client_id)
            return ExecutionBlocker(None)

        return report

    def store(self, ui: dict[str, Any], output: Any) -> None:
        entry_ui = None
        if ui:
            meta = {
                "node_id": self.unique_id,
                "display_node": self.display_node_id,
                "parent_node": self.dynprompt.get_parent_node_id(self.unique_id),
                "real_node_id": self.real_node_id,
            }
            entry_ui = {"meta": meta, "output": ui}
            self.announce_when_written(ui)
        owner = None
        if self.real_node_id != self.unique_id:
            owner = (self.real_node_id, self.dynprompt.get_node(self.real_node_id)["class_type"])
        entry = CacheEntry(entry_ui, output, first_only=self.first_only, owner=owner, files=self.files)
        self.caches.outputs.set(self.unique_id, entry)


def subgraph_links(results: list[Any]) -> list[Any]:
    """The (node id, slot) pairs that an expanded node's results are, of all its calls."""
    return [value for graph, result in results if graph is not None or result for value in result if is_link(value)]


async def expand(call: NodeCall, results: list[Any], pending_subgraph_results: dict[str, Any]) -> None:
    """Put the sub-graphs a node returned into the prompt; the node waits for those of their nodes it is linked to."""
    new_nodes: dict[str, dict[str, Any]] = {}
    for graph, _ in results:
        for node_id, info in (graph or {}).items():
            if call.dynprompt.has_node(node_id):
                raise DuplicateNodeError(
                    f"Attempt to add duplicate node {node_id}. Ensure node ids are unique and deterministic or use "
                    "graph_utils.GraphBuilder."
                )
            display = info.get("override_display_id", call.unique_id)
            call.dynprompt.add_ephemeral_node(node_id, info, call.unique_id, display)
            new_nodes[node_id] = info
    await call.execution_list.grow(new_nodes, call.unique_id)
    for node_id, info in new_nodes.items():
        if getattr(node_class(info["class_type"]), "OUTPUT_NODE", False):
            call.execution_list.add_node(node_id)
    for source, slot in subgraph_links(results):
        call.execution_list.hold(source, call.unique_id)
        call.execution_list.add_strong_link(source, slot, call.unique_id)
    pending_subgraph_results[call.unique_id] = results
