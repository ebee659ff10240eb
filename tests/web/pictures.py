"""Take the pictures of the page that the documentation shows, of two ranks on the CPU: the first screen with the demo
model, page and panel with tiny models of random weights.

python -m tests.web.pictures docs/images
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from typing import Any

from tests.e2e import workflows
from tests.e2e.server import ROOT, Server
from tests.tiny_models import write_flux

from .browser import Browser
from .test_page import READY
from .test_panel import PANEL, TAB

SIZE = (1400, 900)
NO_NOTICE = "!/Job (queued|completed|failed)/.test(document.body.textContent)"
VISITED = "Comfy.TutorialCompleted"
SETTINGS = {
    VISITED: True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
# node -> left, top, width, height
PLACES = {
    "load": (0, 0, 330, 100),
    "latent": (0, 170, 330, 110),
    "positive": (380, 0, 380, 170),
    "negative": (380, 235, 380, 110),
    "sample": (810, 0, 290, 262),
    "decode": (810, 330, 290, 50),
    "save": (1150, 0, 420, 480),
}


def _place(browser: Browser, prompt: dict[str, Any], left: int, top: int, scale: float) -> None:
    """Lay the nodes out and show them from (left, top) of the canvas on."""
    browser.run(f"app.loadApiJson({json.dumps(prompt)}, 'Flux')")
    browser.wait(f"app.graph._nodes.length === {len(prompt)}")
    browser.run(
        "(places => { const names = %s; for (const node of app.graph._nodes) {"
        " const text = node.widgets?.find(w => w.name === 'text')?.value;"
        " const name = names.find(([, type, own]) => type === node.type && (own === null || own === text))[0];"
        " if (!places[name]) continue; const [x, y, w, h] = places[name]; node.pos = [x, y]; node.setSize([w, h]); }"
        " app.canvas.ds.scale = %s; app.canvas.ds.offset = [%s, %s]; app.graph.setDirtyCanvas(true, true); })(%s)"
        % (
            json.dumps([[k, n["class_type"], n["inputs"].get("text")] for k, n in prompt.items()]),
            scale, left / scale, top / scale, json.dumps(PLACES),
        )
    )  # fmt: skip


def _flux(**more: Any) -> dict[str, Any]:
    return workflows.flux(**{"text": "a red fox in deep snow, watercolour", "width": 384, "height": 384, **more})


def _take_page(browser: Browser, folder: str) -> None:
    _place(browser, _flux(steps=4), 100, 280, 0.82)
    browser.run("app.queuePrompt(0)")
    browser.wait("app.graph._nodes.some(n => n.type === 'SaveImage' && n.imgs?.length)", 120)
    browser.wait(NO_NOTICE)
    browser.screenshot(os.path.join(folder, "page.png"))


def _take_panel(browser: Browser, folder: str) -> None:
    broken = workflows.insert(_flux(), "trip", "TestFail", slot="latent_image", rank=1, kind="plain")
    browser.resize(SIZE[0], 1080)
    browser.run("fetch('/api/taco_dit/events', {method: 'POST', body: JSON.stringify({clear: true})}).then(r => r.ok)")
    browser.run(f"{TAB}.click()")
    _place(browser, _flux(steps=120, cfg=3.5), 400, 280, 0.82)
    server_prompt = json.dumps({"prompt": broken})
    browser.run(f"fetch('/api/prompt', {{method: 'POST', body: {json.dumps(server_prompt)}}}).then(r => r.ok)")
    browser.wait(f"{PANEL}?.textContent.includes('on purpose')", 60)
    browser.run("app.queuePrompt(0)")
    browser.wait(f"Number({PANEL}.querySelector('.taco-steps')?.textContent.match(/\\d+/)[0]) > 12", 60)
    browser.wait(NO_NOTICE)
    browser.screenshot(os.path.join(folder, "panel.png"))


def _take_first_screen(folder: str) -> None:
    """A newcomer's page, after Run."""
    base = tempfile.mkdtemp()
    with Server(base, ranks=2) as server, Browser(os.path.join(base, "profile"), SIZE) as browser:
        server.request("/settings", {name: value for name, value in SETTINGS.items() if name != VISITED})
        browser.resize(*SIZE)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        browser.run("app.queuePrompt(0)")
        browser.wait("app.graph._nodes.some(n => n.type === 'SaveImage' && n.imgs?.length)", 120)
        browser.wait(NO_NOTICE)
        browser.screenshot(os.path.join(folder, "first_screen.png"))
    shutil.rmtree(base)


def main(folder: str) -> None:
    """Write first_screen.png, page.png and panel.png."""
    _take_first_screen(folder)
    base = tempfile.mkdtemp()
    write_flux(os.path.join(base, "models"))
    shutil.copytree(os.path.join(ROOT, "tests", "e2e", "pack"), os.path.join(base, "custom_nodes", "e2e_pack"))
    with Server(base, ranks=2) as server, Browser(os.path.join(base, "profile"), SIZE) as browser:
        server.request("/settings", SETTINGS)
        browser.resize(*SIZE)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        _take_page(browser, folder)
        _take_panel(browser, folder)
    shutil.rmtree(base)


if __name__ == "__main__":
    main(sys.argv[1])
