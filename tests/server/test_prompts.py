"""Queueing over HTTP, and what a page hears over WebSocket."""

from __future__ import annotations

import asyncio
import json
import struct

import pytest
from aiohttp import WSMsgType

import execution
from comfy_execution.prompt_store import open_store
from server import BinaryEventTypes, PromptServer


def echo(value=1, **more):
    return {"prompt": {"1": {"class_type": "Echo", "inputs": {"value": value, "kind": "a"}}}, **more}


async def until(ws, kind, **fields):
    """Messages up to the first of a kind (with these data fields)."""
    seen = []
    while True:
        message = await ws.receive(timeout=10)
        assert message.type is WSMsgType.TEXT, message
        seen.append(json.loads(message.data))
        data = seen[-1]["data"]
        if seen[-1]["type"] == kind and all(data.get(key) == value for key, value in fields.items()):
            return seen


def test_a_prompt_is_run_and_told_about_in_order(serve):
    async def body(api):
        ws = await api.client.ws_connect("/ws?clientId=page")
        first = (await until(ws, "status"))[0]
        assert first["data"] == {"status": {"exec_info": {"queue_remaining": 0}}, "sid": "page"}
        answer = await api.json("POST", "/prompt", json=echo(client_id="page"))
        assert answer["node_errors"] == {}
        heard = await until(ws, "executing", node=None)
        kinds = [message["type"] for message in heard]
        assert "status" in kinds  # how many depends on how many waited: a newer one replaces it
        assert [kind for kind in kinds if kind != "status"] == [
            "execution_start",
            "execution_cached",
            "progress_state",
            "executing",
            "executed",
            "progress_state",
            "execution_success",
            "executing",
        ]
        history = await api.json("GET", f"/api/history/{answer['prompt_id']}")
        entry = history[answer["prompt_id"]]
        assert entry["outputs"] == {"1": {"value": [1], "kind": ["a"]}}
        assert entry["meta"]["1"]["real_node_id"] == "1"
        assert entry["status"]["status_str"] == "success"
        assert entry["status"]["completed"]
        assert await api.json("GET", "/prompt") == {"exec_info": {"queue_remaining": 0}}
        job = (await api.json("GET", "/api/jobs?status=completed&limit=5&offset=0"))["jobs"][0]
        assert job["id"] == answer["prompt_id"]
        assert (await api.json("GET", f"/api/jobs/{job['id']}"))["outputs"] == entry["outputs"]
        await api.json("POST", "/history", json={"clear": True})
        assert await api.json("GET", "/history") == {}

    serve(body)


def test_what_is_wrong_with_a_prompt_is_said(serve):
    async def body(api):
        nothing = await api.json("POST", "/prompt", 400, json={})
        assert nothing["error"]["type"] == "no_prompt"
        unknown = await api.json("POST", "/prompt", 400, json={"prompt": {"1": {"class_type": "X", "inputs": {}}}})
        assert unknown["error"]["type"] == "invalid_prompt"
        assert unknown["error"]["message"] == "Cannot execute because node X does not exist."
        none = await api.json("POST", "/prompt", 400, json={"prompt": {}})
        assert none["error"]["type"] == "prompt_no_outputs"
        wrong = await api.json("POST", "/prompt", 400, json=echo(value=101))
        assert wrong["error"]["type"] == "prompt_outputs_failed_validation"
        found = wrong["node_errors"]["1"]
        assert found["errors"][0]["type"] == "value_bigger_than_max"
        assert found["dependent_outputs"] == ["1"]
        assert found["class_type"] == "Echo"
        bad = await api.json("POST", "/prompt", 400, data=b"{not json")
        assert bad["error"]["type"] == "invalid_json"
        both = echo(value=1)
        both["prompt"]["2"] = {"class_type": "Echo", "inputs": {"value": "x", "kind": "c"}}
        accepted = await api.json("POST", "/prompt", json=both)
        kinds = [error["type"] for error in accepted["node_errors"]["2"]["errors"]]
        assert kinds == ["invalid_input_type", "value_not_in_list"]

    serve(body)


def test_the_queue_is_ordered_and_can_be_changed(serve):
    async def body(api):
        ids = []
        for more in ({}, {}, {"front": True}, {"number": 0.5}):
            answer = await api.json("POST", "/prompt", json=echo(extra_data={"api_key_comfy_org": "secret"}, **more))
            ids.append(answer["prompt_id"])
        queue = await api.json("GET", "/queue")
        assert queue["queue_running"] == []
        assert [item[1] for item in queue["queue_pending"]] == [ids[2], ids[0], ids[3], ids[1]]
        assert "secret" not in json.dumps(queue)
        assert queue["queue_pending"][0][4] == ["1"]
        pending = await api.json("GET", "/jobs?status=pending")
        assert pending["pagination"]["total"] == 4
        await api.json("POST", "/queue", json={"delete": [ids[0]]})
        assert (await api.json("POST", f"/jobs/{ids[3]}/cancel"))["cancelled"] is True
        assert len((await api.json("GET", "/queue"))["queue_pending"]) == 2
        await api.json("POST", "/queue", json={"clear": True})
        assert (await api.json("GET", "/prompt"))["exec_info"]["queue_remaining"] == 0

    serve(body, working=False)


def test_interrupt_and_free_reach_the_worker(serve, monkeypatch):
    import comfy.model_management

    flags = []
    monkeypatch.setattr(comfy.model_management, "interrupt_current_processing", lambda value=True: flags.append(value))

    async def body(api):
        await api.json("POST", "/interrupt", json={"prompt_id": "not running"})
        assert flags == []
        await api.json("POST", "/interrupt")
        assert flags == [True]
        await api.json("POST", "/free", json={"unload_models": True, "free_memory": True})
        assert api.server.prompt_queue.get_flags(reset=False) == {"unload_models": True, "free_memory": True}

    serve(body, working=False)


def test_prompt_handlers_see_every_prompt(serve):
    def before(server):
        def double(body):
            body["prompt"]["1"]["inputs"]["value"] *= 2
            return body

        def broken(body):
            raise RuntimeError("no")

        server.add_on_prompt_handler(broken)
        server.add_on_prompt_handler(double)

    async def body(api):
        await api.json("POST", "/prompt", json=echo(value=4))
        queue = await api.json("GET", "/queue")
        assert queue["queue_pending"][0][2]["1"]["inputs"]["value"] == 8

    serve(body, before=before, working=False)


@pytest.mark.parametrize("announced", [True, False])
def test_previews(serve, announced):
    from PIL import Image

    async def body(api):
        ws = await api.client.ws_connect("/ws?clientId=page")
        await until(ws, "status")
        await ws.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": announced}})
        flags = (await until(ws, "feature_flags"))[0]["data"]
        assert flags["supports_preview_metadata"] is True
        picture = ("JPEG", Image.new("RGB", (1024, 512)), 256)
        if announced:
            api.server.send_sync(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, (picture, {"node_id": "7"}), "page")
            data = (await ws.receive(timeout=5)).data
            event, length = struct.unpack(">II", data[:8])
            assert event == 4
            assert json.loads(data[8 : 8 + length]) == {"node_id": "7", "image_type": "image/jpeg"}
            assert data[8 + length :].startswith(b"\xff\xd8")
        else:
            api.server.send_sync(BinaryEventTypes.UNENCODED_PREVIEW_IMAGE, picture, "page")
            data = (await ws.receive(timeout=5)).data
            assert struct.unpack(">II", data[:8]) == (1, 1)
        api.server.send_progress_text("half", "7", "page")
        data = (await ws.receive(timeout=5)).data
        assert data == struct.pack(">II", 3, 1) + b"7half"

    serve(body)


def test_a_page_that_comes_back_replaces_its_old_connection(serve):
    async def body(api):
        old = await api.client.ws_connect("/ws?clientId=page")
        await until(old, "status")
        api.server.client_id, api.server.last_node_id = "page", "5"
        new = await api.client.ws_connect("/ws?clientId=page")
        assert (await until(new, "executing"))[-1]["data"] == {"node": "5"}
        await old.close()
        api.server.send_sync("hello", {}, "page")
        assert await until(new, "hello")

    serve(body)


def test_a_follower_has_the_same_shape_and_is_silent(folders):

    async def main():
        server = PromptServer(asyncio.get_running_loop(), listening=False)
        assert PromptServer.instance is server

        async def answer(request):
            return None

        server.routes.get("/pack")(answer)
        server.add_on_prompt_handler(lambda body: body)
        server.add_routes()
        server.send_sync("executing", {}, "page")
        assert server.messages.empty()
        with pytest.raises(RuntimeError, match="rank 0"):
            await server.start("127.0.0.1", 0)

    asyncio.run(main())


def test_listening_on_several_addresses(folders):

    import aiohttp

    async def main():
        server = PromptServer(asyncio.get_running_loop())
        server.add_routes()
        said = []
        await server.start_multi_address([("127.0.0.1", 0), ("127.0.0.2", 0)], lambda *where: said.append(where))
        assert said == [("http", "127.0.0.1", server.port)]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{server.port}/prompt") as response:
                assert response.status == 200
            other = PromptServer(asyncio.get_running_loop())
            other.add_routes()
            with pytest.raises(OSError, match="--port"):
                await other.start("127.0.0.1", server.port)
            await other.stop()
        port = server.port
        await server.stop()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(main())


def test_an_id_is_accepted_once(serve):
    async def body(api):
        post = lambda: api.client.post("/prompt", json=echo(prompt_id="mine"))  # noqa: E731
        answers = await asyncio.gather(*(post() for _ in range(6)))
        assert sorted(answer.status for answer in answers) == [200] + [409] * 5
        refused = next(answer for answer in answers if answer.status == 409)
        problem = await refused.json()
        assert problem["error"]["type"] == "duplicate_prompt_id" and "'mine'" in problem["error"]["message"]
        assert problem["node_errors"] == {}
        assert [item[1] for item in (await api.json("GET", "/queue"))["queue_pending"]] == ["mine"]
        await api.json("POST", "/queue", json={"delete": ["mine"]})
        await api.json("POST", "/prompt", json=echo(prompt_id="mine"))

    serve(body, working=False)


def test_an_id_in_the_history_is_not_accepted_again(serve):
    async def body(api):
        ws = await api.client.ws_connect("/ws?clientId=page")
        await api.json("POST", "/prompt", json=echo(prompt_id="mine", client_id="page"))
        await until(ws, "executing", node=None)
        await api.json("POST", "/prompt", 409, json=echo(prompt_id="mine"))
        await api.json("POST", "/history", json={"delete": ["mine"]})
        await api.json("POST", "/prompt", json=echo(prompt_id="mine"))

    serve(body)


def test_a_prompt_nested_too_deeply_is_refused(serve):
    def nested(levels):
        return json.loads("[" * levels + "]" * levels)

    async def body(api):
        for more in ({"extra_data": {"x": nested(300)}}, {"prompt_id": "deep"}):
            posted = echo(**more)
            posted["prompt"]["1"]["inputs"]["odd"] = nested(20 if "extra_data" in more else 300)
            answer = await api.json("POST", "/prompt", 400, json=posted)
            assert "more than 200 levels" in answer["error"]["message"]
        posted = echo(prompt_id="fine", extra_data={"x": nested(150)})
        await api.json("POST", "/prompt", json=posted)
        assert (await api.json("GET", "/queue"))["queue_pending"][0][1] == "fine"

    serve(body, working=False)


def test_history_and_jobs_outlive_the_process(serve, tmp_path):
    path = str(tmp_path / "prompts.sqlite3")
    seen = []

    def stored(server):
        server.prompt_queue = execution.PromptQueue(server, open_store(path))

    async def look(api):
        paths = ("/history", "/history?max_items=1", "/history/done", "/jobs?limit=9", "/jobs/done", "/jobs/waits")
        seen.append([await api.json("GET", path) for path in paths])

    async def first(api):
        await api.json("POST", "/prompt", json=echo(prompt_id="done"))
        taken, task_id = api.server.prompt_queue.get(0)
        status = execution.ExecutionStatus("success", True, [("execution_success", {"timestamp": 5})])
        api.server.prompt_queue.task_done(task_id, {"outputs": {"1": {"value": [1]}}, "meta": {}}, status)
        await api.json("POST", "/prompt", json=echo(prompt_id="waits"))
        await look(api)
        assert api.server.number == 2
        api.server.prompt_queue.close()

    async def second(api):
        await look(api)
        assert seen[0] == seen[1] and seen[0][2]["done"]["outputs"] == {"1": {"value": [1]}}
        answer = await api.json("POST", "/prompt", json=echo())
        assert answer["number"] == 2
        assert [item[0] for item in (await api.json("GET", "/queue"))["queue_pending"]] == [1, 2]
        api.server.prompt_queue.close()

    serve(first, before=stored, working=False)
    serve(second, before=stored, working=False)
