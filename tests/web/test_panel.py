"""The TACO-DiT tab in a real browser, on one rank and on two: ranks, moving values, a rank's error and its cure."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e import workflows
from tests.e2e.server import ROOT, Server
from tests.tiny_models import write_flux

from .browser import Browser, executable
from .test_page import OUTSIDE, READY, SHOTS

pytestmark = [
    pytest.mark.skipif(executable() is None, reason="needs Chromium (Debian: apt-get install chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("comfyui_frontend_package") is None, reason="needs comfyui-frontend-package"
    ),
    pytest.mark.timeout(240),
]

PANEL = "document.querySelector('.taco-panel')"
TAB = "document.querySelector('.taco-dit-tab-button, [data-testid=\"taco-dit-tab-button\"]')"


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Browser]]:
    """A server with the test nodes of tests/e2e, and a browser that has its page open."""
    base = tmp_path_factory.mktemp(f"panel{request.param}")
    write_flux(str(base / "models"))
    shutil.copytree(os.path.join(ROOT, "tests", "e2e", "pack"), base / "custom_nodes" / "e2e_pack")
    shutil.copytree(os.path.join(ROOT, "tests", "packs", "samples", "broken"), base / "custom_nodes" / "broken")
    with Server(str(base), ranks=request.param, flags=["--use-sage-attention"]) as server:
        server.wait_ready()
        server.request("/settings", {"Comfy.TutorialCompleted": True})
        with Browser(str(base / "profile")) as browser:
            browser.resize(1400, 900)
            browser.open(f"http://127.0.0.1:{server.port}/")
            browser.wait(READY, 60)
            yield server, browser


def test_the_page_names_a_pack_that_does_not_load_and_what_to_run(page: tuple[Server, Browser]) -> None:
    server, browser = page
    browser.wait("document.body.textContent.includes('Node pack broken could not be loaded')")
    command = f"{sys.executable} -m pip install a_package_that_nobody_has"
    assert browser.run(f"document.body.textContent.includes({json.dumps(command)})")


def _text(browser: Browser) -> str:
    return browser.run(f"{PANEL}.textContent")


def _load(browser: Browser, prompt: dict[str, Any]) -> None:
    browser.run(f"app.loadApiJson({json.dumps(prompt)}, 'test')")
    browser.wait(f"app.graph._nodes.length === {len(prompt)}")


def _slow(steps: int, **fault: Any) -> dict[str, Any]:
    options = {"label": "panel-", "slow_ms": 60, "fail": "never", "fail_rank": 1, "fail_step": 4, **fault}
    prompt = workflows.flux(seed=21, steps=steps, cfg=4.5, width=320, height=256)
    return workflows.insert(prompt, "watch", "TestModel", **options)


def _shot(browser: Browser, name: str) -> None:
    if SHOTS:
        browser.screenshot(os.path.join(SHOTS, name))


def test_the_tab_opens_and_lists_the_ranks(page: tuple[Server, Browser]) -> None:
    server, browser = page
    browser.wait(f"!!{TAB}")
    browser.run(f"{TAB}.click()")
    browser.wait(f"{PANEL} && {PANEL}.querySelectorAll('.taco-card').length === {server.ranks}")
    browser.wait(f"{PANEL}.querySelectorAll('.taco-card .taco-used').length === {2 * server.ranks}")
    text = _text(browser)
    assert all(f"Rank {rank}" in text for rank in range(server.ranks))
    assert "n/a" in text, "a CPU has no temperature here, and none is invented"
    assert "without effect in this version: --use-sage-attention" in text
    assert "leave these flags out" in text


def test_values_move_while_sampling(page: tuple[Server, Browser]) -> None:
    server, browser = page
    _load(browser, _slow(40))
    browser.run("app.queuePrompt(0)")
    browser.wait(f"!!{PANEL}.querySelector('.taco-busy')")
    steps = f"Number({PANEL}.querySelector('.taco-steps')?.textContent.match(/\\d+/)[0])"
    first = browser.wait(steps)
    browser.wait(f"{steps} > {first + 4}")
    text = _text(browser)
    if server.ranks == 2:
        assert "Plan: cfg 2" in text and "2 ranks, all at work: 2 conditionings on 2 groups" in text
        bars = f"[...{PANEL}.querySelectorAll('.taco-meter .taco-exchange')].map(e => parseFloat(e.style.width))"
        assert max(browser.run(bars)) > 0
    else:
        assert "One rank computes everything" in text
    _shot(browser, f"panel_sampling_{server.ranks}.png")
    browser.wait(f"!{PANEL}.querySelector('.taco-busy')", 60)
    total = browser.wait(f"parseFloat({PANEL}.querySelector('.taco-prompt-total')?.textContent)")
    assert total > 0
    text = _text(browser)
    assert "Last prompt" in text and "denoising" in text and "saving" in text
    widths = browser.run(f"[...{PANEL}.querySelectorAll('.taco-strip .taco-part')].map(e => parseFloat(e.style.width))")
    assert len(widths) >= 3 and 98 < sum(widths) < 102


def test_ranks_and_plan_stay_in_view(page: tuple[Server, Browser]) -> None:
    _, browser = page
    browser.run(f"{PANEL}.scrollTop = 10_000")
    card = browser.run(f"(e => e.getBoundingClientRect().top)({PANEL}.querySelector('.taco-card'))")
    assert 0 < card < 200
    browser.run(f"{PANEL}.scrollTop = 0")


def test_ranks_that_repeat_each_others_work_are_called_waste(page: tuple[Server, Browser]) -> None:
    server, browser = page
    prompt = workflows.flux(seed=23, cfg=4.5)
    prompt["sample"] = {**prompt["sample"], "class_type": "TACODiTKSampler"}
    prompt["sample"]["inputs"] = {**prompt["sample"]["inputs"], "enable_taco_dit": False}
    server.run(prompt)
    last = server.json("/taco_dit/status")["last_run"]
    assert last["working"] == 1 and last["speed_up"] is None, "one rank was never measured here"
    if server.ranks == 2:
        browser.wait(
            f"{PANEL}.querySelector('.taco-waste')?.textContent.includes('2 ranks, 1 at work: parallel.enabled is false')"
        )
        _shot(browser, "panel_waste.png")


def test_prompts_are_columns_of_a_chart_and_one_can_be_chosen(page: tuple[Server, Browser]) -> None:
    server, browser = page
    server.run(workflows.flux(seed=24, steps=1))
    columns = f"{PANEL}.querySelectorAll('.taco-column')"
    count = len(server.json("/taco_dit/status")["last_prompts"])
    browser.wait(f"{columns}.length === {count}")
    browser.run(f"{columns}[0].click()")
    browser.wait(f"{PANEL}.querySelector('.taco-chosen-column') && {PANEL}.textContent.includes('Prompt of ')")
    browser.run(f"{PANEL}.querySelector('.taco-chosen-column').click()")
    assert "Last prompt" in _text(browser)


def test_long_lists_of_messages_are_capped(page: tuple[Server, Browser]) -> None:
    _, browser = page
    shown = browser.run(
        "(async () => { const status = await (await fetch('/api/taco_dit/status')).json();"
        " const { Panel } = await import('/extensions/taco_dit/panel/view.js');"
        " const { textsFor } = await import('/extensions/taco_dit/panel/texts.js');"
        " const at = document.createElement('div');"
        " status.events = [...Array(30).keys()].map(id => ({ id, level: 'warning', text: 'w' + id, cure: 'c', ranks: [0],"
        "   time: 0, count: 1 }));"
        " const panel = new Panel(at, textsFor('en'), () => {}); panel.show(status);"
        " const few = at.querySelectorAll('.taco-event').length; at.querySelector('.taco-more').click();"
        " return [few, at.querySelectorAll('.taco-event').length]; })()"
    )
    assert shown == [4, 30]


def test_an_error_of_a_rank_comes_with_its_cure_and_can_be_cleared(page: tuple[Server, Browser]) -> None:
    server, browser = page
    last = server.ranks - 1
    _load(browser, _slow(20, fail="wrapper", fail_rank=last))
    browser.run("app.queuePrompt(0)")
    found = f"[...{PANEL}.querySelectorAll('.taco-error')].map(e => e.textContent).find(t => t.includes('on purpose'))"
    text = browser.wait(found)
    assert "ArithmeticError: on purpose, inside the model" in text
    assert "(KSampler)" in text and "queue again" in text
    if last:
        assert text.startswith("rank 1 ·") and "rank 1 (cpu) failed" in text
    _shot(browser, f"panel_error_{server.ranks}.png")
    browser.run(f"{PANEL}.querySelector('.taco-clear').click()")
    browser.wait(f"!{PANEL}.querySelector('.taco-event')")
    assert server.json("/taco_dit/status")["events"] == []


def test_markup_in_messages_stays_text(page: tuple[Server, Browser]) -> None:
    _, browser = page
    markup = "<img src=x onerror=window.__taken=1> <b>bold</b>"
    shown = browser.run(
        "(async (markup) => { const status = await (await fetch('/api/taco_dit/status')).json();"
        " const { Panel } = await import('/extensions/taco_dit/panel/view.js');"
        " const { textsFor } = await import('/extensions/taco_dit/panel/texts.js');"
        " const at = document.createElement('div');"
        " const event = { id: 1, level: 'error', text: markup, cure: markup, ranks: [0], node: markup, time: 0, count: 1 };"
        " status.ranks[0].name = markup; status.reason = markup; status.events = [event];"
        " const panel = new Panel(at, textsFor('zh'), () => {}); panel.show(status);"
        " return [at.querySelectorAll('img, b:not(.taco-number)').length, at.querySelector('.taco-message').textContent,"
        " at.querySelector('h3').textContent]; })(%s)" % json.dumps(markup)
    )
    assert shown == [0, markup, "警告和错误"]
    assert not browser.run("window.__taken")


def test_messages_stop_when_the_tab_is_closed(page: tuple[Server, Browser]) -> None:
    server, browser = page
    browser.run(f"{TAB}.click()")
    browser.wait(f"!{PANEL}")
    browser.run("window.__news = 0, app.api.addEventListener('taco_dit', () => window.__news++), true")
    server.run(_slow(30))
    assert browser.run("window.__news") == 0


def test_display_nodes_show_their_text(page: tuple[Server, Browser]) -> None:
    server, browser = page
    prompt = workflows.flux(seed=22, cfg=4.5)
    prompt["sample"]["class_type"] = "TACODiTKSampler"
    workflows.insert(prompt, "spread", "TACODiTModelLoader")
    prompt["info"] = workflows.node("TACODiTInfoDisplay", taco_dit_info=["spread", 1])
    prompt["stats"] = workflows.node("TACODiTStatsDisplay", taco_dit_stats=["sample", 1])
    _load(browser, prompt)
    browser.run("app.queuePrompt(0)")
    shown = "[...document.querySelectorAll('textarea.taco-dit-text')].map(e => e.value).join('\\n')"
    browser.wait(f"{shown}.includes('rank 0: compute') && {shown}.includes('model type: Flux')")
    assert f"ranks: {server.ranks}" in browser.run(shown)
    _shot(browser, f"display_nodes_{server.ranks}.png")


def test_no_console_errors(page: tuple[Server, Browser]) -> None:
    _, browser = page
    foreign = (*OUTSIDE, "ArithmeticError", "on purpose")  # the page itself writes the error of a prompt down
    assert not [error for error in browser.errors if not any(word in error for word in foreign)]
