"""The server as a process of our own: its folders, start, end, console."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import psutil
from PIL import Image

from tests import tiny_models

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
RANK_NAME = "taco-rank-"
STOP_S = 30.0  # how long the program may take to end after SIGTERM


def free_port() -> int:
    """A port of the loopback address that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_base(base: str, models: str | None) -> None:
    """Fill a base directory: models (tiny ones, or a link to `models`), the nodes of tests, an input picture."""
    for name in ("input", "output", "temp", "user", "custom_nodes", "records"):
        os.makedirs(os.path.join(base, name), exist_ok=True)
    if models is None:
        tiny_models.write_flux(os.path.join(base, "models"))
        loras = os.path.join(base, "models", "loras")
        shutil.copy(os.path.join(loras, "tiny_flux_kohya.safetensors"), os.path.join(loras, "replaced.safetensors"))
    else:
        os.symlink(os.path.abspath(models), os.path.join(base, "models"))
    tests = os.path.join(ROOT, "tests")
    for source, name in (("e2e/pack", "e2e_pack"), ("chaos/pack", "chaos_pack")):
        shutil.copytree(os.path.join(tests, source), os.path.join(base, "custom_nodes", name))
    y, x = np.mgrid[0:104, 0:72]
    pixels = np.stack([x * 3, y * 2, (x + y) % 256, 255 * (x > 30)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(os.path.join(base, "input", "start.png"))


class Program:
    """`main.py` with its ranks. It can be started again after its end, with the same folders and port.

    `base`: its base directory; `gpu`: on CUDA instead of the CPU; `flags`: further flags; `log`: file for its console.
    """

    def __init__(self, base: str, ranks: int, log: str, gpu: bool = False, flags: Sequence[str] = ()) -> None:
        self.base, self.ranks, self.log = base, ranks, log
        self.port = free_port()
        self.output = os.path.join(base, "output")
        self.expected_to_end = False
        own = [] if gpu else ["--cpu"]
        self._command = [
            sys.executable, "main.py", *own, "--taco-ranks", str(ranks), "--port", str(self.port),
            "--disable-auto-launch", "--preview-method", "latent2rgb", "--base-directory", base, *flags,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `poll` and HTTP say how it goes on."""
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment |= {"PYTHONHASHSEED": "random", "TACO_TEST_RECORDS": os.path.join(self.base, "records")}
        with open(self.log, "ab") as console:
            # A session of its own: Ctrl-C reaches this tool alone, which then ends the program in order.
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.expected_to_end = False

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self._process is not None
        return self._process.pid

    def rank_pids(self) -> dict[int, int]:
        """Rank -> process id, of the ranks that have a process now: they are named `taco-rank-N`."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if child.status() != psutil.STATUS_ZOMBIE and child.name().startswith(RANK_NAME):
                        found[int(child.name().removeprefix(RANK_NAME))] = child.pid
        return found

    def poll(self) -> int | None:
        """Exit status, None while it runs."""
        return None if self._process is None else self._process.poll()

    async def stop(self) -> bool:
        """End it with SIGTERM; False when it had to be killed because that took longer than STOP_S."""
        self.expected_to_end = True
        if self._process is None or self._process.poll() is not None:
            return True
        self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, STOP_S)
            return True
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
            return False

    def last_words(self) -> str:
        """The supervisor's last line on the console."""
        lines = self.tail(60).splitlines()
        own = [line[line.index("TACO-DiT:") :] for line in lines if "TACO-DiT:" in line]
        final = [line for line in own if "program ends" in line]
        return (final or own or lines or [""])[-1]

    def tail(self, lines: int = 30) -> str:
        """The last lines of its console."""
        with open(self.log, "rb") as file:
            file.seek(max(0, os.path.getsize(self.log) - 20_000))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
