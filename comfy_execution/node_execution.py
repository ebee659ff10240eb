"""Running one node of a prompt. Names that custom nodes replace are called through `seams.replaceable()`.

With several ranks every rank runs this code for the same prompt; whatever could differ between them is asked of the
lockstep object.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from comfy_execution import async_calls, seams, writers
from comfy_execution.caching import CacheSet
from comfy_execution.graph import DynamicPrompt, ExecutionBlocker, is_async_node
from comfy_execution.graph_utils import GraphBuilder
from comfy_execution.inputs import InputData, calls, is_v3
from comfy_execution.lockstep import Lockstep
from comfy_execution.node_call import NodeCall, expand, failure, subgraph_links
from comfy_execution.outputs import collect_subgraph, get_output_from_returns
from comfy_execution.ranks import DONE, EXPAND, PENDING
from comfy_execution.utils import CurrentNodeContext

# the lockstep of the running prompt, for calls of nodes: their signatures are ComfyUI's
_lockstep: ContextVar[Lockstep] = ContextVar("comfy_lockstep")


def use_lockstep(lockstep: Lockstep) -> None:
    """Calls of nodes in this context are those of a prompt that `lockstep` connects."""
    _lockstep.set(lockstep)


def _current_lockstep() -> Lockstep:
    return _lockstep.get(None) or Lockstep()


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

    A call that would receive an ExecutionBlocker is left out; the result is what `execution_block_cb` returns for it.
    """
    takes_lists = bool(getattr(obj, "INPUT_IS_LIST", False))
    target = obj.PREPARE_CLASS_CLONE(v3_data) if is_v3(obj) else obj
    function = getattr(target, func)
    results: list[Any] = []
    lockstep = _current_lockstep()
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
                name = f"node {unique_id}, {func} ({index})"
                task = await async_calls.begin(lockstep, prompt_id, name, partial(function, **arguments))
            results.append(task.result() if task.done() else task)
        else:
            with CurrentNodeContext(prompt_id, unique_id, list_index), writers.called_by_executor(obj):
                results.append(function(**arguments))
    return results


async def resolve_map_node_over_list_results(results: list[Any]) -> list[Any]:
    """Wait for the calls that are not done. Raises the first exception, in the order of the calls."""
    waiting = [result for result in results if isinstance(result, asyncio.Task)]
    if waiting:
        await async_calls.finish(_current_lockstep(), waiting)
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
    return_values = await seams.replaceable()._async_map_node_over_list(
        prompt_id, unique_id, obj, input_data_all, obj.FUNCTION, True, execution_block_cb, pre_execute_cb, v3_data
    )
    if any(isinstance(value, asyncio.Task) and not value.done() for value in return_values):
        return return_values, {}, False, True
    return_values = await seams.replaceable().resolve_map_node_over_list_results(return_values)
    return (*get_output_from_returns(return_values, obj), False)


def ends_program(error: BaseException) -> bool:
    """Whether an exception is meant for the program rather than an accident of a node: Ctrl-C, or its cancel of the loop."""
    if isinstance(error, asyncio.CancelledError):
        try:
            current = asyncio.current_task()
        except RuntimeError:  # outside of an event loop nothing can be cancelled
            return False
        return current is not None and current.cancelling() > 0
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


# ---- one node ------------------------------------------------------------------------------------------------------


async def _wanted_lazy_inputs(call: NodeCall, missing: dict[str, bool]) -> list[str]:
    """Names of inputs the node still asks for, decided by rank 0."""
    if not hasattr(call.class_def, "check_lazy_status"):
        return []

    async def ask() -> list[str]:
        assert call.input_data_all is not None
        target = call.class_def if is_v3(call.class_def) else call.instance()
        answers = await seams.replaceable()._async_map_node_over_list(
            call.prompt_id,
            call.unique_id,
            target,
            call.input_data_all,
            "check_lazy_status",
            allow_interrupt=False,
            v3_data=call.v3_data,
        )
        answers = await seams.replaceable().resolve_map_node_over_list_results(answers)
        names = [
            name
            for answer in answers
            if isinstance(answer, list | tuple | set | frozenset)
            for name in (sorted(answer) if isinstance(answer, set | frozenset) else answer)
        ]
        return [name for name in dict.fromkeys(names) if missing.get(name) or name not in call.input_data_all]

    return await call.ranks.decide_async("lazy inputs", ask)


def _is_watched() -> bool:
    """Whether a pack replaced a function through which nodes are called: it may read a node's files when it returns."""
    used = seams.replaceable()
    return (used.execute, used.get_output_data, used._async_map_node_over_list) != (
        execute,
        get_output_data,
        _async_map_node_over_list,
    )


class _Finished(NamedTuple):
    """Result of an asynchronous node that this rank has before rank 0 has its own."""

    output: Any
    ui: dict[str, Any]
    has_subgraph: bool


async def _call(call: NodeCall, executed: Any) -> tuple[Any, dict[str, Any], bool, bool]:
    """Call the node's function on this rank; what `get_output_data` returns."""

    def before(call_index: int) -> None:
        GraphBuilder.set_default_prefix(call.unique_id, call_index, 0)

    alone: AbstractContextManager[Any] = call.ranks.lockstep.alone() if call.first_only else nullcontext()
    collecting_files: AbstractContextManager[Any] = nullcontext([]) if _is_watched() else writers.collecting()
    with alone, call.ranks.files_aside(call.class_def), collecting_files as call.files:
        return await seams.replaceable().get_output_data(
            call.prompt_id,
            call.unique_id,
            call.class_def if is_v3(call.class_def) else call.instance(),
            call.input_data_all or {},
            execution_block_cb=call.blocked(executed),
            pre_execute_cb=before,
            v3_data=call.v3_data,
        )


async def _hand_over(call: NodeCall, output: Any, ui: dict[str, Any], executed: Any) -> tuple[Any, dict[str, Any]]:
    """Give the other ranks what a node returned on rank 0; where it cannot be sent, they run the node by themselves.

    Their random generators are where rank 0's were before it ran the node, and their inputs are the same.
    """
    sent, values = call.ranks.lockstep.offer(f"outputs of node {call.unique_id}", lambda: output)
    if not sent:
        call.ranks.share_inputs(call.unique_id, call.execution_list.get_cache)
        if call.skipped:
            call.read_inputs()
            values, ui, has_subgraph, _ = await _call(call, executed)
            if has_subgraph:
                raise RuntimeError(f"{call.class_type} expanded into nodes on this rank, but not on rank 0")
    call.first_only = False  # every rank has the outputs
    return values, ui


async def _run(call: NodeCall, executed: Any, pending_async_nodes: dict[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """Call the node (or collect a call begun earlier): `(outputs, ui, outcome)`."""
    unique_id = call.unique_id
    collecting = unique_id in pending_async_nodes
    is_async = is_async_node(call.class_def)
    output: Any = []
    ui: dict[str, Any] = {}
    has_subgraph = pending = False
    if not collecting:
        await call.ranks.align_random(unique_id, call.first_only)
    if call.skipped:
        pending_async_nodes.pop(unique_id, None)
    elif collecting:
        begun = pending_async_nodes.pop(unique_id)
        if isinstance(begun, _Finished):
            output, ui, has_subgraph = begun
        else:
            values = await seams.replaceable().resolve_map_node_over_list_results(begun)
            output, ui, has_subgraph = get_output_from_returns(values, call.class_def)
    else:
        output, ui, has_subgraph, pending = await _call(call, executed)
    outcome = PENDING if pending else EXPAND if has_subgraph else DONE
    if not call.ranks.several:
        return output, ui, outcome
    if not (call.first_only or is_async):
        if outcome == DONE:
            output = call.ranks.agree_on_texts(unique_id, output)
        return output, ui, outcome
    agreed = await call.ranks.decide("outcome", lambda: outcome)
    if call.first_only:
        if agreed == EXPAND:
            output = call.ranks.lockstep.share(f"sub-graph of node {unique_id}", lambda: output)
        elif agreed == DONE and call.ranks.hands_over(unique_id, call.first_only):
            output, ui = await _hand_over(call, output, ui, executed)
    elif outcome == PENDING and agreed != PENDING:
        values = await seams.replaceable().resolve_map_node_over_list_results(output)
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
        call.ranks.share_results(subgraph_links(results), call.execution_list.get_cache)
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
            call.files = cached.files
            call.announce_when_written((cached.ui or {}).get("output"))
            call.announce_end()
            execution_list.keep_ui(unique_id, cached)
            return ExecutionResult.SUCCESS, None, None
        result = await _execute_node(call, executed, pending_subgraph_results, pending_async_nodes)
        if result is ExecutionResult.SUCCESS:
            executed.add(unique_id)
            execution_list.keep_ui(unique_id, caches.outputs.get(unique_id))
        return result, None, None
    except BaseException as error:  # noqa: BLE001 - whatever a node raises becomes a report, except the program's end
        if ends_program(error):
            raise
        real_node_id = dynprompt.get_real_node_id(unique_id)
        error = execution_list.ranks.lockstep.fail(error, real_node_id)
        return ExecutionResult.FAILURE, failure(real_node_id, error, call.shown_inputs() if call else None), error


seams.provide(sys.modules[__name__])
