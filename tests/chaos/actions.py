"""What is done to the server in a long run: each action is drawn from the seed and its number, whatever happened before."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable

import aiohttp
import numpy as np
from PIL import Image

from tests.chaos.api import Away
from tests.chaos.ledger import Entry
from tests.chaos.pages import DeafPage, Page
from tests.chaos.prompts import REPLACED_LORA
from tests.chaos.run import Run

RECOVER_S = 180.0
STOP_AT_MOST_S = 4.0  # far below the time after which a silent follower is ended


class Actions:
    """All actions by name, with weights. `without`: names of groups that are left out (see GROUPS)."""

    def __init__(self, run: Run, seed: int, without: frozenset[str]) -> None:
        self._run = run
        self._seed = seed
        self._deaf: list[DeafPage] = []
        self._recovery: asyncio.Event = asyncio.Event()
        self._recovery.set()
        groups: dict[str, list[tuple[float, str, Callable[[random.Random], Awaitable[None]]]]] = {
            "prompts": [(30, "prompt", self.prompt), (5, "burst", self.burst)],
            "cancels": [
                (4, "cancel running", self.cancel_running), (2, "cancel by id", self.cancel_by_id),
                (2, "delete queued", self.delete_queued), (0.7, "clear queue", self.clear_queue),
            ],
            "history": [(2, "delete history", self.delete_history)],
            "free": [(2, "free memory", self.free)],
            "kills": [(3, "kill", self.kill)],
            "stops": [(1.5, "stop follower", self.stop_follower)],
            "pages": [(1.5, "deaf page", self.deaf_page), (2, "vanishing page", self.vanishing_page)],
            "files": [(2, "bad upload", self.bad_upload), (2, "replaced LoRA", self.replace_lora)],
            "disk": [(1, "full disk", self.full_disk)],
            "restarts": [(0.5, "restart", self.restart)],
        }  # fmt: skip
        unknown = without - set(groups)
        if unknown:
            raise ValueError(
                f"--without does not know {sorted(unknown)[0]!r}; it knows {', '.join(groups)}, persistence"
            )
        self._weighted = [action for group, actions in groups.items() if group not in without for action in actions]

    def draw(self, number: int) -> tuple[str, Callable[[random.Random], Awaitable[None]], random.Random]:
        """Name and function of an action, and the generator it is called with; depends on seed and number only."""
        rng = random.Random(f"{self._seed}/{number}")
        weights = [weight for weight, _, _ in self._weighted]
        _, name, action = rng.choices(self._weighted, weights)[0]
        return name, action, rng

    def close(self) -> None:
        """Close the pages that are still open."""
        for page in self._deaf:
            page.close()

    # --- prompts and what users do with them -------------------------------------------------------------------------

    def _page(self, rng: random.Random) -> Page:
        return rng.choice(self._run.pages)

    async def prompt(self, rng: random.Random) -> None:
        """One prompt of a random kind."""
        await self._run.post(self._page(rng).id, self._run.prompts.random(rng), front=rng.random() < 0.1)

    async def burst(self, rng: random.Random) -> None:
        """Several at once."""
        page = self._page(rng)
        made = [self._run.prompts.random(rng) for _ in range(rng.randrange(3, 7))]
        await asyncio.gather(*(self._run.post(page.id, one) for one in made))

    def _waiting(self) -> list[Entry]:
        entries = [entry for entry in self._run.ledger.open.values() if entry.accepted and not entry.removed]
        return sorted(entries, key=lambda entry: entry.number)

    async def cancel_running(self, rng: random.Random) -> None:
        """Whatever runs. A prompt that begins meanwhile may be hit."""
        for entry in self._run.ledger.open.values():
            entry.cancelled = entry.cancelled or time.time()
        await self._run.api.post("/interrupt", {})

    async def cancel_by_id(self, rng: random.Random) -> None:
        """One prompt, with the routes for jobs: out of the queue, or stopped."""
        choice, waiting = rng.random(), self._waiting()
        if waiting:
            entry = waiting[int(choice * len(waiting))]
            entry.cancelled = entry.removed = time.time()
            await self._run.api.post(f"/jobs/{entry.id}/cancel", {})

    async def delete_queued(self, rng: random.Random) -> None:
        """One prompt out of the queue; it must not run after that."""
        choice, waiting = rng.random(), self._waiting()
        if waiting:
            await self._remove([waiting[int(choice * len(waiting))]], {})

    async def clear_queue(self, rng: random.Random) -> None:
        """All that wait."""
        await self._remove(list(self._run.ledger.open.values()), {"clear": True})

    async def _remove(self, entries: list[Entry], body: dict[str, object]) -> None:
        queue = await self._run.api.get("/queue")
        pending = {item[1] for item in queue["queue_pending"]}
        self._run.ledger.may_be_removed(entries)
        await self._run.api.post("/queue", body or {"delete": [entry.id for entry in entries]})
        for entry in entries:
            if entry.accepted and entry.id in pending:
                entry.removed, entry.surely_removed = time.time(), True

    async def delete_history(self, rng: random.Random) -> None:
        """An entry of the history whose prompt ended; it must be gone after that."""
        choice = rng.random()
        ended = [e for e in self._run.ledger.entries.values() if e.accepted and e.ended and e.outcome]
        if ended:
            entry = ended[-1 - int(choice * min(len(ended), 50))]
            await self._run.api.post("/history", {"delete": [entry.id]})
            if await self._run.api.get(f"/history/{entry.id}"):
                self._run.report.finding("history", f"{entry} was deleted from the history and is still there")

    async def free(self, rng: random.Random) -> None:
        """Unload models, with or without all that is kept."""
        await self._run.api.post("/free", {"unload_models": True, "free_memory": rng.random() < 0.5})

    # --- processes ---------------------------------------------------------------------------------------------------

    async def kill(self, rng: random.Random) -> None:
        """SIGKILL to a random rank, then the reference picture."""
        rank = rng.randrange(self._run.settings.ranks)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._recovery.wait(), RECOVER_S)
        fault = await self._run.kill(rank)
        self._recovery.clear()

        async def recover() -> None:
            try:
                await self._run.right_picture(fault, RECOVER_S)
            finally:
                self._recovery.set()

        self._run.background(recover())

    async def stop_follower(self, rng: random.Random) -> None:
        """SIGSTOP for a few seconds: prompts take longer, nothing else."""
        rank, seconds = rng.randrange(1, max(2, self._run.settings.ranks)), rng.uniform(1.0, STOP_AT_MOST_S)
        if rank >= self._run.settings.ranks:
            return
        pid = await self._run.pid(rank)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)

    async def restart(self, rng: random.Random) -> None:
        """SIGTERM to the program, and start it again."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._recovery.wait(), RECOVER_S)
        fault = await self._run.restart()
        await self._run.right_picture(fault, RECOVER_S)

    # --- pages -------------------------------------------------------------------------------------------------------

    async def deaf_page(self, rng: random.Random) -> None:
        """A page that never reads posts prompts; the oldest of more than three is closed."""
        page = DeafPage(self._run.program.port)
        await asyncio.to_thread(page.open)
        self._deaf.append(page)
        for _ in range(2):
            await self._run.post(page.id, self._run.prompts.random(rng))
        if len(self._deaf) > 3:
            self._deaf.pop(0).close()

    async def vanishing_page(self, rng: random.Random) -> None:
        """A page that posts a prompt and leaves before its end."""
        page = Page(self._run.program.port, lambda page, message: None)
        page.open()
        await asyncio.sleep(rng.uniform(0, 0.3))
        await self._run.post(page.id, self._run.prompts.random(rng))
        await asyncio.sleep(rng.uniform(0, 0.3))
        await page.close()

    # --- files -------------------------------------------------------------------------------------------------------

    async def bad_upload(self, rng: random.Random) -> None:
        """A truncated PNG, or a text that is called PNG; a prompt that loads it follows."""
        kind = rng.choice(["truncated", "text", "empty"])
        content = {"truncated": _png(rng)[:900], "text": b"<html>not found</html>", "empty": b""}[kind]
        form = aiohttp.FormData()
        form.add_field("image", content, filename="bad.png", content_type="image/png")
        form.add_field("overwrite", "true")
        status, answer = await self._run.api.call("POST", "/upload/image", form)
        if status >= 500:
            self._run.report.finding("upload", f"a {kind} picture was answered {status}: {answer[:200]!r}")
        await self._run.post(self._page(rng).id, self._run.prompts._bad_picture(rng))

    async def replace_lora(self, rng: random.Random) -> None:
        """A LoRA file becomes a bad one while prompts with it wait or run, and a good one again."""
        folder = os.path.join(self._run.base, "models", "loras")
        good = os.path.join(folder, "tiny_flux_kohya.safetensors")
        cut = rng.choice([0, 40, 3000])
        page = self._page(rng)
        await self._run.post(page.id, self._run.prompts.replaced_lora(rng))
        await asyncio.to_thread(_replace, good, os.path.join(folder, REPLACED_LORA), cut)
        try:
            await self._run.post(page.id, self._run.prompts.replaced_lora(rng))
            await asyncio.sleep(rng.uniform(0.5, 2))
        finally:
            await asyncio.to_thread(_replace, good, os.path.join(folder, REPLACED_LORA), None)
        await self._run.post(page.id, self._run.prompts.replaced_lora(rng))

    async def full_disk(self, rng: random.Random) -> None:
        """Nothing can be written to the output folder for a few seconds; then the reference picture."""
        if self._run.disk.possible != "":
            return
        fault = self._run.ledger.fault("full disk", ends_prompts=True)
        await asyncio.to_thread(self._run.disk.fill)
        try:
            for _ in range(2):
                await self._run.post(self._page(rng).id, self._run.prompts.random(rng))
            await asyncio.sleep(rng.uniform(1, 4))
        finally:
            await asyncio.to_thread(self._run.disk.free)
            fault.end = time.time()
        self._run.background(self._run.right_picture(fault, RECOVER_S))


def _png(rng: random.Random) -> bytes:
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _replace(source: str, target: str, cut: int | None) -> None:
    """Replace `target` at once by the first `cut` bytes of `source` (None: all of it)."""
    with open(source, "rb") as file:
        content = file.read()
    with open(f"{target}.new", "wb") as file:
        file.write(content if cut is None else content[:cut])
    os.replace(f"{target}.new", target)


async def perform(run: Run, number: int, actions: Actions) -> None:
    """Do action `number`. The server may be away meanwhile: that is judged by the faults that explain it."""
    name, action, rng = actions.draw(number)
    run.report.record("action", number=number, action=name)
    run.report.counts[f"action: {name}"] += 1
    begun = time.time()
    try:
        await action(rng)
    except (Away, OSError) as error:
        if run.ledger.forgotten(begun, time.time()) is None:
            run.report.finding("http", f"{name}: {error}")
    except RuntimeError as error:
        if run.ledger.excuse(begun, time.time()) is None:
            run.report.finding("action", f"{name}: {error}")
    except Exception as error:  # noqa: BLE001 - one action that fails must not end a run of hours
        run.report.finding("tool", f"{name}: {type(error).__name__}: {error}")
