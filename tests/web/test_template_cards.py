"""The cards of the templates dialog: those that run here come first and are marked, and run to their pictures with stand-in
files; others say what they lack before anything is downloaded.

TACO_ALL_TEMPLATES=1 runs all of `MARKED`, else the first two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from app.frontend_management import template_file
from tests.e2e.server import Server, wait_until
from tools.template_run import Machinery, reduced

from .browser import Browser
from .test_page import OUTSIDE, READY, _shot, pytestmark  # noqa: F401 (the mark applies to this module too)
from .test_templates import CARDS, DIALOG

MARKED = (
    "flux_schnell", "image_qwen_image", "flux_dev_checkpoint_example", "flux_schnell_full_text_to_image",
    "flux_dev_full_text_to_image", "flux1_krea_dev", "flux_kontext_dev_basic", "sd3.5_simple_example",
    "image_netayume_lumina_t2i", "utility_image_stitch",
)  # fmt: skip
RUN = MARKED if os.environ.get("TACO_ALL_TEMPLATES") else MARKED[:2]
LACKING = {"image_z_image_turbo": "Z-Image", "image_flux2_klein_text_to_image": "Flux.2", "video_ltx2_3_t2v": "LTX-2"}
CARD = "document.querySelector('[data-testid=\"template-workflow-%s\"]')"

_DETAIL = "document.querySelectorAll('[data-testid=template-workflow-detail] footer button')"
OPEN = f"[...{_DETAIL}].find(b => /^open/i.test(b.innerText))"


def workflow(name: str) -> dict[str, Any]:
    path = template_file(name + ".json")
    assert path is not None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def entries() -> dict[str, dict[str, Any]]:
    """The templates of the index as it is installed."""
    path = template_file("index.json")
    assert path is not None
    with open(path, encoding="utf-8") as file:
        return {entry["name"]: entry for group in json.load(file) for entry in group["templates"]}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Browser]]:
    """A page at a server that has stand-ins for the files of the templates in `RUN`."""
    base = str(tmp_path_factory.mktemp("cards"))
    machinery = Machinery(base, {name: workflow(name) for name in RUN}, lambda text: None)
    assert list(machinery.names) == list(RUN), machinery.reports
    with Server(base, flags=["--no-demo"]) as server, Browser(os.path.join(base, "profile")) as browser:
        browser.resize(1400, 900)
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        yield server, browser


def browse(browser: Browser, search: str = "") -> None:
    """Open the dialog and search in it."""
    if not browser.run(DIALOG):
        browser.run("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    browser.wait(f"{DIALOG} && {CARDS}.length > 0")
    browser.run(
        "(() => { const field = [...document.querySelectorAll('[role=dialog] input')].find(i => /earch/.test(i.placeholder));"
        f"Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, {json.dumps(search)});"
        "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def text_of(browser: Browser, name: str) -> str:
    """What a card says, once a search for its title shows it."""
    browse(browser, entries()[name]["title"])
    return browser.wait(f"{CARD % name}?.innerText")


def test_those_that_run_here_come_first_and_are_marked(page: tuple[Server, Browser]) -> None:
    _, browser = page
    browse(browser)
    browser.wait(f"{CARDS}.length > 8")
    shown = browser.run(
        "[...document.querySelectorAll('[data-testid^=template-workflow-]')].slice(0, 9).map(c => c.innerText)"
    )
    assert all("Runs here" in text for text in shown), shown
    _shot(browser, "cards.png")


@pytest.mark.parametrize("name", LACKING)
def test_others_say_what_they_lack_before_any_download(page: tuple[Server, Browser], name: str) -> None:
    _, browser = page
    text = text_of(browser, name)
    assert f"Not here: {LACKING[name]}" in text, text
    _shot(browser, f"lacking_{name}.png")


@pytest.mark.parametrize("name", RUN)
def test_a_marked_one_runs_to_its_picture(page: tuple[Server, Browser], name: str) -> None:
    server, browser = page
    assert "Runs here" in text_of(browser, name)
    browser.run(f"{CARD % name}.click()")
    browser.wait(f"!({DIALOG}) || !!({OPEN})")  # a template with optional files shows its list of files first
    browser.run(f"({OPEN})?.click()")
    browser.wait(f"!({DIALOG})", 30)
    browser.wait(f"app.extensionManager.workflow.activeWorkflow?.path.includes({json.dumps(name)})")
    made = json.loads(browser.run("app.graphToPrompt().then(made => JSON.stringify(made))"))
    reduced(made["output"])
    before = len(server.json("/jobs?status=completed&limit=200")["jobs"])
    browser.run(f"app.api.queuePrompt(0, {json.dumps(made)}).then(() => true)")
    done = lambda: len(server.json("/jobs?status=completed,failed&limit=200")["jobs"]) > before  # noqa: E731
    assert wait_until(done, 120), server.tail()
    job = server.json("/jobs?limit=1")["jobs"][0]
    assert job["status"] == "completed" and job["outputs_count"] > 0, (job, server.tail())
    _shot(browser, f"ran_{name}.png")


def test_a_workflow_that_cannot_run_says_so_when_it_is_opened(page: tuple[Server, Browser]) -> None:
    _, browser = page
    browser.run(f"app.loadGraphData({json.dumps(workflow('image_z_image_turbo'))})")
    browser.wait("document.body.innerText.includes('This workflow cannot run here')")
    assert "Not in this version: Qwen3, Z-Image." in browser.run("document.body.innerText")


def test_no_error_of_ours_on_the_console(page: tuple[Server, Browser]) -> None:
    _, browser = page
    ours = [e for e in browser.errors if not any(word in e for word in (*OUTSIDE, "/templates/", "404"))]
    assert not ours
