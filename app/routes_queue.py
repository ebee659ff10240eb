"""Routes about prompts: queueing, what runs, what ran, stopping."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from typing import Any

from aiohttp import web

from app.responses import bad_request, dumps, json_body, json_object, json_response, listed
from comfy_execution import jobs
from comfy_execution.prompt_queue import DuplicatePromptError, QueueItem, without_secrets

DEEPEST = 200  # levels of nested values in a prompt


def _number(value: str | None, name: str, default: int | None) -> int | None:
    if value is None:
        return default
    try:
        return int(value)
    except ValueError:
        raise web.HTTPBadRequest(text=f"{name} must be a whole number, not {value!r}") from None


def _priority(server: Any, body: dict[str, Any]) -> float:
    """Where a prompt goes in the queue: its number if it has one, else after or (`front`) before the others."""
    if "number" not in body:
        server.number += 1
        return 1 - server.number if body.get("front") else server.number - 1
    try:
        number = float(body["number"])
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise bad_request("invalid_prompt", f"number must be a finite number, not {str(body['number'])[:50]!r}")
    return number


def _too_deep(value: Any) -> bool:
    """Whether lists and objects are nested in a value more deeply than can be encoded, copied and compared everywhere."""
    level = [value]
    for _ in range(DEEPEST + 1):
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _conflict(error: DuplicatePromptError) -> web.Response:
    problem = {
        "type": "duplicate_prompt_id",
        "message": str(error),
        "details": "It waits, runs or is in the history; send another prompt_id, or none",
        "extra_info": {},
    }
    return json_response({"error": problem, "node_errors": {}}, 409)


async def _queue_prompt(server: Any, body: Any) -> web.Response:
    import execution

    body = server.trigger_on_prompt(body)
    if not isinstance(body, dict) or "prompt" not in body:
        error = {
            "type": "no_prompt",
            "message": "No prompt provided",
            "details": "No prompt provided",
            "extra_info": {},
        }
        return json_response({"error": error, "node_errors": {}}, 400)
    if not isinstance(body["prompt"], dict):
        raise bad_request("invalid_prompt", "The prompt is not an object of nodes")
    extra_data = body.get("extra_data") or {}
    if not isinstance(extra_data, dict):
        raise bad_request("invalid_prompt", f"extra_data must be an object, not {type(extra_data).__name__}")
    if _too_deep(body["prompt"]) or _too_deep(extra_data):
        raise bad_request("invalid_prompt", f"the prompt's values are nested more than {DEEPEST} levels deep")
    number = _priority(server, body)
    prompt_id = str(body.get("prompt_id") or uuid.uuid4())
    if server.prompt_queue.knows(prompt_id):
        return _conflict(DuplicatePromptError(prompt_id))
    targets = None if body.get("partial_execution_targets") is None else listed(body, "partial_execution_targets")
    valid, problem, outputs, node_errors = await execution.validate_prompt(
        prompt_id, body["prompt"], targets if targets is None else [str(target) for target in targets]
    )
    if not valid:
        logging.warning("invalid prompt: %s", problem)
        return json_response({"error": problem, "node_errors": node_errors}, 400)
    extra_data = dict(extra_data)
    if body.get("client_id") is not None:
        extra_data["client_id"] = str(body["client_id"])
    extra_data["create_time"] = int(time.time() * 1000)
    item = (number, prompt_id, body["prompt"], extra_data, outputs)
    try:
        await asyncio.to_thread(server.prompt_queue.accept, item)  # it is on disk before the client is answered
    except DuplicatePromptError as error:
        return _conflict(error)
    return json_response({"prompt_id": prompt_id, "number": number, "node_errors": node_errors})


class _WaitingTexts:
    """JSON of the waiting prompts, each encoded once: many pages ask for a queue that may be long."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[QueueItem, str]] = {}

    def of(self, items: list[QueueItem]) -> list[str]:
        """In the order of `items`; what does not wait any more is forgotten."""
        known: dict[int, tuple[QueueItem, str]] = {}
        for item in items:
            before = self._known.get(id(item))
            if before is None or before[0] is not item:
                before = (item, dumps(without_secrets(item)))
            known[id(item)] = before
        self._known = known
        return [text for _, text in known.values()]


def _add_queue(routes: web.RouteTableDef, server: Any) -> None:
    texts = _WaitingTexts()

    @routes.get("/prompt")
    async def get_prompt(request: web.Request) -> web.Response:
        return json_response(server.get_queue_info())

    @routes.post("/prompt")
    async def post_prompt(request: web.Request) -> web.Response:
        return await _queue_prompt(server, await json_body(request))

    @routes.get("/queue")
    async def get_queue(request: web.Request) -> web.Response:
        with server.prompt_queue.mutex:
            running, _ = server.prompt_queue.get_current_queue_volatile()
            pending = server.prompt_queue.queue
        waiting = ", ".join(texts.of(pending))
        body = f'{{"queue_running": {dumps(running)}, "queue_pending": [{waiting}]}}'
        return web.Response(text=body, content_type="application/json")

    @routes.post("/queue")
    async def post_queue(request: web.Request) -> web.Response:
        body = await json_object(request)
        deleted = listed(body, "delete")
        if body.get("clear"):
            await asyncio.to_thread(server.prompt_queue.wipe_queue)
        for prompt_id in deleted:
            await asyncio.to_thread(
                server.prompt_queue.delete_queue_item, lambda item, wanted=prompt_id: item[1] == wanted
            )
        return web.Response()


def _add_history(routes: web.RouteTableDef, server: Any) -> None:
    async def answer(**which: Any) -> web.Response:
        text = await asyncio.to_thread(server.prompt_queue.history_json, **which)
        return web.Response(text=text, content_type="application/json")

    @routes.get("/history")
    async def get_history(request: web.Request) -> web.Response:
        max_items = _number(request.query.get("max_items"), "max_items", None)
        offset = _number(request.query.get("offset"), "offset", -1)
        return await answer(max_items=max_items, offset=offset)

    @routes.get("/history/{prompt_id}")
    async def get_history_item(request: web.Request) -> web.Response:
        return await answer(prompt_id=request.match_info["prompt_id"])

    @routes.post("/history")
    async def post_history(request: web.Request) -> web.Response:
        body = await json_object(request)
        deleted = listed(body, "delete")
        if body.get("clear"):
            await asyncio.to_thread(server.prompt_queue.wipe_history)
        for prompt_id in deleted:
            await asyncio.to_thread(server.prompt_queue.delete_history_item, str(prompt_id))
        return web.Response()


def _interrupt(server: Any, prompt_id: str | None) -> bool:
    """Stop the running prompt, if it is `prompt_id` (None: whichever runs); whether one was asked to stop."""
    stopped = server.prompt_queue.interrupt(prompt_id)
    if not stopped:
        logging.info("prompt %s is not running, so it is not interrupted", prompt_id)
    return stopped


def _add_control(routes: web.RouteTableDef, server: Any) -> None:
    @routes.post("/interrupt")
    async def post_interrupt(request: web.Request) -> web.Response:
        body = await json_body(request, required=False)
        _interrupt(server, body.get("prompt_id") if isinstance(body, dict) else None)
        return web.Response()

    @routes.post("/free")
    async def post_free(request: web.Request) -> web.Response:
        body = await json_object(request)
        for flag in ("unload_models", "free_memory"):
            if body.get(flag):
                server.prompt_queue.set_flag(flag, True)
        return web.Response()


def _cancel(server: Any, prompt_id: str) -> bool:
    """Take a waiting prompt out of the queue or stop it when it runs."""
    if server.prompt_queue.delete_queue_item(lambda item: item[1] == prompt_id):
        return True
    return _interrupt(server, prompt_id)


def _add_jobs(routes: web.RouteTableDef, server: Any) -> None:
    def every_job() -> list[dict[str, Any]]:
        with server.prompt_queue.mutex:
            running, waiting = server.prompt_queue.get_current_queue_volatile()
            return jobs.all_jobs(running, waiting, server.prompt_queue.history_jobs())

    def find(job_id: str) -> dict[str, Any] | None:
        with server.prompt_queue.mutex:
            running, waiting = server.prompt_queue.get_current_queue_volatile()
        for items, status in ((running, jobs.IN_PROGRESS), (waiting, jobs.PENDING)):
            for item in items:
                if item[1] == job_id:
                    return jobs.detailed(jobs.from_item(item, status), item)
        entry = server.prompt_queue.history.get(job_id)
        return None if entry is None else jobs.detailed(jobs.from_history(entry), entry["prompt"], entry)

    @routes.get("/jobs")
    async def get_jobs(request: web.Request) -> web.Response:
        query = request.query
        status = {word for word in query.get("status", "").split(",") if word}
        unknown = status - set(jobs.STATUSES)
        if unknown:
            raise web.HTTPBadRequest(text=f"unknown status {sorted(unknown)[0]!r}; use {', '.join(jobs.STATUSES)}")
        limit = _number(query.get("limit"), "limit", None)
        offset = _number(query.get("offset"), "offset", 0) or 0
        order = query.get("sort_by", "created_at"), query.get("sort_order", "desc")

        def chosen() -> dict[str, Any]:
            return jobs.page(jobs.select(every_job(), status, query.get("workflow_id"), *order), limit, max(offset, 0))

        return json_response(await asyncio.to_thread(chosen))

    @routes.get("/jobs/{job_id}")
    async def get_job(request: web.Request) -> web.Response:
        job = await asyncio.to_thread(find, request.match_info["job_id"])
        if job is None:
            return json_response({"error": "Job not found"}, 404)
        return json_response(job)

    @routes.post("/jobs/{job_id}/cancel")
    async def cancel_job(request: web.Request) -> web.Response:
        job_id = request.match_info["job_id"]
        return json_response({"id": job_id, "cancelled": await asyncio.to_thread(_cancel, server, job_id)})

    @routes.post("/jobs/cancel")
    async def cancel_jobs(request: web.Request) -> web.Response:
        body = await json_object(request)
        job_ids = listed(body, "job_ids")
        cancelled = [job_id for job_id in job_ids if await asyncio.to_thread(_cancel, server, job_id)]
        return json_response({"cancelled": cancelled})


def add_routes(routes: web.RouteTableDef, server: Any) -> None:
    """/prompt, /queue, /history, /interrupt, /free and /jobs."""
    _add_queue(routes, server)
    _add_history(routes, server)
    _add_control(routes, server)
    _add_jobs(routes, server)
