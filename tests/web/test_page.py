"""The official page in a real browser, on one rank and on two: load, queue, watch, see, reload, cancel, drop a PNG."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Iterator

import pytest

from tests.e2e import workflows
from tests.e2e.server import Server
from tests.tiny_models import write_flux

from .browser import Browser, executable

pytestmark = [
    pytest.mark.skipif(executable() is None, reason="needs Chromium (Debian: apt-get install chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("comfyui_frontend_package") is None, reason="needs comfyui-frontend-package"
    ),
    pytest.mark.timeout(240),
]

# Requests the page makes to services of its makers; this machine answers none of them.
OUTSIDE = (
    "api.comfy.org",
    "comfyregistry",
    "Failed to fetch",
    "Network Error",
    "ERR_",
    "firebase",
    "sentry",
    "datadog",
)
READY = "window.app && app.graph && app.graph._nodes && app.graph._nodes.length > 0"
SHOTS = os.environ.get("TACO_SCREENSHOTS")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Browser]]:
    """A server and a browser that has its page open."""
    base = tmp_path_factory.mktemp(f"web{request.param}")
    write_flux(str(base / "models"))
    with Server(str(base), ranks=request.param) as server:
        server.wait_ready()
        # A new user is shown the templates first; these tests begin with a graph.
        server.request("/settings", {"Comfy.TutorialCompleted": True})
        with Browser(str(base / "profile")) as browser:
            browser.open(f"http://127.0.0.1:{server.port}/")
            browser.wait(READY, 60)
            yield server, browser


def _load(browser: Browser, prompt: dict) -> None:
    browser.run(f"app.loadApiJson({json.dumps(prompt)}, 'test')")
    browser.wait(f"app.graph._nodes.length === {len(prompt)}")


def _finished(browser: Browser) -> int:
    jobs = "fetch('/api/jobs?status=completed&limit=200&offset=0').then(r => r.json()).then(j => j.jobs.length)"
    return browser.run(jobs)


def _shot(browser: Browser, name: str) -> None:
    if SHOTS:
        browser.screenshot(os.path.join(SHOTS, name))


def test_opens_without_console_errors(page: tuple[Server, Browser]) -> None:
    _, browser = page
    ours = [error for error in browser.errors if not any(word in error for word in OUTSIDE)]
    assert not ours
    assert browser.run("document.title").startswith(("ComfyUI", "*"))
    _shot(browser, "page.png")


def test_queue_from_the_page_gives_a_picture(page: tuple[Server, Browser]) -> None:
    server, browser = page
    before = _finished(browser)
    _load(browser, workflows.flux(seed=11))
    browser.run("app.graph._nodes.find(n => n.type === 'KSampler').widgets.find(w => w.name === 'steps').value = 3")
    browser.run("app.queuePrompt(0)")
    browser.wait(
        "fetch('/api/jobs?status=completed&limit=200&offset=0').then(r => r.json())"
        f".then(j => j.jobs.length === {before + 1})", 60,
    )  # fmt: skip
    job = browser.run("fetch('/api/jobs?status=completed&limit=1&offset=0').then(r => r.json()).then(j => j.jobs[0])")
    picture = job["preview_output"]
    size = browser.run(
        "new Promise((good, bad) => { const i = new Image(); i.onload = () => good([i.width, i.height]); i.onerror = bad;"
        f" i.src = '/api/view?filename={picture['filename']}&type={picture['type']}&subfolder='; }})"
    )
    assert size[0] > 0
    steps = browser.run(
        f"fetch('/api/history/{job['id']}').then(r => r.json()).then(h => Object.values(h['{job['id']}'].prompt[2])"
        ".find(n => n.class_type === 'KSampler').inputs.steps)"
    )
    assert steps == 3, "the widget edited in the page is what was run"
    browser.wait("app.nodeOutputs && Object.keys(app.nodeOutputs).length > 0")
    _shot(browser, "queued.png")
    assert server.pids()


def test_reload_keeps_graph_and_history(page: tuple[Server, Browser]) -> None:
    server, browser = page
    _load(browser, workflows.flux(seed=12))
    done = _finished(browser)
    browser.wait("new Promise(r => setTimeout(() => r(true), 1500))")  # the page saves its draft after a second
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.wait(READY, 60)
    assert browser.run("app.graph._nodes.some(n => n.type === 'CheckpointLoaderSimple')")
    assert _finished(browser) == done


def test_cancel_and_queue_again(page: tuple[Server, Browser]) -> None:
    server, browser = page
    _load(browser, workflows.flux(seed=13, steps=3000))
    browser.run("window.__stopped = new Promise(r => app.api.addEventListener('execution_interrupted', () => r(true)))"
                ".constructor && true")  # fmt: skip
    browser.run("app.queuePrompt(0)")
    browser.wait("fetch('/api/jobs?status=in_progress&limit=10&offset=0').then(r => r.json()).then(j => j.jobs.length)")
    browser.run("app.api.interrupt()")
    assert browser.run("window.__stopped")
    browser.wait("fetch('/api/jobs?status=cancelled').then(r => r.json()).then(j => j.jobs.length)")
    cancelled = server.json("/jobs?status=cancelled")["jobs"][0]["id"]
    browser.run("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Expand job queue'))?.click()")
    row = f"[...document.querySelectorAll('[data-job-id=\"{cancelled}\"] span[title]')].map(e => e.innerText).join('|')"
    browser.wait(f"{row} === 'Cancelled|'")
    before = _finished(browser)
    _load(browser, workflows.flux(seed=14))
    browser.run("app.queuePrompt(0)")
    browser.wait(
        "fetch('/api/jobs?status=completed&limit=200&offset=0').then(r => r.json())"
        f".then(j => j.jobs.length === {before + 1})", 60,
    )  # fmt: skip


def test_dropping_the_png_restores_the_graph(page: tuple[Server, Browser]) -> None:
    server, browser = page
    prompt = workflows.flux(seed=15)
    png = server.run(prompt).files()[0]
    browser.run("app.graph.clear()")
    browser.run(
        "(async () => { const bytes = Uint8Array.from(atob('%s'), c => c.charCodeAt(0));"
        " await app.handleFile(new File([bytes], 'picture.png', {type: 'image/png'})); })()"
        % base64.b64encode(png).decode()
    )
    browser.wait(f"app.graph._nodes.length === {len(prompt)}")
    seeds = browser.run(
        "app.graph._nodes.filter(n => n.type === 'KSampler').map(n => n.widgets.find(w => w.name === 'seed').value)"
    )
    assert seeds == [15]
