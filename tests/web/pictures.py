"""Take the pictures of the page that the documentation shows: two ranks on the CPU and the demo model.

python -m tests.web.pictures docs/images
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile

from demo.evaluate import cases, workflow
from tests.e2e import workflows
from tests.e2e.server import ROOT, Server

from .browser import Browser
from .test_page import READY
from .test_panel import PANEL, TAB

SIZE = (1400, 900)
NO_NOTICE = "!/Job (queued|completed|failed)/.test(document.body.textContent)"
SETTINGS = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False}
DRAWN = "app.graph._nodes.some(n => n.type === 'SaveImage' && n.imgs?.length)"
SHOW_WHOLE_GRAPH = "app.extensionManager.command.execute('Comfy.Canvas.FitView')"
MANY_STEPS = "app.graph._nodes.find(n => n.type === 'KSampler').widgets.find(w => w.name === 'steps').value = 200"


def _take_first_screen(browser: Browser, folder: str) -> None:
    """A newcomer's page, after Run."""
    browser.run("app.queuePrompt(0)")
    browser.wait(DRAWN, 120)
    browser.wait(NO_NOTICE)
    browser.screenshot(os.path.join(folder, "first_screen.png"))


def _take_panel(browser: Browser, folder: str) -> None:
    """The same page with the panel open, during a long run and after one that failed on rank 1."""
    broken = workflows.insert(workflow(cases(4)[0]), "trip", "TestFail", "5", "latent_image", rank=1, kind="plain")
    browser.resize(SIZE[0], 1080)
    browser.run("fetch('/api/taco_dit/events', {method: 'POST', body: JSON.stringify({clear: true})}).then(r => r.ok)")
    browser.run(f"{TAB}.click()")
    server_prompt = json.dumps({"prompt": broken})
    browser.run(f"fetch('/api/prompt', {{method: 'POST', body: {json.dumps(server_prompt)}}}).then(r => r.ok)")
    browser.wait(f"{PANEL}?.textContent.includes('on purpose')", 60)
    browser.run(MANY_STEPS)
    browser.run(SHOW_WHOLE_GRAPH)
    browser.run("app.queuePrompt(0)")
    browser.wait(f"Number({PANEL}.querySelector('.taco-steps')?.textContent.match(/\\d+/)[0]) > 40", 60)
    browser.wait(NO_NOTICE)
    browser.screenshot(os.path.join(folder, "panel.png"))


def main(folder: str) -> None:
    """Write first_screen.png and panel.png."""
    base = tempfile.mkdtemp()
    shutil.copytree(os.path.join(ROOT, "tests", "e2e", "pack"), os.path.join(base, "custom_nodes", "e2e_pack"))
    with Server(base, ranks=2) as server, Browser(os.path.join(base, "profile"), SIZE) as browser:
        server.request("/settings", SETTINGS)
        browser.resize(*SIZE)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        _take_first_screen(browser, folder)
        _take_panel(browser, folder)
    shutil.rmtree(base)


if __name__ == "__main__":
    main(sys.argv[1])
