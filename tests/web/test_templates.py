"""A new user, without the demo model: the page opens with the templates, one is searched, chosen and loaded, and its
nodes are all known."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from tests.e2e.server import Server

from .browser import Browser
from .test_page import OUTSIDE, _shot, pytestmark  # noqa: F401 (the mark applies to this module too)

DIALOG = "!!document.querySelector('[data-testid=template-workflows-content]')"
CARDS = "[...document.querySelectorAll('[data-testid^=template-workflow-]')].map(card => card.dataset.testid)"


@contextlib.contextmanager
def newcomer_opens(base: str, *flags: str) -> Iterator[Browser]:
    """The page in a new browser, with its dialog of templates."""
    with Server(base, flags=flags) as server, Browser(os.path.join(base, "profile")) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(DIALOG, 60)
        yield browser


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page as it opens for the first time, on a server without models."""
    with newcomer_opens(str(tmp_path_factory.mktemp("newcomer")), "--no-demo") as browser:
        yield browser


def test_a_template_is_found_and_loaded(newcomer: Browser) -> None:
    browser = newcomer
    browser.wait(f"{CARDS}.length > 8")
    _shot(browser, "templates.png")
    browser.run(
        "(() => { const field = [...document.querySelectorAll('input')].find(i => /earch/.test(i.placeholder));"
        "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, 'Flux Schnell FP8');"
        "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    browser.wait(f"{CARDS}.includes('template-workflow-flux_schnell') && {CARDS}.length < 5")
    browser.run("document.querySelector('[data-testid=template-workflow-flux_schnell]').click()")
    browser.wait("window.app.graph._nodes.some(n => n.type === 'CheckpointLoaderSimple')")
    browser.wait(f"!({DIALOG})")
    types = browser.run("app.graph._nodes.map(n => n.type)")
    assert "KSampler" in types and "SaveImage" in types
    front_end_only = {"MarkdownNote", "Note", "Reroute", "PrimitiveNode"}
    known = browser.run("Object.keys(LiteGraph.registered_node_types)")
    assert not set(types) - set(known) - front_end_only
    # The template names a model that is not there, which the page says; the graph must be usable all the same.
    sampler = "app.graph._nodes.find(n => n.type === 'KSampler')"
    assert browser.run(f"{sampler}.widgets.map(w => w.name)")[:3] == ["seed", "control_after_generate", "steps"]
    _shot(browser, "template.png")


def test_no_error_of_ours_on_the_console(newcomer: Browser) -> None:
    # Preview pictures of templates are packages of their own, which may be left out.
    ours = [e for e in newcomer.errors if not any(word in e for word in (*OUTSIDE, "/templates/"))]
    assert not [e for e in ours if "404" not in e], ours
