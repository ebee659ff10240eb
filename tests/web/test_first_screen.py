"""A newcomer's browser: the demo workflow opens and draws, on one rank and on two; own models and own work come first."""

from __future__ import annotations

import glob
import io
import json
import os
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from app import demo
from demo.judge import judge
from demo.scenes import Spec, Thing
from tests.e2e.server import Server
from tests.tiny_models import write_flux

from .browser import Browser
from .test_page import OUTSIDE, READY, _shot
from .test_page import pytestmark as needs_a_page
from .test_templates import CARDS, DIALOG

DEMO_FILE = os.path.join(demo.MODELS, "checkpoints", demo.CHECKPOINT)
pytestmark = [
    *needs_a_page,
    pytest.mark.skipif(not os.path.isfile(DEMO_FILE), reason=f"needs {DEMO_FILE}: python -m demo.train"),
]

NAMES = [os.path.basename(path)[:-5] for path in sorted(glob.glob(os.path.join(demo.WORKFLOWS, "*.json")))]
PROMPT = "a red circle above a green square"
TEXTS = "app.graph._nodes.filter(n => n.type === 'CLIPTextEncode').map(n => n.widgets[0].value)"
PICTURES = "app.graph._nodes.filter(n => n.type === 'SaveImage' && n.imgs?.length).length"
LABEL = "[...document.querySelectorAll('[role=dialog] *')].find(e => !e.children.length && e.innerText === '%s')"


def _ours(browser: Browser) -> list[str]:
    """Console errors that are not about services elsewhere, or preview pictures which are packages of their own."""
    return [error for error in browser.errors if not any(word in error for word in (*OUTSIDE, "/templates/"))]


def _settle(browser: Browser) -> None:
    """Time for what the page does after it shows its first graph."""
    browser.wait("new Promise(done => setTimeout(() => done(true), 2000))")


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Browser]]:
    """A new browser at a server whose only model is the demo model."""
    base = tmp_path_factory.mktemp(f"first{request.param}")
    with Server(str(base), ranks=request.param) as server, Browser(str(base / "profile")) as browser:
        browser.resize(1400, 900)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        yield server, browser


def test_the_first_visit_opens_on_the_demo_workflow(page: tuple[Server, Browser]) -> None:
    _, browser = page
    _settle(browser)
    assert browser.run(TEXTS) == [PROMPT, ""]
    assert not browser.run(DIALOG)
    assert not _ours(browser)
    _shot(browser, "first_screen.png")


def test_run_draws_it(page: tuple[Server, Browser]) -> None:
    server, browser = page
    browser.run("document.querySelector('[data-testid=queue-button]').click()")
    browser.wait(f"{PICTURES} === 1", 90)  # three seconds on an idle machine
    done = server.json("/jobs?status=completed")["jobs"]
    assert len(done) == 1 and done[0]["preview_output"]["subfolder"] == "taco_dit_demo"
    image = {key: done[0]["preview_output"][key] for key in ("filename", "subfolder", "type")}
    picture = np.asarray(Image.open(io.BytesIO(server.file(image))).convert("RGB")) / 255
    verdict = judge(picture, Spec("pair", (Thing("circle", "red"), Thing("square", "green")), "above"))
    assert verdict.right, verdict.wrong
    ran = server.json("/taco_dit/status")
    assert ran["last_run"]["calls"] == 20 and ran["last_run"]["world_size"] == server.ranks
    _shot(browser, f"first_picture_{server.ranks}.png")


@pytest.mark.parametrize("page", [1], indirect=True, ids=["1 rank"])
def test_a_second_visit_keeps_what_was_edited(page: tuple[Server, Browser]) -> None:
    server, browser = page
    field = f"[...document.querySelectorAll('textarea')].find(e => e.value === {json.dumps(PROMPT)})"
    browser.run(f"(field => {{ field.focus(); field.select(); }})({field})")
    browser.call("Input.insertText", text="two blue stars")
    for kind in ("mousePressed", "mouseReleased"):  # beside all nodes
        browser.call("Input.dispatchMouseEvent", type=kind, x=700, y=750, button="left", clickCount=1)
    browser.wait("Object.values(localStorage).some(value => value.includes('two blue stars'))")
    # also when the server has forgotten that somebody was here
    for visited in (True, False):
        server.request("/settings", {"Comfy.TutorialCompleted": visited})
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        _settle(browser)
        assert browser.run(TEXTS) == ["two blue stars", ""]
        assert not browser.run(DIALOG)
    assert not _ours(browser)


@pytest.mark.parametrize("page", [1], indirect=True, ids=["1 rank"])
def test_another_browser_begins_with_it_too(page: tuple[Server, Browser], tmp_path: os.PathLike[str]) -> None:
    server, _ = page
    with Browser(str(tmp_path)) as other:
        other.open(f"http://127.0.0.1:{server.port}/")
        other.wait(READY, 60)
        _settle(other)
        assert other.run(TEXTS) == [PROMPT, ""]
        assert not other.run(DIALOG)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page", [1], indirect=True, ids=["1 rank"])
def test_a_workflow_is_chosen_among_the_templates_and_draws(page: tuple[Server, Browser], name: str) -> None:
    server, browser = page
    before = len(server.json("/jobs?status=completed&limit=200")["jobs"])
    browser.run("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    browser.wait(f"!!({LABEL % demo.GROUP})")
    browser.run(f"({LABEL % demo.GROUP}).click()")
    card = f"template-workflow-{name}"
    browser.wait(f"{CARDS}.includes({json.dumps(card)})")
    if name == NAMES[0]:
        assert browser.run(CARDS) == [f"template-workflow-{name}" for name in NAMES]
        _shot(browser, "our_templates.png")
    browser.run(f"document.querySelector('[data-testid={json.dumps(card)}]').click()")
    with open(os.path.join(demo.WORKFLOWS, name + ".json"), encoding="utf-8") as file:
        types = sorted(node["type"] for node in json.load(file)["nodes"])
    browser.wait(f"!({DIALOG}) && app.graph._nodes.map(n => n.type).sort().join() === '{','.join(types)}'")
    browser.run("document.querySelector('[data-testid=queue-button]').click()")
    browser.wait(f"{PICTURES} === {types.count('SaveImage')}", 150)
    browser.wait("fetch('/api/jobs?status=completed&limit=200&offset=0').then(r => r.json())"
                 f".then(j => j.jobs.length === {before + 1})")  # fmt: skip
    _shot(browser, f"{name}.png")


def test_with_one_own_file_run_gives_a_picture_of_it(tmp_path: os.PathLike[str]) -> None:
    write_flux(os.path.join(tmp_path, "models"))
    for kind in ("diffusion_models", "loras", "text_encoders", "vae"):  # a checkpoint is enough
        shutil.rmtree(os.path.join(tmp_path, "models", kind))
    os.remove(
        os.path.join(tmp_path, "models", "checkpoints", "tiny_flux_dev.safetensors")
    )  # 20 steps of this size take minutes on a CPU
    with Server(str(tmp_path)) as server, Browser(os.path.join(tmp_path, "profile")) as browser:
        browser.resize(1400, 900)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        _settle(browser)
        assert not browser.run(DIALOG)
        loaders = "app.graph._nodes.filter(n => n.type === 'CheckpointLoaderSimple').map(n => n.widgets[0].value)"
        assert browser.run(loaders) == ["tiny_flux_schnell.safetensors"]
        _shot(browser, "own_file.png")
        # only the size is made smaller: as it is the picture takes a CPU more than a minute
        size = "app.graph._nodes.find(n => n.type === 'EmptySD3LatentImage').widgets"
        assert browser.run(f"{size}.slice(0, 2).map(w => w.value)") == [1024, 1024]
        browser.run(f"{size}.slice(0, 2).forEach(w => {{ w.value = 128; }})")
        browser.run("document.querySelector('[data-testid=queue-button]').click()")
        browser.wait(f"{PICTURES} === 1", 60)
        options = "LiteGraph.registered_node_types.CheckpointLoaderSimple.nodeData.input.required.ckpt_name[0]"
        assert browser.run(options) == ["tiny_flux_schnell.safetensors", demo.CHECKPOINT]
        assert not _ours(browser)
