"""The token in a real browser: the form, the cookie, and what a page of another site gets."""

from __future__ import annotations

import http.server
import importlib.util
import json
import threading

import pytest

from tests.e2e.server import Server

from .browser import Browser, executable

pytestmark = [
    pytest.mark.skipif(executable() is None, reason="needs Chromium (Debian: apt-get install chromium)"),
    pytest.mark.skipif(
        importlib.util.find_spec("comfyui_frontend_package") is None, reason="needs comfyui-frontend-package"
    ),
    pytest.mark.timeout(170),
]
TOKEN = "a long token <of> ours"


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A page of another site."""

    def do_GET(self):  # noqa: N802
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<p>elsewhere</p>")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def elsewhere():
    """Address of another site."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def socket_opens(browser, port, path="/ws"):
    script = f"""new Promise(done => {{
        const socket = new WebSocket('ws://127.0.0.1:{port}{path}');
        socket.onopen = () => {{ socket.close(); done(true); }};
        socket.onerror = () => done(false);
    }})"""
    return browser.run(script)


def test_a_browser_logs_in_and_another_site_does_not(tmp_path, elsewhere):
    base = tmp_path / "base"
    base.mkdir()
    with Server(str(base), 1, env={"TACO_TOKEN": TOKEN}) as server, Browser(str(tmp_path / "profile")) as browser:
        address = f"http://127.0.0.1:{server.port}"
        browser.open(f"{address}/?token=wrong")
        assert "not this server's" in browser.run("document.body.textContent")
        browser.open(f"{address}/")
        assert browser.run("location.pathname") == "/taco_dit/login"
        browser.run("document.querySelector('input').value = 'wrong'; document.querySelector('form').submit()")
        browser.wait("document.body.textContent.includes('This is not the token')")
        browser.run(
            f"document.querySelector('input').value = {json.dumps(TOKEN)}; document.querySelector('form').submit()"
        )
        browser.wait("location.pathname === '/' && !!(window.app && app.graph)", 60)
        assert browser.run("document.cookie").find("taco_dit") == -1, "scripts cannot read the cookie"
        assert browser.run("fetch('/prompt').then(answer => answer.status)") == 200
        assert socket_opens(browser, server.port)
        browser.open(elsewhere)
        assert not socket_opens(browser, server.port)
        post = f"fetch('{address}/interrupt', {{method: 'POST', mode: 'no-cors', credentials: 'include'}})"
        browser.run(post + ".then(() => true, () => false)")
        refused = [line for line in server.log if "refused (403)" in line]
        assert any("/ws" in line for line in refused) and any("/interrupt" in line for line in refused), server.tail()
        assert not any(TOKEN in line for line in server.log)
