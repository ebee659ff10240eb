"""A scratch server with the pack, and what its nodes return there."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from tests import tiny_models
from tests.e2e.server import Page, Server
from tests.e2e.workflows import Prompt
from tools.try_pack.graphs import PICTURE, SOUND

HERE = os.path.dirname(os.path.abspath(__file__))
PROBE_PACK = "try_pack_probe"
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".git", ".venv", "venv", "node_modules")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")

Part = tuple[str, str, Any]  # where in the value, what it is, its content


def pack_name(path: str) -> str:
    """Name of the pack in a folder or file. Raises ValueError where there can be none."""
    path = os.path.abspath(path)
    if os.path.isfile(path) and path.endswith(".py"):
        return os.path.splitext(os.path.basename(path))[0]
    if os.path.isfile(os.path.join(path, "__init__.py")):
        return os.path.basename(path)
    raise ValueError(f"{path} is no node pack: give a folder with an __init__.py, or a .py file")


def make_base(folder: str, pack: str, models: str) -> str:
    """A base directory with the pack, the probe, the models and files to read."""
    packs, inputs = os.path.join(folder, "custom_nodes"), os.path.join(folder, "input")
    for path in (packs, inputs):
        os.makedirs(path)
    shutil.copytree(os.path.join(HERE, "probe"), os.path.join(packs, PROBE_PACK), ignore=_LEFT_OUT)
    if os.path.isfile(pack):
        shutil.copy(pack, packs)
    else:
        target = os.path.join(packs, os.path.basename(os.path.abspath(pack)))
        shutil.copytree(pack, target, ignore=_LEFT_OUT)
    shutil.copytree(models, os.path.join(folder, "models"), copy_function=os.link)
    y, x = np.mgrid[0:128, 0:64]  # multiples of 64: some packs take nothing else
    pixels = np.stack([x * 3, y * 2, (x + y) % 256, 255 - x], -1).astype(np.uint8)
    Image.fromarray(pixels, "RGBA").save(os.path.join(inputs, PICTURE))
    with wave.open(os.path.join(inputs, SOUND), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes((np.sin(np.arange(8000) * 0.1) * 9000).astype("<i2").tobytes())
    return folder


def make_models(folder: str, family: str) -> str:
    """The tiny models, a few hundred KiB each: Flux with what there is for it, and another family."""
    for name in dict.fromkeys(("flux", "adapters", family)):
        tiny_models.write_family(name, folder)
    return folder


@dataclass
class Run:
    """How a prompt went: `refused` before it began, `error`, or what every rank's probes were given, by probe."""

    refused: str = ""
    error: str = ""
    parts: dict[int, dict[str, list[Part]]] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        return self.refused or self.error


class Trial:
    """A server with `ranks` ranks, and one page on it."""

    def __init__(self, base: str, ranks: int, flags: list[str], timeout_s: float) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s
        self._records = os.path.join(base, "written")
        os.makedirs(self._records)
        self.server = Server(base, ranks, flags, env={"TRY_PACK_RECORDS": self._records})
        self._page: Page | None = None

    def wait_ready(self) -> None:
        """Until it listens. Raises AssertionError with its console when it does not."""
        self.server.wait_ready()
        self._page = self.server.page()
        self._page.__enter__()

    def close(self) -> None:
        """End page and server."""
        if self._page is not None:
            self._page.__exit__()
        self.server.stop()

    def infos(self) -> dict[str, Any]:
        """Descriptions of all nodes."""
        infos: dict[str, Any] = self.server.json("/object_info")
        return infos

    def forget(self) -> None:
        """Drop kept results, so that nodes run again."""
        self.server.request("/free", {"free_memory": True})

    def run(self, prompt: Prompt) -> Run:
        """Run a prompt; what its probes wrote. Never raises because of what a node does."""
        for path in glob.glob(os.path.join(self._records, "*")):
            os.remove(path)
        assert self._page is not None
        if self.server.process.poll() is not None:
            return Run(error="the server has ended")
        status, content = self.server.request(
            "/prompt", {"prompt": prompt, "client_id": self._page.id}, self._timeout_s
        )
        answer = json.loads(content) if status in (200, 400) else {}
        if status != 200 or answer.get("node_errors"):
            return Run(refused=_why_refused(answer) or f"status {status}")
        self._page.prompt_id = answer["prompt_id"]
        try:
            outcome = self._page.finish(self._timeout_s)
        except AssertionError:
            self.server.request("/interrupt", {})
            return Run(error=f"no end within {self._timeout_s:.0f} s")
        if outcome.error is not None:
            first = (outcome.error["exception_message"].strip().splitlines() or [""])[0]
            return Run(error=self._neutral(f"{outcome.error['exception_type'].rpartition('.')[2]}: {first}"))
        if outcome.of("execution_interrupted"):
            return Run(error="interrupted")
        return Run(parts={rank: self._read(rank) for rank in range(self.ranks)})

    def _read(self, rank: int) -> dict[str, list[Part]]:
        """Values by probe."""
        found = {}
        for path in glob.glob(os.path.join(glob.escape(self._records), f"*.{rank}.json")):
            with open(path, encoding="utf-8") as file:
                listed = json.load(file)
            arrays = np.load(f"{path[:-5]}.npz")
            found[os.path.basename(path).partition(".")[0]] = [
                (
                    where,
                    kind,
                    arrays[str(number)] if content is None and str(number) in arrays else self._neutral(content),
                )
                for number, (where, kind, content) in enumerate(listed)
            ]
        return found

    def _neutral(self, value: Any) -> Any:
        """A text without what only says where this server's files and objects are."""
        if not isinstance(value, str):
            return value
        for folder, name in ((self.server.record_folder, "RECORDS"), (self.server.base, "BASE")):
            value = value.replace(folder, name)
        return _ADDRESS.sub("0x", value)


def _why_refused(answer: Mapping[str, Any]) -> str:
    reasons = [
        f"{reason['message']}: {reason['details']}".rstrip(": ")
        for node in (answer.get("node_errors") or {}).values()
        for reason in node["errors"]
    ]
    error = answer.get("error") or {}
    return "; ".join(reasons) or str(error.get("message") if isinstance(error, Mapping) else error)


def difference(one: Mapping[str, list[Part]], other: Mapping[str, list[Part]], tolerance: float) -> str:
    """Where two sets of values differ by more than `tolerance` of their largest number; empty when they do not."""
    if set(one) != set(other):
        return f"outputs {sorted(set(one) ^ set(other))} are missing on one side"
    for slot in sorted(one):
        for (where, kind, mine), (there, other_kind, theirs) in zip(one[slot], other[slot], strict=False):
            place = f"output {slot}{where.removeprefix('[0]')}"
            if (where, kind) != (there, other_kind):
                return f"{place} is {kind}, or {other_kind}"
            reason = _different(mine, theirs, tolerance)
            if reason:
                return f"{place}: {reason}"
        if len(one[slot]) != len(other[slot]):
            return f"output {slot} has {len(one[slot])} parts, or {len(other[slot])}"
    return ""


def _different(mine: Any, theirs: Any, tolerance: float) -> str:
    if isinstance(mine, np.ndarray):
        if not mine.size or np.array_equal(mine, theirs, equal_nan=True):
            return ""
        gap = float(np.nan_to_num(np.abs(mine - theirs), nan=np.inf).max())
        largest = max(1.0, float(np.nan_to_num(np.abs(mine)).max()))
        return f"numbers differ by {gap:.2g}" if gap > tolerance * largest else ""
    if isinstance(mine, float) and isinstance(theirs, float):
        near = (
            mine == theirs
            or abs(mine - theirs) <= tolerance * max(1.0, abs(mine))
            or (mine != mine and theirs != theirs)
        )
        return "" if near else f"{mine} or {theirs}"
    return "" if mine == theirs else f"{mine!r:.60} or {theirs!r:.60}"
