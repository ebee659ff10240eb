"""Running a prompt: one node after the other, each with the results of those before it.

`PromptExecutor` runs prompts; `execute` runs one node of one. Custom nodes wrap `execute`, `get_output_data` and
`_async_map_node_over_list`, so those are called through this module and keep ComfyUI's signatures. With several ranks
every rank runs this code for the same prompt; whatever could differ between them is asked of the lockstep object.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from enum import Enum
from typing import Any, NamedTuple

from comfy_execution.caching import CacheEntry, CacheSet, CacheType
from comfy_execution.executor import IsChangedCache, PromptExecutor
from comfy_execution.graph import DynamicPrompt, ExecutionBlocker, ExecutionList, is_async_node
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.inputs import InputData, calls, get_input_data, is_v3
from comfy_execution.node_call import DuplicateNodeError, NodeCall, expand, failure
from comfy_execution.outputs import collect_subgraph, format_value, get_output_from_returns, merge_result_data
from comfy_execution.prompt_queue import (
    MAXIMUM_HISTORY_SIZE,
    SENSITIVE_EXTRA_DATA_KEYS,
    ExecutionStatus,
    PromptQueue,
)
from comfy_execution.prompt_validation import full_type_name, validate_inputs, validate_prompt
from comfy_execution.ranks import DONE, EXPAND, PENDING
from comfy_execution.utils import CurrentNodeContext

__all__ = [
    "MAXIMUM_HISTORY_SIZE",
    "SENSITIVE_EXTRA_DATA_KEYS",
    "CacheEntry",
    "CacheSet",
    "CacheType",
    "DuplicateNodeError",
    "DynamicPrompt",
    "ExecutionBlocker",
    "ExecutionList",
    "ExecutionResult",
    "ExecutionStatus",
    "IsChangedCache",
    "PromptExecutor",
    "PromptQueue",
    "execute",
    "format_value",
    "full_type_name",
    "get_input_data",
    "get_output_data",
    "merge_result_data",
    "validate_inputs",
    "validate_prompt",
]


class ExecutionResult(Enum):
    SUCCESS = 0
    FAILURE = 1
    PENDING = 2


# ---- calling a node ------------------------------------------------------------------------------------------------


def _blocker_in(arguments: Mapping[str, Any], takes_lists: bool) -> ExecutionBlocker | None:
    for value in arguments.values():
        if isinstance(value, ExecutionBlocker):
            return value
        if takes_lists:
            for item in value:
                if isinstance(item, ExecutionBlocker):
                    return item
    return None


async def _async_map_node_over_list(
    prompt_id: str,
    unique_id: str,
    obj: Any,
    input_data_all: InputData,
    func: str,
    allow_interrupt: bool = False,
    execution_block_cb: Callable[[ExecutionBlocker], Any] | None = None,
    pre_execute_cb: Callable[[int], None] | None = None,
    v3_data: dict[str, Any] | None = None,
) -> list[Any]:
    """Call a node's function for every item of its inputs: a list of results, or of tasks where a call is not done.

    A call that would receive an ExecutionBlocker is left out; what `execution_block_cb` makes of it is the result.
    """
    takes_lists = bool(getattr(obj, "INPUT_IS_LIST", False))
    target = obj.PREPARE_CLASS_CLONE(v3_data) if is_v3(obj) else obj
    function = getattr(target, func)
    results: list[Any] = []
    all_calls = calls(input_data_all, takes_lists)
    for index, arguments in enumerate(all_calls):
        if allow_interrupt:
            import nodes

            nodes.before_node_execution()
        blocker = _blocker_in(arguments, takes_lists)
        if blocker is not None:
            results.append(execution_block_cb(blocker) if execution_block_cb else blocker)
            continue
        if pre_execute_cb is not None:
            pre_execute_cb(index)
        list_index = index if len(all_calls) > 1 else None
        if inspect.iscoroutinefunction(function):
            with CurrentNodeContext(prompt_id, unique_id, list_index):
                task = asyncio.ensure_future(function(**arguments))
            # a call that never really waits is done after one turn of the loop
            await asyncio.sleep(0)
            results.append(task.result() if task.done() else task)
        else:
            with CurrentNodeContext(prompt_id, unique_id, list_index):
                results.append(function(**arguments))
    return results


async def resolve_map_node_over_list_results(results: list[Any]) -> list[Any]:
    """Wait for the calls that are not done. Raises the first exception, in the order of the calls."""
    waiting = [result for result in results if isinstance(result, asyncio.Task)]
    if waiting:
        await asyncio.gather(*waiting, return_exceptions=True)
    return [result.result() if isinstance(result, asyncio.Task) else result for result in results]


async def get_output_data(
    prompt_id: str,
    unique_id: str,
    obj: Any,
    input_data_all: InputData,
    execution_block_cb: Callable[[ExecutionBlocker], Any] | None = None,
    pre_execute_cb: Callable[[int], None] | None = None,
    v3_data: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, Any], bool, bool]:
    """Run a node: `(outputs, ui, has_subgraph, has_pending_tasks)`; with pending tasks `outputs` are raw results."""
    return_values = await _async_map_node_over_list(
        prompt_id, unique_id, obj, input_data_all, obj.FUNCTION, True, execution_block_cb, pre_execute_cb, v3_data
    )
    if any(isinstance(value, asyncio.Task) and not value.done() for value in return_values):
        return return_values, {}, False, True
    return_values = await resolve_map_node_over_list_results(return_values)
    return (*get_output_from_returns(return_values, obj), False)


# ---- one node ------------------------------------------------------------------------------------------------------


async def _wanted_lazy_inputs(call: NodeCall, missing: dict[str, bool]) -> list[str]:
    """Names of inputs the node still asks for, decided by rank 0."""
    if not hasattr(call.class_def, "check_lazy_status"):
        return []

    async def ask() -> list[str]:
        assert call.input_data_all is not None
        target = call.class_def if is_v3(call.class_def) else call.instance()
        answers = await _async_map_node_over_list(
            call.prompt_id,
            call.unique_id,
            target,
            call.input_data_all,
            "check_lazy_status",
            allow_interrupt=False,
            v3_data=call.v3_data,
        )
        answers = await resolve_map_node_over_list_results(answers)
        names = [
            name
            for answer in answers
            if isinstance(answer, list | tuple | set | frozenset)
            for name in (sorted(answer) if isinstance(answer, set | frozenset) else answer)
        ]
        return [name for name in dict.fromkeys(names) if missing.get(name) or name not in call.input_data_all]

    return await call.ranks.decide_async("lazy inputs", ask)


class _Finished(NamedTuple):
    """Result of an asynchronous node that this rank has before rank 0 has its own."""

    output: Any
    ui: dict[str, Any]
    has_subgraph: bool


async def _run(call: NodeCall, executed: Any, pending_async_nodes: dict[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """Call the node (or collect a call begun earlier): `(outputs, ui, outcome)`."""
    unique_id = call.unique_id
    collecting = unique_id in pending_async_nodes
    is_async = is_async_node(call.class_def)
    output: Any = []
    ui: dict[str, Any] = {}
    has_subgraph = pending = False
    if not collecting:
        await call.ranks.align_random(call.first_only)
    if call.skipped:
        pending_async_nodes.pop(unique_id, None)
    elif collecting:
        begun = pending_async_nodes.pop(unique_id)
        if isinstance(begun, _Finished):
            output, ui, has_subgraph = begun
        else:
            values = await resolve_map_node_over_list_results(begun)
            output, ui, has_subgraph = get_output_from_returns(values, call.class_def)
    else:

        def before(call_index: int) -> None:
            GraphBuilder.set_default_prefix(unique_id, call_index, 0)

        # an asynchronous node is not alone: others run while it waits
        with call.ranks.lockstep.alone() if call.first_only and not is_async else nullcontext():
            output, ui, has_subgraph, pending = await get_output_data(
                call.prompt_id,
                unique_id,
                call.class_def if is_v3(call.class_def) else call.instance(),
                call.input_data_all or {},
                execution_block_cb=call.blocked(executed),
                pre_execute_cb=before,
                v3_data=call.v3_data,
            )
    outcome = PENDING if pending else EXPAND if has_subgraph else DONE
    if not call.ranks.several or not (call.first_only or is_async):
        return output, ui, outcome
    agreed = await call.ranks.decide("outcome", lambda: outcome)
    if call.first_only:
        if agreed == EXPAND:
            output = call.ranks.lockstep.share(f"sub-graph of node {unique_id}", lambda: output)
    elif outcome == PENDING and agreed != PENDING:
        values = await resolve_map_node_over_list_results(output)
        output, ui, has_subgraph = get_output_from_returns(values, call.class_def)
    elif outcome != PENDING and agreed == PENDING:
        # rank 0 is slower: keep what is finished here until it has its own
        output = _Finished(output, ui, has_subgraph)
    return output, ui, agreed


def _wait_for(call: NodeCall, begun: Any, pending_async_nodes: dict[str, Any]) -> None:
    """Set a node aside until the calls it has begun are done."""
    pending_async_nodes[call.unique_id] = begun
    unblock = call.execution_list.add_external_block(call.unique_id)

    async def wait() -> None:
        tasks = [task for task in begun if isinstance(task, asyncio.Task)] if isinstance(begun, list) else []
        await asyncio.gather(*tasks, return_exceptions=True)
        unblock()

    call.execution_list.background.append(asyncio.get_running_loop().create_task(wait()))


async def _execute_node(
    call: NodeCall, executed: Any, pending_subgraph_results: dict[str, Any], pending_async_nodes: dict[str, Any]
) -> ExecutionResult:
    unique_id = call.unique_id
    if unique_id in pending_subgraph_results:
        results = pending_subgraph_results.pop(unique_id)
        output = collect_subgraph(call.class_def, results, call.execution_list.get_cache)
        ui = call.execution_list.pending_ui.pop(unique_id, {})
    else:
        if unique_id not in pending_async_nodes:
            missing = call.gather_inputs()
            wanted = await _wanted_lazy_inputs(call, missing)
            if wanted:
                for name in wanted:
                    call.execution_list.make_input_strong_link(unique_id, name)
                return ExecutionResult.PENDING
            call.announce_start()
        output, ui, outcome = await _run(call, executed, pending_async_nodes)
        if outcome == PENDING:
            _wait_for(call, output, pending_async_nodes)
            return ExecutionResult.PENDING
        if outcome == EXPAND:
            await expand(call, output, pending_subgraph_results)
            call.execution_list.pending_ui[unique_id] = ui
            return ExecutionResult.PENDING
    call.store(ui, output)
    call.announce_end()
    return ExecutionResult.SUCCESS


async def execute(
    server: Any,
    dynprompt: DynamicPrompt,
    caches: CacheSet,
    current_item: str,
    extra_data: Mapping[str, Any],
    executed: Any,
    prompt_id: str,
    execution_list: Any,
    pending_subgraph_results: dict[str, Any],
    pending_async_nodes: dict[str, Any],
) -> tuple[ExecutionResult, dict[str, Any] | None, BaseException | None]:
    """Run the staged node: `(result, error report, exception)`; PENDING when it waits for other nodes or tasks.

    `execution_list` is the prompt's `comfy_execution.executor.PromptRun`.

    A node that fails here is announced to the other ranks. A node's own failure never raises.
    """
    unique_id = current_item
    call: NodeCall | None = None
    try:
        call = NodeCall(server, dynprompt, caches, unique_id, extra_data, prompt_id, execution_list)
        cached = caches.outputs.get(unique_id)
        if cached is not None:
            call.announce_output((cached.ui or {}).get("output"))
            call.announce_end()
            execution_list.keep_ui(unique_id, cached)
            return ExecutionResult.SUCCESS, None, None
        result = await _execute_node(call, executed, pending_subgraph_results, pending_async_nodes)
        if result is ExecutionResult.SUCCESS:
            executed.add(unique_id)
            execution_list.keep_ui(unique_id, caches.outputs.get(unique_id))
        return result, None, None
    except BaseException as error:  # noqa: BLE001 - whatever a node raises becomes a report, except the program's end
        if isinstance(error, KeyboardInterrupt | SystemExit | asyncio.CancelledError):
            raise
        real_node_id = dynprompt.get_real_node_id(unique_id)
        error = execution_list.ranks.lockstep.fail(error, real_node_id)
        return ExecutionResult.FAILURE, failure(real_node_id, error, call.shown_inputs() if call else None), error
