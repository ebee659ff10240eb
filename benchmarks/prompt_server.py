"""The program's server as a process of its own, for benchmarks that talk to it over HTTP."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from app.auth import authorization

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START_S = 180.0
PROMPT_S = 600.0


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class BenchmarkServer:
    """`main.py` on some GPUs or the CPU; use it as a context manager. Its console is in `log`, a path."""

    def __init__(self, base: str, ranks: int, device: str, flags: Sequence[str] = ()) -> None:
        self.base, self.ranks = base, ranks
        self.port = free_port()
        self.log = os.path.join(base, f"console-{ranks}-{self.port}.txt")
        self.start_seconds = 0.0
        # a folder of its own, so that it does not go on with what another one was stopped in
        user = os.path.join(base, f"user-{ranks}-{self.port}")
        os.makedirs(user, exist_ok=True)
        where = ["--cpu", "--taco-ranks", str(ranks)]
        if device == "cuda":
            present = min(ranks, torch.cuda.device_count())  # fewer: ranks share them, if TACO_SHARE_GPU allows it
            where = ["--gpus", ",".join(str(gpu) for gpu in range(present)), "--taco-ranks", str(ranks)]
        self._command = [
            sys.executable, "main.py", *where, "--port", str(self.port), "--base-directory", base,
            "--user-directory", user, "--disable-auto-launch", *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> BenchmarkServer:
        started = time.perf_counter()
        with open(self.log, "wb") as console:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )
        while True:
            try:
                self.json("/system_stats")
                break
            except OSError:
                if self._process.poll() is not None or time.perf_counter() - started > START_S:
                    raise RuntimeError(f"the server did not start; its console is {self.log}") from None
                time.sleep(0.05)
        self.start_seconds = round(time.perf_counter() - started, 2)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def content(self, path: str, body: Any = None, timeout: float = 30.0) -> bytes:
        """Content of a GET, or of a POST when there is a body."""
        data = None if body is None else json.dumps(body).encode()
        call = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=authorization())
        call.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(call, timeout=timeout) as answer:
            return bytes(answer.read())

    def json(self, path: str, body: Any = None) -> Any:
        """`content` as JSON."""
        return json.loads(self.content(path, body) or b"null")

    def run(self, prompt: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """(seconds from POST to the entry in the history, the entry). Raises TimeoutError after 10 minutes."""
        started = time.perf_counter()
        prompt_id = self.json("/prompt", {"prompt": prompt})["prompt_id"]
        while time.perf_counter() - started < PROMPT_S:
            entry = self.json(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return time.perf_counter() - started, entry
            time.sleep(0.01)
        raise TimeoutError(f"the prompt did not end within {PROMPT_S:.0f} s; the console is {self.log}")

    def picture(self, entry: dict[str, Any]) -> np.ndarray:
        """The first picture of a history entry, [H, W, 3] uint8."""
        image = next(image for output in entry["outputs"].values() for image in output.get("images", ()))
        content = self.content("/view?" + urllib.parse.urlencode(image))
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
