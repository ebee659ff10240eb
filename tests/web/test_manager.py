"""The real ComfyUI-Manager in the page, on two ranks: a missing pack is installed where the page names it, the program starts
again, the node runs on all ranks; then the pack is updated, disabled, enabled and removed."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, wait_until

from .browser import Browser
from .pack_site import NAME, NODE, REGISTRY, PackSite, workflow
from .test_first_screen import LABEL
from .test_page import READY, _shot
from .test_page import pytestmark as needs_a_page

pytestmark = [
    *needs_a_page,
    pytest.mark.skipif(importlib.util.find_spec("comfyui_manager") is None, reason="needs comfyui-manager"),
]

BUTTONS = "[...document.querySelectorAll('button')]"


def free_port() -> int:
    """A port that is free now: the program starts again on the same one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def press(browser: Browser, text: str, seconds: float = 20.0) -> None:
    """Click the last button with exactly this text or label, once it is there and can be clicked."""
    named = f"[e.innerText.trim(), e.ariaLabel].includes({json.dumps(text)})"
    found = f"{BUTTONS}.filter(e => !e.disabled && {named}).at(-1)"
    browser.wait(f"!!({found})", seconds)
    browser.run(f"({found}).click()")


def shows(browser: Browser, text: str, seconds: float = 20.0) -> None:
    browser.wait(f"document.body.innerText.includes({json.dumps(text)})", seconds)


class Manager:
    """A server with a Manager, a page that lacks the pack's node, and the site that has the pack."""

    def __init__(self, server: Server, browser: Browser, site: PackSite) -> None:
        self.server, self.browser, self.site = server, browser, site
        self.packs = os.path.join(server.base, "custom_nodes")

    def restart(self) -> None:
        """Press what the page offers for it, and wait until the page is back."""
        before = self.server.pids()
        self.server.listening_again()
        press(self.browser, "Apply Changes")
        self.server.wait_ready()
        assert not set(before) & set(self.server.pids()), "all ranks are new"
        self.browser.wait(f"!!LiteGraph.registered_node_types[{json.dumps(NODE)}]", 60)

    def say(self) -> list[str]:
        """Run the workflow with the page's button; what the node says."""
        done = len(self.server.json("/jobs?status=completed")["jobs"])
        self.browser.run("document.querySelector('[data-testid=queue-button]').click()")
        assert wait_until(lambda: len(self.server.json("/jobs?status=completed")["jobs"]) > done, 20)
        (latest,) = self.server.json("/history?max_items=1").values()
        return latest["outputs"]["1"]["text"]

    def switch(self, now: str) -> None:
        """Turn the pack on or off by the dialog's switch, whose state is `now`; waits until the Manager is done."""
        switch = "document.querySelector('[role=dialog] [role=switch]')"
        self.browser.wait(f"{switch}?.ariaChecked === '{now}' && !{switch}.disabled")
        before = self.installed()
        self.browser.run(f"{switch}.click()")
        done = lambda: self.installed() != before and not self.server.json("/v2/manager/queue/status")["is_processing"]  # noqa: E731
        assert wait_until(done, 30), self.server.tail()

    def installed(self) -> bool:
        return os.path.isfile(os.path.join(self.packs, NAME, "__init__.py"))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Manager]:
    base = str(tmp_path_factory.mktemp("manager"))
    os.makedirs(os.path.join(base, "custom_nodes"))
    with PackSite(os.path.join(base, "site")) as site:
        site.configure(os.path.join(base, "user"))
        flags = ["--enable-manager", "--port", str(free_port())]
        with Server(base, ranks=2, flags=flags) as server, Browser(os.path.join(base, "profile")) as browser:
            browser.answer(REGISTRY, site.registry)
            server.request("/settings", {"Comfy.TutorialCompleted": True})
            browser.resize(1400, 900)
            browser.open(f"http://127.0.0.1:{server.port}/")
            browser.wait(READY, 60)
            yield Manager(server, browser, site)


def test_a_missing_pack_is_installed_from_the_page_and_its_node_runs(manager: Manager) -> None:
    browser = manager.browser
    browser.run(f"app.loadGraphData({json.dumps(workflow())})")
    press(browser, "View details")
    shows(browser, "Missing Node Packs")
    _shot(browser, "manager_missing.png")
    press(browser, "Install")
    assert wait_until(manager.installed, 30), manager.server.tail()
    manager.restart()
    assert manager.say() == ["release 1"]
    _shot(browser, "manager_ran.png")


def test_the_pack_is_updated_disabled_enabled_and_removed(manager: Manager) -> None:
    browser, folder = manager.browser, os.path.join(manager.packs, NAME)
    manager.site.publish(2)
    press(browser, "Extensions")
    shows(browser, "Packed text")
    browser.run(f"({LABEL % 'Packed text'}).click()")
    press(browser, "Try Update")

    def release() -> str:
        with open(os.path.join(folder, "__init__.py"), encoding="utf-8") as file:
            return file.read()

    assert wait_until(lambda: '" 2"' in release(), 30), manager.server.tail()
    _shot(browser, "manager_updated.png")
    manager.switch("true")
    assert not manager.installed()
    assert any(name.startswith(NAME) for name in os.listdir(os.path.join(manager.packs, ".disabled")))
    manager.switch("false")
    assert manager.installed()
    press(browser, "Uninstall")
    _shot(browser, "manager_uninstall.png")
    assert wait_until(lambda: not os.path.exists(folder), 30), manager.server.tail()


def test_no_console_errors(manager: Manager) -> None:
    # the page's makers: their page does not know a message of their Manager, and asks for jobs while the server restarts
    theirs = ("cm-queue-status", "Failed to fetch", "Network Error", "ERR_", "WebSocket")
    assert not [error for error in manager.browser.errors if not any(word in error for word in theirs)]
