"""A real server as a subprocess, and the page that talks to it.

with Server(base, ranks=3) as server:
    outcome = server.run(prompt)            # waits until the prompt is done
    with server.page() as page:             # or step by step
        page.post(prompt)
        page.wait("progress")
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START_S = 60.0
PROMPT_S = 60.0
_LISTENING = re.compile(r"To see the GUI go to: http://[^:]+:(\d+)")


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not only waiting to be collected."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(test: Callable[[], bool], seconds: float) -> bool:
    """For things that send no event (another process's end): whether `test` came true in time."""
    end = time.monotonic() + seconds
    while not test():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class Server:
    """A running program. `ranks` with main.py on the CPU (None: as it chooses), or any `command` that ends up as one.

    Its console is kept in `log`; its records folder is where the test nodes write down what each rank did.
    """

    def __init__(
        self,
        base: str,
        ranks: int | None = 1,
        flags: Sequence[str] = (),
        command: Sequence[str] | None = None,
        env: dict[str, str] | None = None,
        persist: bool = False,
    ) -> None:
        self.base = base
        self.ranks = ranks
        self.log: list[str] = []
        self.port = 0
        self.record_folder = os.path.join(base, f"records-{uuid.uuid4().hex[:8]}")
        os.makedirs(self.record_folder)
        self._listening = threading.Event()
        command = command or [sys.executable, "main.py"]
        folders = ["--base-directory", base, "--output-directory", os.path.join(self.record_folder, "output"),
                   "--temp-directory", os.path.join(self.record_folder, "temp")]  # fmt: skip
        own = [] if ranks is None else ["--cpu", "--taco-ranks", str(ranks)] if ranks else ["--cpu"]
        port = [] if "--port" in flags else ["--port", "0"]
        own += [] if persist else ["--no-persist"]  # servers that share a folder do not take each other's prompts
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TACO_TOKEN")}
        # Every process gets hash values of its own: what depends on the order of a set differs between ranks.
        environment |= {"PYTHONHASHSEED": "random", "TACO_TEST_RECORDS": self.record_folder, **(env or {})}
        self.process = subprocess.Popen(
            [*command, *own, *port, "--disable-auto-launch", *folders, *flags],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))
            found = _LISTENING.search(line)
            if found:
                self.port = int(found[1])
                self._listening.set()
        self._listening.set()  # it ended: whoever waits should look

    def __enter__(self) -> Server:
        try:
            self.wait_ready()
        except BaseException:  # Ctrl-C and pytest's time limit too
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Until it listens. Raises AssertionError with its console when it does not."""
        self._listening.wait(START_S)
        if not self.port:
            self.stop()
            raise AssertionError(f"the server with {self.ranks} ranks did not start:\n{self.tail()}")

    def listening_again(self) -> None:
        """Make `wait_ready` wait for the next time it listens."""
        self.port = 0
        self._listening.clear()

    def stop(self) -> None:
        """End it and wait for its end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def tail(self, lines: int = 40) -> str:
        """The last lines of the console."""
        return "\n".join(self.log[-lines:])

    # --- HTTP ------------------------------------------------------------------------------------------------------

    def request(self, path: str, body: Any = None, timeout: float = 20.0) -> tuple[int, bytes]:
        """(status, content) of a GET, or of a POST when there is a body."""
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data)
        call.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(call, timeout=timeout) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str, body: Any = None) -> Any:
        """Content of an answer that must be 200."""
        status, content = self.request(path, body)
        assert status == 200, f"{path}: {status} {content.decode(errors='replace')}"
        return json.loads(content) if content else None

    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [info["pid"] for info in self.json("/taco_dit/status")["ranks"]]

    def file(self, image: dict[str, str]) -> bytes:
        """A file that a node's ui output names."""
        status, content = self.request("/view?" + urllib.parse.urlencode(image))
        assert status == 200, content
        return content

    # --- prompts ---------------------------------------------------------------------------------------------------

    def page(self, features: dict[str, Any] | None = None) -> Page:
        """Open a page; use it as a context manager."""
        return Page(self, features)

    def run(self, prompt: dict[str, Any], timeout: float = PROMPT_S, **more: Any) -> Outcome:
        """Run a prompt to its end, which may be an error."""
        with self.page() as page:
            page.post(prompt, **more)
            return page.finish(timeout)

    def pictures(self, prompt: dict[str, Any], timeout: float = PROMPT_S) -> np.ndarray:
        """Pictures [N, H, W, 3], 0..255, of a prompt that must succeed."""
        return self.run(prompt, timeout).pictures()

    def records(self, label: str) -> dict[int, list[str]]:
        """What test nodes wrote down under a label: rank -> lines."""
        out: dict[int, list[str]] = {}
        for name in sorted(os.listdir(self.record_folder)):
            if name.startswith(f"{label}.") and name.rpartition(".")[2].isdigit():
                with open(os.path.join(self.record_folder, name), encoding="utf-8") as file:
                    out[int(name.rpartition(".")[2])] = file.read().splitlines()
        return out


class Outcome:
    """How a prompt went: its messages in order, and what the history says of it."""

    def __init__(self, server: Server, prompt_id: str, messages: list[dict[str, Any]]) -> None:
        self.server = server
        self.prompt_id = prompt_id
        self.messages = messages

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Data of every message of a kind."""
        return [m["data"] for m in self.messages if m["type"] == kind]

    @property
    def error(self) -> dict[str, Any] | None:
        """Data of execution_error, or None."""
        return next(iter(self.of("execution_error")), None)

    @property
    def outputs(self) -> dict[str, Any]:
        """node id -> ui output, of a prompt that must have succeeded."""
        assert self.error is None and not self.of("execution_interrupted"), (
            f"{self.error or 'interrupted'}\n{self.server.tail()}"
        )
        return self.server.json(f"/history/{self.prompt_id}")[self.prompt_id]["outputs"]

    def files(self) -> list[bytes]:
        """Contents of all pictures, in the order of the nodes."""
        return [self.server.file(i) for ui in self.outputs.values() for i in ui.get("images", ())]

    def pictures(self) -> np.ndarray:
        """[N, H, W, 3], 0..255."""
        return np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")).astype(int) for f in self.files()])


class Page:
    """A browser page: a WebSocket whose messages are kept in order of arrival.

    A text message is kept as it is, a binary one as `{"type": "binary", "event": int, "data": bytes}`; all have `at`.
    """

    def __init__(self, server: Server, features: dict[str, Any] | None = None) -> None:
        self.server = server
        self.id = uuid.uuid4().hex
        self.prompt_id = ""
        self.messages: list[dict[str, Any]] = []
        self._features = features
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._listen(),), daemon=True)

    def __enter__(self) -> Page:
        self._thread.start()
        self.wait("status")
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self) -> None:
        url = f"http://127.0.0.1:{self.server.port}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            if self._features is not None:
                await socket.send_json({"type": "feature_flags", "data": self._features})
            reading = asyncio.ensure_future(self._receive(socket))
            await asyncio.wait([reading, asyncio.ensure_future(self._closing.wait())], return_when="FIRST_COMPLETED")
            reading.cancel()

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                entry = {"type": "binary", "event": int.from_bytes(message.data[:4], "big"), "data": message.data[4:]}
            else:
                entry = json.loads(message.data)
            with self._news:
                self.messages.append({**entry, "at": time.monotonic()})
                self._news.notify_all()

    def post(self, prompt: dict[str, Any], **more: Any) -> str:
        """Queue a prompt that must be accepted; its id."""
        answer = self.server.json("/prompt", {"prompt": prompt, "client_id": self.id, **more})
        assert not answer["node_errors"], answer
        self.prompt_id = answer["prompt_id"]
        return self.prompt_id

    def wait(
        self, kind: str, test: Callable[[dict[str, Any]], bool] = lambda message: True, timeout: float = PROMPT_S
    ) -> dict[str, Any]:
        """The first message of a kind that passes `test`, waiting for it."""
        end = time.monotonic() + timeout
        seen = 0
        with self._news:
            while True:
                for message in self.messages[seen:]:
                    if message["type"] == kind and test(message):
                        return message
                seen = len(self.messages)
                if not self._news.wait(max(0.0, end - time.monotonic())) and time.monotonic() > end:
                    kinds = [m["type"] for m in self.messages]
                    raise AssertionError(f"no {kind} within {timeout} s, only {kinds}\n{self.server.tail()}")

    def finish(self, timeout: float = PROMPT_S) -> Outcome:
        """Wait for the end of the prompt posted last."""

        def last(message: dict[str, Any]) -> bool:
            data = message["data"]
            return data.get("node") is None and data.get("prompt_id") == self.prompt_id

        self.wait("executing", last, timeout)
        mine = [m for m in self.messages if m["type"] == "binary" or m["data"].get("prompt_id") == self.prompt_id]
        return Outcome(self.server, self.prompt_id, mine)
