"""Headless Chromium, driven through its DevTools protocol with the HTTP library the server already uses."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import aiohttp

START_S = 30.0


def executable() -> str | None:
    """Chromium's path, or None."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


class Browser:
    """One page in a browser of its own, as a context manager.

    `errors` collects what the page wrote to the console as errors and exceptions nobody caught. `answer` stands in for a
    service of another site.
    """

    def __init__(self, profile: str, size: tuple[int, int] = (1400, 900)) -> None:
        self.errors: list[str] = []
        self._profile = profile
        self._size = size
        self._loop = asyncio.new_event_loop()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._services: dict[str, Callable[[str, Any], Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._number = 0
        self._loaded = threading.Event()

    def __enter__(self) -> Browser:
        self._process = subprocess.Popen(
            [executable() or "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             f"--window-size={self._size[0]},{self._size[1]}", f"--user-data-dir={self._profile}",
             "--remote-debugging-port=0", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        port = self._debugging_port()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._connect(port))
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def _debugging_port(self) -> int:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            found = re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line)
            if found:
                self._drain = threading.Thread(target=self._process.stderr.read, daemon=True)
                self._drain.start()
                return int(found.group(1))
        raise RuntimeError("Chromium ended without opening its debugging port")

    def __exit__(self, *exc: object) -> None:
        self._do(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
        self._process.terminate()
        self._process.wait(timeout=10)
        assert self._process.stderr is not None
        self._drain.join(10)
        if not self._drain.is_alive():  # else a process of the browser's still has it
            self._process.stderr.close()

    def _do(self, work: Any, timeout: float = START_S) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    async def _connect(self, port: int) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            page = next(target for target in await answer.json() if target["type"] == "page")
        self._socket = await self._session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for frame in self._socket:
            message = json.loads(frame.data)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            elif message["method"] == "Page.loadEventFired":
                self._loaded.set()
            elif message["method"] == "Page.javascriptDialogOpening":  # "leave this page?"
                self._consent = asyncio.create_task(self._send("Page.handleJavaScriptDialog", {"accept": True}))
            elif message["method"] == "Fetch.requestPaused":
                task = asyncio.create_task(self._serve(message["params"]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            elif message["method"] == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            elif message["method"] == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                parts = [str(a.get("value", a.get("description"))) for a in message["params"]["args"]]
                self.errors.append(" ".join(parts))

    async def _serve(self, paused: dict[str, Any]) -> None:
        """Answer a request to a site that `answer` was called for."""
        request, number = paused["request"], paused["requestId"]
        service = next(service for site, service in self._services.items() if request["url"].startswith(site))
        body = json.loads(request["postData"]) if request.get("postData") else None
        found = None if request["method"] == "OPTIONS" else service(request["url"], body)
        headers = {
            "Access-Control-Allow-Origin": "*",
            "Access-Control-Allow-Headers": "*",
            "Content-Type": "application/json",
        }
        await self._send("Fetch.fulfillRequest", {
            "requestId": number,
            "responseCode": 404 if found is None and request["method"] != "OPTIONS" else 200,
            "responseHeaders": [{"name": name, "value": value} for name, value in headers.items()],
            "body": base64.b64encode(json.dumps(found).encode()).decode(),
        })  # fmt: skip

    def answer(self, site: str, service: Callable[[str, Any], Any]) -> None:
        """Answer requests whose address begins with `site` by `service(address, JSON of the body)`; None is a 404."""
        self._services[site] = service
        self.call("Fetch.enable", patterns=[{"urlPattern": f"{site}*"} for site in self._services])

    async def _send(self, method: str, parameters: dict[str, Any]) -> Any:
        self._number += 1
        answer = self._answers[self._number] = self._loop.create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        return await answer

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol. Raises RuntimeError when it fails."""
        answer = self._do(self._send(method, parameters), timeout=15)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded: a script begun before would be lost with the old page."""
        self._loaded.clear()
        self.call("Page.navigate", url=url)
        if not self._loaded.wait(60):
            raise RuntimeError(f"{url} did not load within 60 s")

    def resize(self, width: int, height: int) -> None:
        """Give the page itself this size; the window's size includes a frame."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited. Raises RuntimeError for exceptions."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """Ask until an expression is true; returns its value. Raises RuntimeError when it stays false."""
        end, problem = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            try:
                value = self.run(script)
                if value:
                    return value
            except (RuntimeError, TimeoutError) as error:  # the page is still loading, or went to another address
                problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            time.sleep(0.1)
        raise RuntimeError(f"stayed false for {seconds} s: {script} {problem}")

    def screenshot(self, path: str) -> None:
        """Save what the window shows as PNG."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
