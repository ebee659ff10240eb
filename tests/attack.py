"""Attack a server as a stranger on the network, or a page of another site, would, and say what it refuses.

    python -m tests.attack                        a scratch server of two ranks on the CPU; a few minutes
    python -m tests.attack --short                without the attacks that wait for time limits
    python -m tests.attack --url http://HOST:PORT a running server; with its token in TACO_TOKEN, if it has one

One line per attack: refused, NOT refused, or skipped (what needs a folder of the server, with --url). The exit status is 1
when one was not refused. Files are uploaded to the server's temp folder only.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import io
import json
import os
import secrets
import socket
import ssl
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from tests import attack_files

SECRET = b"nobody may see this"
ANSWER_S = 30.0
TALK_S = 5.0  # within which others are answered during an attack
HEADERS_S, BODY_S = 20.0, 70.0  # the server's limits are 15 s, and 30 s after the last part
FOLDER = "attack"


class NotRefused(Exception):
    """An attack succeeded; the text says how."""


class Skipped(Exception):
    """An attack cannot be tried; the text says why."""


@dataclass
class Target:
    """The server: its address, its token, its base folder when it is ours, and a folder beside it with a secret."""

    url: str
    token: str = ""
    base: str | None = None
    pid: int | None = None  # of the supervisor, when it is ours

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        self.tls = parts.scheme == "https"
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or (443 if self.tls else 80)
        self.authority = f"{'[' + self.host + ']' if ':' in self.host else self.host}:{self.port}"

    def connect(self) -> socket.socket:
        """A connection to the server, over TLS where its address says so."""
        plain = socket.create_connection((self.host, self.port), ANSWER_S)
        if not self.tls:
            return plain
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(plain, server_hostname=self.host)

    def head(self, method: str, path: str, headers: dict[str, str], length: int | None) -> bytes:
        """A request's head; headers given as "" are left out."""
        every = {"Host": self.authority, "Connection": "close"}
        every |= {"Authorization": f"Bearer {self.token}"} if self.token else {}
        every |= {} if length is None else {"Content-Length": str(length)}
        every |= headers
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in every.items() if value)]
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n"

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) of a request that is sent exactly as written; status 0 for a closed connection."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.connect() as connection:
            # a server that refuses what it has not read yet closes the connection; its answer may still be read
            with contextlib.suppress(ConnectionError):
                connection.sendall(
                    self.head(method, path, named, len(body) if body or method == "POST" else None) + body
                )
            answer = http.client.HTTPResponse(connection)
            try:
                answer.begin()
                content = answer.read(1 << 20)
            except (ConnectionError, http.client.HTTPException):
                return 0, {}, b""
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def json(self, method: str, path: str, value: Any = None) -> Any:
        """JSON of an answer that must be 200."""
        body = b"" if value is None else json.dumps(value).encode()
        status, _, content = self.send(method, path, body, Content_Type="application/json")
        if status != 200:
            raise RuntimeError(f"{method} {path} is answered with {status}: {content[:200]!r}")
        return json.loads(content)

    def upload(self, name: str, content: bytes, **fields: str) -> tuple[int, dict[str, str], bytes]:
        """Upload a file into the temp folder."""
        edge = secrets.token_hex(8)
        every = {"type": "temp", "subfolder": FOLDER, "overwrite": "true"} | fields
        lines = [
            f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}' for key, value in every.items()
        ]
        lines.append(f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n')
        body = "\r\n".join(lines).encode("utf-8", "surrogateescape") + content + f"\r\n--{edge}--\r\n".encode()
        return self.send("POST", "/upload/image", body, Content_Type=f"multipart/form-data; boundary={edge}")

    def run(self, prompt: dict[str, Any]) -> str:
        """Why a prompt fails: its refusal or its error; "" when it succeeds."""
        status, _, content = self.send(
            "POST", "/prompt", json.dumps({"prompt": prompt}).encode(), Content_Type="application/json"
        )
        if status != 200:
            return content.decode(errors="replace") or "closed"
        number = json.loads(content)["prompt_id"]
        end = time.monotonic() + 2 * ANSWER_S
        while time.monotonic() < end:
            entry = self.json("GET", f"/history/{number}").get(number)
            if entry:
                errors = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
                return errors[0]["exception_message"] if errors else ""
            time.sleep(0.05)
        raise NotRefused("the prompt did not end")

    def is_well(self) -> None:
        """Raises NotRefused when the server does not answer others in time."""
        begun = time.monotonic()
        self.json("GET", "/prompt")
        if time.monotonic() - begun > TALK_S:
            raise NotRefused(f"others waited {time.monotonic() - begun:.1f} s")


def refuse(condition: bool, how: str) -> None:
    """Raises NotRefused unless the condition, that the server refused, holds."""
    if not condition:
        raise NotRefused(how)


# ---- paths -----------------------------------------------------------------------------------------------------------

UPS = ["../secret.txt", "..%2Fsecret.txt", "..%5Csecret.txt", "%2e%2e/secret.txt", "..%252fsecret.txt", "%2Fetc%2Fpasswd",
       "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd", "/etc/passwd", "//etc/passwd", "....//secret.txt",
       "secret.txt%00.png"]  # fmt: skip
READERS = ["/view?filename={}&type=input", "/view?filename=passwd&type=input&subfolder={}", "/userdata/{}", "/userdata?dir={}",
           "/v2/userdata?path={}", "/view_metadata/loras?filename={}", "/experiment/models/preview/loras/0/{}",
           "/templates/{}", "/extensions/{}", "/docs/{}", "/internal/files/{}", "/{}"]  # fmt: skip


def reads_outside(target: Target) -> None:
    for reader in READERS:
        for way in UPS:
            _, _, content = target.send("GET", reader.format(way))
            refuse(SECRET not in content and b"root:" not in content, f"GET {reader.format(way)} shows the file")


def writes_outside(target: Target) -> None:
    name = f"attack-{secrets.token_hex(4)}.txt"
    for way in (f"..%2F{name}", f"%2Ftmp%2F{name}", f"..%5C{name}", f"a%2F..%2F..%2F{name}"):
        status, _, _ = target.send("POST", f"/userdata/{way}", b"x")
        refuse(status in (0, 400, 403, 404), f"POST /userdata/{way} is answered with {status}")
    for subfolder in ("..", "/tmp", "../..", "a/../.."):
        status, _, _ = target.upload(name, b"x", subfolder=subfolder)
        refuse(status in (0, 400, 403), f"an upload into {subfolder} is answered with {status}")


def _links(target: Target) -> str:
    """Plant a secret beside the server's folders and links to it inside; its folder."""
    if target.base is None:
        raise Skipped("needs a folder of the server")
    outside = os.path.join(os.path.dirname(target.base), "outside")
    if not os.path.isdir(outside):
        os.makedirs(outside)
        from PIL import Image

        Image.new("RGB", (8, 8)).save(os.path.join(outside, "secret.png"), pnginfo=None)
        for folder in ("input", "output", "user/default"):
            os.makedirs(os.path.join(target.base, folder), exist_ok=True)
            os.symlink(outside, os.path.join(target.base, folder, "link"))
            os.symlink(os.path.join(outside, "secret.png"), os.path.join(target.base, folder, "link.png"))
    return outside


def links_over_http(target: Target) -> None:
    _links(target)
    for path in ("/view?filename=link.png&type=input", "/view?filename=secret.png&subfolder=link&type=output",
                 "/view?filename=link.png&type=input&preview=webp", "/userdata/link.png",
                 "/userdata/link%2Fsecret.png"):  # fmt: skip
        status, _, _ = target.send("GET", path)
        refuse(status in (400, 403, 404), f"GET {path} is answered with {status}")


def _load(name: str) -> dict[str, Any]:
    return {"1": {"class_type": "LoadImage", "inputs": {"image": name}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}  # fmt: skip


def links_in_nodes(target: Target) -> None:
    outside = _links(target)
    for name in ("link.png", "link/secret.png", "link/secret.png [output]"):
        refuse(target.run(_load(name)) != "", f"LoadImage opens {name}")
    save = _load(f"{FOLDER}/good.png [temp]")
    save["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "link/stolen"}}
    target.upload("good.png", _good_picture())
    refuse(target.run(save) != "", "SaveImage writes through a link")
    refuse(os.listdir(outside) == ["secret.png"], f"there are {os.listdir(outside)}")


def _good_picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def active_content(target: Target) -> None:
    for kind, name in attack_files.PAGES.items():
        target.upload(name, b"<script>alert(1)</script>")
        _, headers, _ = target.send("GET", f"/view?filename={name}&type=temp&subfolder={FOLDER}")
        shown = headers.get("content-type") != "application/octet-stream" or not headers.get(
            "content-disposition", ""
        ).startswith("attachment")
        refuse(not shown and headers.get("x-content-type-options") == "nosniff", f"{kind} is shown: {headers}")


# ---- other sites -----------------------------------------------------------------------------------------------------

SITES = ["https://evil.example", "http://evil.example:{port}", "null", "http://{host}:1", "http://{host}.evil.example",
         "http://evil.example@{authority}", "file://", "chrome-extension://abcdefgh"]  # fmt: skip
UPGRADE = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13",
           "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip


def foreign_origin(target: Target) -> None:
    for site in SITES:
        origin = site.format(host=target.host, port=target.port, authority=target.authority)
        for method, path in (
            ("POST", "/prompt"),
            ("POST", "/interrupt"),
            ("GET", "/history"),
            ("POST", "/upload/image"),
        ):
            status, _, _ = target.send(method, path, b"{}" if method == "POST" else b"", Origin=origin)
            refuse(status == 403, f"{method} {path} of {origin} is answered with {status}")
    status, _, _ = target.send("POST", "/interrupt", b"{}", Sec_Fetch_Site="cross-site")
    refuse(status == 403, f"a request that says it is cross-site is answered with {status}")


def foreign_socket(target: Target) -> None:
    for site in SITES:
        origin = site.format(host=target.host, port=target.port, authority=target.authority)
        status, _, _ = target.send("GET", "/ws", **UPGRADE, Origin=origin)
        refuse(status == 403, f"a WebSocket of {origin} is answered with {status}")
    status, _, _ = target.send("GET", "/ws", **UPGRADE, Host="evil.example", Origin="http://evil.example")
    refuse(status == 403, f"a WebSocket to evil.example is answered with {status}")


def foreign_host(target: Target) -> None:
    """The address of evil.example became the server's after its page was loaded, so Origin and Host agree."""
    for name in ("evil.example", f"evil.example:{target.port}", f"127.0.0.1.evil.example:{target.port}",
                 "localhost.evil.example", f"evil.example@{target.authority}", "xn--e1afmkfd.example"):  # fmt: skip
        for path in ("/", "/prompt", "/object_info", "/api/queue"):
            begun = time.monotonic()
            status, _, _ = target.send("GET", path, Host=name, Origin=f"http://{name}")
            refuse(status in (400, 403), f"GET {path} to {name} is answered with {status}")
            refuse(
                time.monotonic() - begun < TALK_S, f"the answer took {time.monotonic() - begun:.1f} s: a lookup in DNS?"
            )


# ---- connections -----------------------------------------------------------------------------------------------------


def _closed_within(connections: list[socket.socket], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    for connection in connections:
        connection.settimeout(max(0.1, end - time.monotonic()))
        try:
            while connection.recv(65536):
                pass
        except TimeoutError:
            raise NotRefused(f"{what} stay open for {seconds:.0f} s") from None
        except ConnectionError:
            pass


def half_sent(target: Target, wait: bool) -> None:
    """Headers without an end, bodies without an end, and connections that send nothing."""
    opened = [target.connect() for _ in range(60)]
    try:
        head = target.head("POST", "/prompt", {}, 1000)
        for connection in opened[:20]:
            connection.sendall(head[:-10])
        for connection in opened[20:40]:
            connection.sendall(head + b"{")
        target.is_well()
        if wait:
            _closed_within(opened[:20] + opened[40:], HEADERS_S, "requests without the end of their headers")
            _closed_within(opened[20:40], BODY_S - HEADERS_S, "requests without the end of their bodies")
    finally:
        for connection in opened:
            connection.close()


def deaf_pages(target: Target) -> None:
    """Pages that never read what they are sent."""
    opened = []
    try:
        for number in range(30):
            connection = target.connect()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            headers = {name.replace("_", "-"): value for name, value in UPGRADE.items()}
            connection.sendall(target.head("GET", f"/ws?clientId=deaf{number}", headers, None))
            opened.append(connection)
        for _ in range(20):
            target.send("POST", "/queue", b'{"clear": true}')
        target.is_well()
    finally:
        for connection in opened:
            connection.close()


# ---- bodies ----------------------------------------------------------------------------------------------------------


def nan_bodies(target: Target) -> None:
    for body in (b"NaN", b"Infinity", b'{"a": NaN}', b'{"a": [-Infinity]}'):
        for path in ("/settings/attack.number", "/prompt", "/queue"):
            status, _, _ = target.send("POST", path, body)
            refuse(status == 400, f"POST {path} {body!r} is answered with {status}")
    target.send("POST", "/settings/attack.number", b"1e999")
    _, _, content = target.send("GET", "/settings")
    target.send("POST", "/settings/attack.number", b"null")
    refuse(b"Infinity" not in content and b"NaN" not in content, "the settings hold what JSON.parse refuses")


def large_json(target: Target) -> None:
    for name, body, expected in (
        ("40 MB", b'{"prompt": "' + b"x" * 40_000_000 + b'"}', (0, 413)), ("nested", b"[" * 200_000, (400,)),
        ("a number of a million digits", b"1" * 1_000_000, (400,)), ("not an object", b"[]", (400,)),
    ):  # fmt: skip
        status, _, _ = target.send("POST", "/prompt", body)
        refuse(status in expected, f"JSON ({name}) is answered with {status}")
        target.is_well()
    for body in (b"", b"[]", b"1", b"{", b"\xff\xfe"):
        status, _, _ = target.send("POST", "/settings", body)
        refuse(status == 400, f"settings {body!r} are answered with {status}")


def packed_body(target: Target) -> None:
    status, _, _ = target.send("POST", "/prompt", gzip.compress(bytes(500_000_000), 1), Content_Encoding="gzip")
    refuse(status in (0, 400, 413), f"a packed body of 500 MB is answered with {status}")
    target.is_well()


# ---- pictures --------------------------------------------------------------------------------------------------------


def bad_picture(name: str, make: Callable[[], bytes]) -> Callable[[Target], None]:
    """A picture that no route and no node may open."""

    def attack(target: Target) -> None:
        status, _, content = target.upload(name, make())
        refuse(status == 200, f"the upload is answered with {status} {content[:100]!r}")
        stored = json.loads(content)["name"]
        query = urllib.parse.urlencode({"filename": stored, "type": "temp", "subfolder": FOLDER})
        for more in ("&preview=webp", "&channel=rgb"):
            status, _, content = target.send("GET", f"/view?{query}{more}")
            refuse(status == 400, f"GET /view{more} is answered with {status}")
        problem = target.run(_load(f"{FOLDER}/{stored} [temp]"))
        known = ("--max-image", "not a picture of a format", "decompression bomb")
        refuse(any(words in problem for words in known), f"LoadImage: {problem[:200] or 'opens it'}")

    return attack


def playlist(target: Target) -> None:
    if "LoadAudio" not in target.json("GET", "/object_info/LoadAudio"):
        raise Skipped("the server has no LoadAudio")
    target.upload("sound.mp3", attack_files.playlist())
    prompt = {"1": {"class_type": "LoadAudio", "inputs": {"audio": f"{FOLDER}/sound.mp3 [temp]"}},
              "2": {"class_type": "PreviewAudio", "inputs": {"audio": ["1", 0]}}}  # fmt: skip
    problem = target.run(prompt)
    refuse("not a video or sound of a format" in problem, f"LoadAudio: {problem[:200] or 'opens it'}")


# ---- the token -------------------------------------------------------------------------------------------------------


def wrong_tokens(target: Target) -> None:
    stranger = Target(target.url)
    if stranger.send("GET", "/prompt")[0] == 200:
        raise Skipped("the server has no token; TACO_TOKEN sets one")
    for path in ("/prompt", "/api/prompt", "/object_info", "/view?filename=a", "/system_stats", "/metrics", "/internal/logs",
                 "/extensions", "/taco_dit/status", "/nothing"):  # fmt: skip
        for headers in ({}, {"Authorization": "Basic eDp4"}, {"Cookie": "taco_dit=1"}, {"Authorization": "Bearer "}):
            status, _, _ = stranger.send("GET", path, **headers)
            refuse(status == 401, f"GET {path} with {headers} is answered with {status}")
    refuse(stranger.send("GET", "/")[0] in (303, 401), "the page is shown")
    refuse(stranger.send("GET", "/ws", **UPGRADE)[0] == 401, "a WebSocket is opened")
    statuses = [stranger.send("GET", "/prompt", Authorization=f"Bearer {number}")[0] for number in range(8)]
    refuse(set(statuses) <= {401, 429} and 429 in statuses, f"guesses are answered with {statuses}")


def ranks_from_outside(target: Target) -> None:
    """The ranks' messages to each other: no port and no named socket leads there."""
    if target.pid is None:
        raise Skipped("needs the server's processes")
    parent = psutil.Process(target.pid)
    for process in (parent, *parent.children(recursive=True)):
        for found in process.net_connections("inet"):
            listens = found.status == psutil.CONN_LISTEN or found.type == socket.SOCK_DGRAM
            refuse(not listens or found.laddr.port == target.port, f"{process.name()} listens on {found.laddr}")
        for found in process.net_connections("unix"):
            refuse(not found.laddr, f"{process.name()} has the socket {found.laddr!r}")


def attacks(short: bool) -> dict[str, Callable[[Target], None]]:
    """Every attack by what it is; the token's last, for the server slows the address after them."""
    every: dict[str, Callable[[Target], None]] = {
        "reading outside the folders": reads_outside,
        "writing outside the folders": writes_outside,
        "symbolic links over HTTP": links_over_http,
        "symbolic links in nodes": links_in_nodes,
        "pages, scripts and PDFs shown in the server's origin": active_content,
        "requests of another site's page (Origin)": foreign_origin,
        "WebSocket of another site's page": foreign_socket,
        "DNS rebinding (Host)": foreign_host,
        "requests that are half sent": lambda target: half_sent(target, wait=not short),
        "pages that never read": deaf_pages,
        "NaN and Infinity": nan_bodies,
        "large, nested and malformed JSON": large_json,
        "packed body of 500 MB": packed_body,
        "playlist called .mp3": playlist,
    }
    every |= {name: bad_picture(*picture) for name, picture in attack_files.PICTURES.items()}
    every["the ranks' own messages"] = ranks_from_outside
    return every | {"no token, wrong tokens, guessing": wrong_tokens}


@contextlib.contextmanager
def scratch(ranks: int) -> Iterator[Target]:
    """A server of ours with a token, in folders of its own."""
    from tests.e2e.server import Server

    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.join(folder, "base")
        os.makedirs(os.path.join(base, "user", "default"))
        for at in (folder, base, os.path.join(base, "user")):
            with open(os.path.join(at, "secret.txt"), "wb") as file:
                file.write(SECRET)
        flags = ["--output-directory", os.path.join(base, "output")]
        server = Server(base, ranks, flags, env={"TACO_TOKEN": token})
        with server:
            yield Target(f"http://127.0.0.1:{server.port}", token, base, server.process.pid)


def attack(target: Target, short: bool, say: Callable[[str], None] = print) -> list[str]:
    """Try everything; the attacks that were not refused. Raises OSError or RuntimeError when the server does not answer."""
    target.json("GET", "/prompt")
    through = []
    for name, run in attacks(short).items():
        try:
            run(target)
            say(f"refused      {name}")
        except Skipped as reason:
            say(f"skipped      {name}: {reason}")
        except (NotRefused, RuntimeError, OSError) as problem:
            through.append(name)
            say(f"NOT refused  {name}: {problem}")
    return through


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="attack this server instead of a scratch one")
    parser.add_argument("--short", action="store_true", help="without the attacks that wait for time limits")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the scratch server")
    options = parser.parse_args()
    if options.url:
        try:
            through = attack(Target(options.url, os.environ.get("TACO_TOKEN", "").strip()), options.short)
        except (OSError, RuntimeError) as error:
            parser.error(
                f"{options.url} does not answer as it should ({error}); is it running, is its token in TACO_TOKEN?"
            )
    else:
        with scratch(options.ranks) as target:
            through = attack(target, options.short)
    print(f"{len(through)} not refused", flush=True)
    return 1 if through else 0


if __name__ == "__main__":
    sys.exit(main())
