"""`PromptExecutor`: a whole prompt, from the first decision to the report of how it went."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from comfy import accounting
from comfy.weight_files import WeightFileChangedError
from comfy_execution import seams
from comfy_execution.caching import CacheSet, CacheType, RamCache, Signer, fingerprint, id_matters
from comfy_execution.graph import DependencyCycleError, DynamicPrompt, ExecutionList, NodeNotFoundError, node_class
from comfy_execution.graph_utils import ExecutionBlocker
from comfy_execution.inputs import get_input_data, has_function, is_v3
from comfy_execution.lockstep import NO_ANSWER, PROCESS_ENDED, Lockstep, RankError
from comfy_execution.node_call import NodeCall, failure
from comfy_execution.node_execution import ExecutionResult, ends_program, use_lockstep
from comfy_execution.progress import (
    WebUIProgressHandler,
    add_progress_handler,
    get_progress_state,
    reset_progress_state,
)
from comfy_execution.ranks import Ranks

RUN, INTERRUPT, CYCLE = "run", "interrupt", "cycle"


class Executed(dict[str, None]):
    """Ids of nodes in the order they ran; `add` like a set's."""

    def add(self, node_id: str) -> None:
        self[node_id] = None


class IsChangedCache:
    """What IS_CHANGED / fingerprint_inputs says about nodes, each asked once a prompt, with its constants only."""

    def __init__(self, prompt_id: str, dynprompt: DynamicPrompt, outputs_cache: Any = None) -> None:
        self.prompt_id = prompt_id
        self.dynprompt = dynprompt
        self.is_changed: dict[str, Any] = {}

    async def get(self, node_id: str) -> Any:
        """A list with an answer per call; False when the class has no such function; NaN when it failed."""
        if node_id not in self.is_changed:
            node = self.dynprompt.get_node(node_id)
            class_def = node_class(node["class_type"])
            name = has_function(class_def, "IS_CHANGED", "fingerprint_inputs")
            if name is None:
                return False
            self.is_changed[node_id] = await self._ask(node_id, node, class_def, name)
        return self.is_changed[node_id]

    async def _ask(self, node_id: str, node: Mapping[str, Any], class_def: Any, name: str) -> Any:
        try:
            values, _, v3_data = get_input_data(node["inputs"], class_def, node_id, None, self.dynprompt)
            answers = await seams.replaceable()._async_map_node_over_list(
                self.prompt_id, node_id, class_def, values, name, v3_data=v3_data
            )
            answers = await seams.replaceable().resolve_map_node_over_list_results(answers)
            return [None if isinstance(answer, ExecutionBlocker) else answer for answer in answers]
        except BaseException as error:  # noqa: BLE001 - a node that cannot say is run again
            if ends_program(error):
                raise
            logging.warning(
                "node %s (%s): %s failed, so it counts as changed: %s: %s",
                node_id,
                node["class_type"],
                name,
                type(error).__name__,
                error,
            )
            return float("nan")


class PromptRun(ExecutionList):
    """The execution list of one prompt, together with its signatures and with what the ranks have to agree on."""

    def __init__(self, prompt_id: str, dynprompt: DynamicPrompt, caches: CacheSet, lockstep: Lockstep) -> None:
        super().__init__(dynprompt, caches.outputs)
        self.caches = caches
        self.ranks = Ranks(lockstep, dynprompt)
        self.ui: dict[str, dict[str, Any]] = {}
        self.pending_ui: dict[str, dict[str, Any]] = {}
        self.writing: list[NodeCall] = []  # nodes that returned while their files were being written
        self.background: list[asyncio.Task[None]] = []
        self._is_changed = IsChangedCache(prompt_id, dynprompt, caches.outputs)
        self._changed: dict[str, bytes] = {}
        self._id_matters: dict[str, bool] = {}
        self._signer = Signer(dynprompt, self._changed, self._memo_id_matters)

    def _memo_id_matters(self, class_type: str) -> bool:
        if class_type not in self._id_matters:
            self._id_matters[class_type] = id_matters(class_type)
        return self._id_matters[class_type]

    async def prepare(self) -> list[str]:
        """Sign the prompt's nodes and tell the cache; the ids whose results every rank has."""
        nodes = [(node_id, node["class_type"]) for node_id, node in self.dynprompt.original_prompt.items()]
        signatures = await self._sign([node_id for node_id, _ in nodes])
        self.caches.objects.begin(self.dynprompt, nodes)
        self.caches.outputs.begin(signatures, set(nodes))
        return self._agree([node_id for node_id, _ in nodes])

    async def grow(self, new_nodes: Mapping[str, Mapping[str, Any]], parent_id: str) -> None:
        """Take note of the ephemeral nodes `parent_id` expanded into, before any of them is added."""
        self.ranks.add_links(new_nodes)
        signatures = await self._sign(list(new_nodes))
        real = self.dynprompt.get_real_node_id(parent_id)
        self.output_cache.grow(signatures, (real, self.dynprompt.get_node(real)["class_type"]))
        self._agree(list(new_nodes))

    async def _sign(self, node_ids: list[str]) -> dict[str, bytes]:
        if not self.output_cache.signed:
            return {}
        asked = [
            node_id
            for node_id in node_ids
            if has_function(
                node_class(self.dynprompt.get_node(node_id)["class_type"]), "IS_CHANGED", "fingerprint_inputs"
            )
        ]
        if asked:

            async def ask() -> dict[str, bytes]:
                return {node_id: fingerprint(await self._is_changed.get(node_id)) for node_id in asked}

            self._changed.update(await self.ranks.decide_async("IS_CHANGED", ask))
        return {node_id: self._signer.sign(node_id) for node_id in node_ids}

    def _agree(self, node_ids: list[str]) -> list[str]:
        mine = [node_id for node_id in node_ids if self.output_cache.get(node_id) is not None]
        if self.ranks.several:
            agreed = set(mine)
            for theirs in self.ranks.lockstep.gather("cached nodes", mine):
                agreed &= set(theirs)
            for node_id in mine:
                if node_id not in agreed:
                    self.output_cache.discard(node_id)
            mine = [node_id for node_id in mine if node_id in agreed]
        for node_id in mine:
            self.keep_ui(node_id, self.output_cache.get(node_id))
        return mine

    async def relieve(self) -> None:
        """With --cache-ram: drop results when memory is short, the same ones on every rank."""
        cache = self.output_cache
        if isinstance(cache, RamCache):

            def needed() -> set[str]:
                return {*self.pendingNodes, *(node_id for node_id, count in self._needed.items() if count)}

            cache.drop(await self.ranks.decide("results to drop", lambda: cache.relieve(needed)))

    def keep_ui(self, node_id: str, entry: Any) -> None:
        """Remember what the history shows for a node."""
        if entry is not None and entry.ui is not None:
            self.ui[node_id] = entry.ui

    def cancel(self) -> None:
        """Stop the asynchronous calls that are still under way."""
        for task in asyncio.all_tasks():
            if task is not asyncio.current_task():
                task.cancel()

    async def next_node(self) -> tuple[str, Any]:
        """Rank 0's choice: `(RUN, node)`, `(INTERRUPT, node)` or `(CYCLE, nodes)`."""
        self.ranks.lockstep.check()

        async def choose() -> tuple[str, Any]:
            import comfy.model_management

            node_id = await self.choose(comfy.model_management.processing_interrupted)
            if node_id is None:
                return CYCLE, self.get_nodes_in_cycle() or list(self.pendingNodes)
            if comfy.model_management.processing_interrupted():
                return INTERRUPT, node_id
            return RUN, node_id

        return await self.ranks.decide_async("node", choose)


class PromptExecutor:
    """Runs prompts one after the other and keeps results between them.

    `cache_type` and `cache_args` choose what is kept (see `CacheType`); `lockstep` connects the ranks. After `execute`,
    `success`, `status_messages`, `history_result` (`{"outputs", "meta"}`) and `failed_rank` say how it went, and
    `record` where its time went (`comfy.accounting`). `cancels_kept` is set by a queue that clears old cancels when it
    gives out a prompt; without it each prompt begins by clearing them. With `may_run_again` the loss of another rank's
    process is not reported, but left in `lost_rank`.
    """

    def __init__(
        self,
        server: Any,
        cache_type: CacheType | bool | None = None,
        cache_args: Mapping[str, Any] | None = None,
        lockstep: Lockstep | None = None,
    ) -> None:
        self.cache_args = cache_args
        self.cache_type = cache_type if isinstance(cache_type, CacheType) else CacheType.CLASSIC
        self.server = server
        self.lockstep = lockstep or Lockstep()
        self.cancels_kept = False
        self.may_run_again = False
        self.lost_rank: RankError | None = None
        self.record = accounting.Record()
        self.reset()

    def reset(self) -> None:
        """Forget every result and node instance."""
        self.caches = CacheSet(cache_type=self.cache_type, cache_args=self.cache_args)
        self.status_messages: list[tuple[str, dict[str, Any]]] = []
        self.history_result: dict[str, Any] = {}
        self.success = True
        self.failed_rank: int | None = None

    def add_message(self, event: str, data: dict[str, Any], broadcast: bool) -> None:
        """Send an event to the client (or to all when there is none and `broadcast`) and note it for the history."""
        data = {**data, "timestamp": int(time.time() * 1000)}
        self.status_messages.append((event, data))
        if self.server.client_id is None and not broadcast:
            return
        try:
            self.server.send_sync(event, data, self.server.client_id)
        except Exception:  # noqa: BLE001 - packs replace send_sync; how the prompt ends does not depend on it
            logging.exception("the message %s of prompt %s could not be sent", event, data.get("prompt_id"))

    def execute(
        self,
        prompt: dict[str, Any],
        prompt_id: str,
        extra_data: Mapping[str, Any] | None = None,
        execute_outputs: Iterable[str] = (),
    ) -> None:
        """Run a validated prompt. Never raises because of what a node, or another rank, does."""
        asyncio.run(self.execute_async(prompt, prompt_id, extra_data, execute_outputs))

    async def execute_async(
        self,
        prompt: dict[str, Any],
        prompt_id: str,
        extra_data: Mapping[str, Any] | None = None,
        execute_outputs: Iterable[str] = (),
    ) -> None:
        import torch

        import comfy.model_management

        extra_data = extra_data or {}
        if not self.cancels_kept:
            comfy.model_management.interrupt_current_processing(False)
        self.open(prompt_id, extra_data)
        self.add_message("execution_start", {"prompt_id": prompt_id}, broadcast=False)
        dynprompt = DynamicPrompt(prompt)
        if self.lockstep.is_first:
            reset_progress_state(prompt_id, dynprompt)
            add_progress_handler(WebUIProgressHandler(self.server))
        use_lockstep(self.lockstep)
        run = PromptRun(prompt_id, dynprompt, self.caches, self.lockstep)
        executed = Executed()
        try:
            with torch.inference_mode(), nullcontext() if self.lockstep.is_first else self.lockstep.computing:
                problem = await self._run_nodes(run, prompt_id, extra_data, list(execute_outputs), executed)
                problem = self._finish_files(run, problem)
                problem = self._close(problem)
        finally:
            run.cancel()
            if self.lockstep.is_first:
                get_progress_state().reset_handlers()
            self.server.last_node_id = None
            self.record = accounting.finish()
        self._report(run, prompt_id, prompt, executed, problem)
        if comfy.model_management.DISABLE_SMART_MEMORY:
            comfy.model_management.unload_all_models()

    def open(self, prompt_id: str, extra_data: Mapping[str, Any] | None) -> None:
        """Start the reports of a prompt: from here on nothing of the prompt before is left in them.

        The worker calls it before anything of a prompt can fail, `execute` once more when the prompt begins.
        """
        self.record = accounting.begin(prompt_id)
        self.server.client_id = extra_data.get("client_id") if isinstance(extra_data, Mapping) else None
        self.server.last_prompt_id = prompt_id
        self.server.last_node_id = None
        self.status_messages = []
        self.history_result = {"outputs": {}, "meta": {}}
        self.success = True
        self.failed_rank = None
        self.lost_rank = None

    def refuse(self, prompt_id: str, error: BaseException) -> None:
        """Report an opened prompt that failed outside of its nodes: before it could begin, or in the executor itself."""
        self.record = accounting.finish()
        self.success = False
        self.handle_execution_error(prompt_id, {}, [], [], failure("", error, None) | {"node_id": None}, error)

    async def _run_nodes(
        self, run: PromptRun, prompt_id: str, extra_data: Mapping[str, Any], outputs: list[str], executed: Executed
    ) -> tuple[dict[str, Any], BaseException] | None:
        """Run until nothing is left; the report and exception of the first failure, None when there was none."""
        current: str = outputs[0] if outputs else ""
        try:
            self.lockstep.begin(prompt_id)
            cached = await run.prepare()
            self.add_message("execution_cached", {"nodes": cached, "prompt_id": prompt_id}, broadcast=False)
            pending_subgraph_results: dict[str, Any] = {}
            pending_async_nodes: dict[str, Any] = {}
            for node_id in outputs:
                current = node_id
                run.add_node(node_id)
            run.start()
            while not run.is_empty():
                action, chosen = await run.next_node()
                current = _blamed(run.dynprompt, chosen) if action == CYCLE else chosen
                if action != RUN:
                    raise _agreed_end(action, chosen)
                run.stage(current)
                result, error, exception = await seams.replaceable().execute(
                    self.server,
                    run.dynprompt,
                    self.caches,
                    current,
                    extra_data,
                    executed,
                    prompt_id,
                    run,
                    pending_subgraph_results,
                    pending_async_nodes,
                )
                if result is ExecutionResult.FAILURE:
                    assert error is not None and exception is not None
                    return error, exception
                if result is ExecutionResult.PENDING:
                    run.unstage_node_execution()
                else:
                    run.complete_node_execution()
                    await run.relieve()
                run.start()
        except BaseException as error:  # noqa: BLE001 - the next prompt must always work
            if ends_program(error):
                raise
            return self._executor_failure(run, current, error)
        return None

    def _finish_files(self, run: PromptRun, problem: Any) -> Any:
        """Wait for the files that nodes are writing. One that cannot be written is the prompt's failure."""
        for call in run.writing:
            error = call.wait_for_files()
            if error is None:
                continue
            run.ui.pop(call.unique_id, None)
            self.caches.outputs.discard(call.unique_id)
            if problem is None:
                error = self.lockstep.fail(error, call.real_node_id)
                problem = failure(call.real_node_id, error, call.shown_inputs()), error
        for call in run.writing:
            call.files.clear()
        return problem

    def _executor_failure(
        self, run: PromptRun, node_id: str, error: BaseException
    ) -> tuple[dict[str, Any], BaseException]:
        node_id = run.dynprompt.get_real_node_id(node_id)
        error = self.lockstep.fail(error, node_id)
        return failure(node_id, error, None), error

    def _close(self, problem: tuple[dict[str, Any], BaseException] | None) -> Any:
        try:
            self.lockstep.end()
        except Exception as error:  # noqa: BLE001 - a rank that failed, or an interrupt that another one saw
            if problem is None:
                return failure(getattr(error, "node_id", None) or "", error, None), error
        return problem

    # ---- reports ---------------------------------------------------------------------------------------------------

    def _report(
        self,
        run: PromptRun,
        prompt_id: str,
        prompt: Mapping[str, Any],
        executed: Executed,
        problem: tuple[dict[str, Any], BaseException] | None,
    ) -> None:
        self.history_result = {
            "outputs": {node_id: ui["output"] for node_id, ui in run.ui.items()},
            "meta": {node_id: ui["meta"] for node_id, ui in run.ui.items()},
        }
        if problem is None:
            self.add_message("execution_success", {"prompt_id": prompt_id}, broadcast=False)
            return
        self.success = False
        ex = problem[1]
        if self.may_run_again and isinstance(ex, RankError) and ex.cause in (NO_ANSWER, PROCESS_ENDED):
            self.lost_rank = ex
        else:
            self.handle_execution_error(prompt_id, prompt, list(executed), list(executed), *problem)

    def handle_execution_error(
        self,
        prompt_id: str,
        prompt: Mapping[str, Any],
        current_outputs: Iterable[str],
        executed: Iterable[str],
        error: dict[str, Any],
        ex: BaseException,
    ) -> None:
        """Tell the client how the prompt failed; after an out-of-memory, free what can be freed."""
        import comfy.model_management

        node_id = error["node_id"]
        if isinstance(ex, RankError) and ex.node_id:
            node_id = ex.node_id
        message = {
            "prompt_id": prompt_id,
            "node_id": node_id,
            "node_type": prompt.get(node_id, {}).get("class_type"),
            "executed": list(executed),
        }
        interrupted = comfy.model_management.InterruptProcessingException
        if isinstance(ex, interrupted) or (isinstance(ex, RankError) and ex.cause == interrupted.__name__):
            logging.info("Processing interrupted")
            self.add_message("execution_interrupted", message, broadcast=True)
            return
        self.failed_rank = ex.rank if isinstance(ex, RankError) else self.lockstep.rank
        details = dict(error)
        details.pop("node_id")
        if _out_of_memory(ex):
            details["exception_message"] += (
                "\nThis error means you ran out of memory on your GPU.\n\nTIPS: use a smaller size or batch; if the "
                "workflow worked before, load the diffusion model in a smaller weight type or add a GPU."
            )
        self._log_failure(node_id, message["node_type"], details, ex)
        self.add_message(
            "execution_error", {**message, **details, "current_outputs": list(current_outputs)}, broadcast=False
        )
        if _out_of_memory(ex):
            logging.error("Got an OOM, unloading all loaded models.")
            comfy.model_management.unload_all_models()
        if getattr(ex, "cause", type(ex).__name__) == WeightFileChangedError.__name__:  # on this rank or another one
            logging.warning("A weight file has changed: all kept results are dropped, and it is loaded anew.")
            self.caches = CacheSet(cache_type=self.cache_type, cache_args=self.cache_args)

    def _log_failure(
        self, node_id: str | None, node_type: str | None, details: Mapping[str, Any], ex: BaseException
    ) -> None:
        """The traceback is logged once, on rank 0; other ranks log one line each."""
        reason = details["exception_message"].rstrip()
        if not self.lockstep.is_first:
            logging.warning(
                "node %s (%s): %s",
                node_id,
                node_type,
                reason.splitlines()[0] if reason else type(ex).__name__,
                extra={"reported": True},
            )
            return
        foreign = isinstance(ex, RankError)
        where = "\n" + "".join(details["traceback"]).rstrip() if foreign and details["traceback"] else ""
        logging.error(
            "!!! Exception during processing !!! node %s (%s): %s%s",
            node_id,
            node_type,
            reason,
            where,
            exc_info=None if foreign else ex,
            extra={"reported": True},
        )


def _blamed(prompt: DynamicPrompt, cycle: list[str]) -> str:
    """The node that an error names for a cycle: the one that expanded into a part of it, else the cycle's first."""
    shown = ((node_id, prompt.get_display_node_id(node_id)) for node_id in cycle)
    return next((display for node_id, display in shown if display != node_id), cycle[0])


def _agreed_end(action: str, chosen: Any) -> Exception:
    """The exception that ends a prompt on every rank at once; marked, so that no rank reports it to the others."""
    import comfy.model_management

    error: Any
    if action == INTERRUPT:
        comfy.model_management.interrupt_current_processing(False)
        error = comfy.model_management.InterruptProcessingException()
    else:
        error = DependencyCycleError(f"Dependency cycle detected: {', '.join(chosen)} wait for each other")
    error.agreed = True
    return error


def _out_of_memory(error: BaseException) -> bool:
    """Whether this rank or another one ran out of memory; every rank gives the same answer."""
    import comfy.model_management

    if isinstance(error, RankError):
        return error.cause.rsplit(".", 1)[-1] in ("OutOfMemoryError", comfy.model_management.OOM_EXCEPTION.__name__)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)


__all__ = ["CacheType", "IsChangedCache", "NodeNotFoundError", "PromptExecutor", "PromptRun", "id_matters", "is_v3"]
