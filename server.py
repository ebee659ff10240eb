"""`PromptServer`: the HTTP and WebSocket side of rank 0.

The routes live in `app/`, one module per topic. Node packs add their own through `PromptServer.instance.routes` while
they are imported; `add_routes` freezes them. On ranks that follow, the same object exists (`listening=False`), so that
packs find what they import, but it never opens a port and sends nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import uuid
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from aiohttp import WSMsgType, web

import folder_paths
from app import (
    access,
    auth,
    manager,
    routes_files,
    routes_info,
    routes_internal,
    routes_models,
    routes_queue,
    routes_taco_dit,
    static_files,
)
from app import messages as frames
from app.connections import Runner, request_limits
from app.custom_node_manager import CustomNodeManager
from app.frontend_management import frontend_folder
from app.messages import BinaryEventTypes
from app.middlewares import clear_errors, compress_body, create_cache_middleware
from app.pages import PageQueue
from app.responses import dumps, loads
from app.start_checks import cannot_listen
from app.user_manager import UserManager
from comfy.cli_args import args
from comfy_api import feature_flags
from comfy_execution.utils import get_executing_context

__all__ = ["BinaryEventTypes", "PromptServer", "uuid", "web"]

# messages waiting to be sent from which on the queue's length is not told every time
BACKLOG = 50


def single_rank_status() -> dict[str, Any]:
    """What /taco_dit/status answers when nothing spreads over GPUs."""
    return {"enabled": False, "world_size": 1, "ranks": [{"rank": 0}]}


class PromptServer:
    """State shared by routes, executor and node packs.

    `client_id`: page of the running prompt; `last_node_id`: node shown as running; `number`: number of the next
    prompt; `sockets`: open pages by id; `taco_status`: called for /taco_dit/status, may be replaced;
    `panel`: what watches the ranks, None where nothing does.
    """

    instance: ClassVar[PromptServer]

    def __init__(self, loop: asyncio.AbstractEventLoop, listening: bool = True) -> None:
        PromptServer.instance = self
        self.loop = loop
        self.listening = listening
        self.user_manager = UserManager()
        self.custom_node_manager = CustomNodeManager()
        self.supports = ["custom_nodes_from_web"]
        self.prompt_queue: Any = None
        self.messages: asyncio.Queue[tuple[Any, Any, str | None]] = asyncio.Queue()
        self._statuses = 0
        self.number = 0
        self.port = args.port
        self.address = args.listen
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.last_prompt_id: str | None = None
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.sockets_metadata: dict[str, dict[str, Any]] = {}
        self._pages: dict[str, PageQueue] = {}
        self._runners: list[Runner] = []
        self.on_prompt_handlers: list[Callable[[Any], Any]] = []
        self.taco_status: Callable[[], dict[str, Any]] = single_rank_status
        self.panel: Any = None
        self.web_root: str | None = frontend_folder(args.front_end_root) if listening else None
        self.app = web.Application(
            client_max_size=round(args.max_upload_size * 1024 * 1024), middlewares=self._middlewares()
        )
        self.routes = web.RouteTableDef()
        self._internal = routes_internal.internal_routes(self)
        self._add_core_routes()

    def _middlewares(self) -> list[Any]:
        """What every request passes, the first one first."""
        if not self.listening:
            return []
        token = auth.chosen_token(args, os.environ)
        chosen: list[Any] = [request_limits, create_cache_middleware(private=bool(token)), clear_errors]
        if args.enable_compress_response_body:
            chosen.append(compress_body)
        chosen.append(access.create_host_middleware(access.allowed_hosts(args)))
        if args.enable_cors_header:
            chosen.append(access.create_cors_middleware(args.enable_cors_header))
        else:
            chosen.append(access.create_origin_middleware())
        if token:
            key = auth.page_key(folder_paths.get_user_directory())
            chosen.append(auth.create_token_middleware(auth.TokenCheck(token, key)))
        return chosen + manager.middleware(args)

    def _add_core_routes(self) -> None:
        self.routes.get("/ws")(self.websocket_handler)
        static_files.add_page(self.routes, self)
        for topic in (routes_queue, routes_files, routes_models, routes_info, routes_taco_dit):
            topic.add_routes(self.routes, self)
        self.user_manager.add_routes(self.routes)
        self.custom_node_manager.add_routes(self.routes)

    def add_routes(self) -> None:
        """Register all routes, each also below /api, then the static folders. Call it once, after nodes are loaded."""
        if self.listening:
            self.user_manager.start(args.multi_user)
        twins = web.RouteTableDef()
        for route in self.routes:
            if isinstance(route, web.RouteDef):
                twins.route(route.method, "/api" + route.path)(route.handler, **route.kwargs)
        self.app.add_routes(twins)
        self.app.add_routes(self.routes)
        self.app.add_routes(self._internal)
        self.custom_node_manager.add_static(self.app)
        static_files.add_static(self.app, self)

    # ---- WebSocket -------------------------------------------------------------------------------------------------

    async def websocket_handler(self, request: web.Request) -> web.WebSocketResponse:
        """A page connects; with the id of an older connection it takes that one's place."""
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        sid = request.query.get("clientId", "") or uuid.uuid4().hex
        if sid in self._pages:
            self._pages[sid].close()
        self.sockets[sid] = ws
        self.sockets_metadata[sid] = {"feature_flags": {}}
        page = self._pages[sid] = PageQueue(ws, sid)
        try:
            await self.send("status", {"status": self.get_queue_info(), "sid": sid}, sid)
            if self.client_id == sid and self.last_node_id is not None:
                await self.send("executing", {"node": self.last_node_id}, sid)
            await self._listen(ws, sid)
        finally:
            page.close()
            if self.sockets.get(sid) is ws:
                del self.sockets[sid], self.sockets_metadata[sid], self._pages[sid]
        return ws

    async def _listen(self, ws: web.WebSocketResponse, sid: str) -> None:
        first = True
        async for message in ws:
            if message.type is WSMsgType.ERROR:
                logging.warning("ws connection closed with exception %s", ws.exception())
            elif message.type is WSMsgType.TEXT and first:
                first = False
                await self._greet(sid, message.data)

    async def _greet(self, sid: str, text: str) -> None:
        """The first message of a page may say what it can do; the answer says what we can."""
        try:
            greeting = loads(text)
        except ValueError:
            logging.warning("a page's first message is not JSON: %.200s", text)
            return
        if isinstance(greeting, dict) and greeting.get("type") == "feature_flags":
            flags = greeting.get("data")
            self.sockets_metadata[sid]["feature_flags"] = flags if isinstance(flags, dict) else {}
            await self.send("feature_flags", feature_flags.get_server_features(), sid)

    def get_queue_info(self) -> dict[str, Any]:
        remaining = 0 if self.prompt_queue is None else self.prompt_queue.get_tasks_remaining()
        return {"exec_info": {"queue_remaining": remaining}}

    async def send(self, event: Any, data: Any, sid: str | None = None) -> None:
        """Queue an event for one page, or for all. `event` is a name or one of BinaryEventTypes.

        Returns before the pages have it. Of previews (JPEG) and of the queue's length a page that lags behind gets only
        the latest.
        """
        if event == BinaryEventTypes.UNENCODED_PREVIEW_IMAGE:
            self._to_pages(await asyncio.to_thread(frames.image_frame, data), sid, _preview(data))
        elif event == BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA:
            self._to_pages(await asyncio.to_thread(frames.image_with_metadata_frame, *data), sid, _preview(data[0]))
        elif isinstance(data, bytes | bytearray):
            await self.send_bytes(event, data, sid)
        else:
            await self.send_json(event, data, sid)

    async def send_bytes(self, event: Any, data: bytes | bytearray, sid: str | None = None) -> None:
        """`send` of a binary event."""
        self._to_pages(frames.frame(event, bytes(data)), sid)

    async def send_json(self, event: str, data: Any, sid: str | None = None) -> None:
        """`send` of a named event. Packs replace this method to see what pages are told."""
        replaces = "status" if event == "status" and sid is None else None
        self._to_pages(dumps({"type": event, "data": data}), sid, replaces)

    def _to_pages(self, content: str | bytes, sid: str | None, replaces: str | None = None) -> None:
        if sid is None:
            for page in list(self._pages.values()):
                page.put(content, replaces)
        elif sid in self._pages:
            self._pages[sid].put(content, replaces)

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        """Like `send`, from any thread, without waiting. Does nothing on ranks that follow."""
        if self.listening:
            self.loop.call_soon_threadsafe(self._to_be_sent, event, data, sid)

    def _to_be_sent(self, event: Any, data: Any, sid: str | None) -> None:
        self._statuses += event == "status" and sid is None
        self.messages.put_nowait((event, data, sid))

    def send_progress_text(self, text: str | bytes, node_id: str | None = None, sid: str | None = None) -> None:
        """Show a text on a node (default: the running one)."""
        if node_id is None:
            context = get_executing_context()
            node_id = context.node_id if context else self.last_node_id
        if node_id is not None:
            self.send_sync(BinaryEventTypes.TEXT, frames.text_frame(text, node_id), sid)

    def queue_updated(self) -> None:
        """Tell every page how much is left."""
        self.send_sync("status", {"status": self.get_queue_info()})

    async def publish_loop(self) -> None:
        """Send what `send_sync` collected, in order, for ever."""
        while True:
            event, data, sid = await self.messages.get()
            if event == "status" and sid is None:
                self._statuses -= 1
                # pages that lag behind need the newest count only
                if self._statuses and self.messages.qsize() > BACKLOG:
                    continue
            try:
                await self.send(event, data, sid)
            except Exception:  # noqa: BLE001 - one message that cannot be encoded must not silence all others
                logging.exception("message %r could not be sent", event)

    # ---- prompts ---------------------------------------------------------------------------------------------------

    def add_on_prompt_handler(self, handler: Callable[[Any], Any]) -> None:
        """`handler(json)` gets every posted prompt before it is checked and returns it, changed or not."""
        self.on_prompt_handlers.append(handler)

    def trigger_on_prompt(self, json_data: Any) -> Any:
        for handler in self.on_prompt_handlers:
            try:
                json_data = handler(json_data)
            except (Exception, SystemExit):  # noqa: BLE001 - a pack's handler must not stop prompts, nor the server
                logging.exception("[ERROR] An error occurred during the on_prompt_handler processing")
        return json_data

    # ---- listening -------------------------------------------------------------------------------------------------

    async def setup(self) -> None:
        """Kept for callers written for ComfyUI; everything is ready after construction."""

    async def start(
        self, address: str, port: int, verbose: bool = True, call_on_start: Callable[..., Any] | None = None
    ) -> None:
        """Listen on one address."""
        await self.start_multi_address([(address, port)], call_on_start, verbose)

    async def start_multi_address(
        self,
        addresses: Iterable[tuple[str, int]],
        call_on_start: Callable[..., Any] | None = None,
        verbose: bool = True,
    ) -> None:
        """Listen on `(address, port)` pairs; port 0 takes a free one, `self.port` then says which.

        Raises RuntimeError on a rank that follows, OSError naming the address when it cannot be bound.
        """
        if not self.listening:
            raise RuntimeError("only rank 0 listens; this server was created with listening=False")
        context = _tls_context()
        runner = Runner(self.app, access_log=None)
        self._runners.append(runner)
        await runner.setup()
        scheme = "https" if context else "http"
        last = (self.address, self.port)
        for position, (address, port) in enumerate(addresses):
            site = web.TCPSite(runner, address, port, ssl_context=context)
            try:
                await site.start()
            except OSError as error:
                raise OSError(cannot_listen(address, port, error)) from error
            last = (address, _bound_port(site, port))
            if position == 0:
                self.address, self.port = last
            if verbose:
                logging.info("To see the GUI go to: %s://%s:%d", scheme, _host_to_open(address), last[1])
        if call_on_start is not None:
            call_on_start(scheme, self.address, self.port)

    async def stop(self) -> None:
        """Stop listening and close all connections."""
        while self._runners:
            await self._runners.pop().cleanup()


def _preview(image: tuple[str, Any, int | None]) -> str | None:
    """Previews replace each other where they wait; pictures sent as PNG are results and all arrive."""
    return "preview" if image[0] == "JPEG" else None


def _host_to_open(address: str) -> str:
    """What a browser on this machine opens for an address that is listened on."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    return f"[{address}]" if ":" in address else address


def _bound_port(site: web.TCPSite, port: int) -> int:
    server = site._server
    sockets: list[socket.socket] = list(getattr(server, "sockets", None) or ())
    return sockets[0].getsockname()[1] if sockets else port


def _tls_context() -> ssl.SSLContext | None:
    """TLS from --tls-keyfile and --tls-certfile. Raises ValueError when one is missing or cannot be used."""
    if not args.tls_keyfile and not args.tls_certfile:
        return None
    if not args.tls_keyfile or not args.tls_certfile:
        raise ValueError("TLS needs both --tls-keyfile and --tls-certfile")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile=args.tls_certfile, keyfile=args.tls_keyfile)
    except OSError as error:
        raise ValueError(
            f"TLS is not possible with {args.tls_certfile} and {args.tls_keyfile} ({error.strerror or error}); "
            "give PEM files with --tls-certfile and --tls-keyfile, or neither"
        ) from error
    return context
