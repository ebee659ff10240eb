"""Users and their files (`user/<user>/...`): workflows, settings, whatever the page keeps."""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import os
import re
import uuid
from typing import Any
from urllib.parse import unquote

from aiohttp import web

import folder_paths
from app.app_settings import AppSettings
from app.paths import UnsafePath, inside, served_type
from app.responses import json_object, json_response, storage_error
from app.uploads import body_parts, max_size, store
from comfy.taco_dit.core.config_manager import ConfigError
from utils import atomic_files, json_text
from utils.atomic_files import Unfinished, rename_to_free

DEFAULT_USER = "default"


def file_info(path: str, relative_to: str) -> dict[str, Any]:
    """`{path, size, modified, created}` of a file; times in milliseconds."""
    stat = os.stat(path)
    return {
        "path": os.path.relpath(path, relative_to).replace(os.sep, "/"),
        "size": stat.st_size,
        "modified": int(stat.st_mtime * 1000),
        "created": int(stat.st_ctime * 1000),
    }


class UserManager:
    """Knows who asks (header `comfy-user` with --multi-user, else one default user) and where their files lie."""

    def __init__(self) -> None:
        self.settings = AppSettings(self)
        self.users: dict[str, str] = {}
        self.multi_user = False
        self._adding = asyncio.Lock()

    def start(self, multi_user: bool) -> None:
        """Read the list of users; needs the user directory to be set."""
        self.multi_user = multi_user
        if multi_user:
            logging.warning(
                "--multi-user separates folders, not people: anyone who can use this server can name any user and read and "
                "change that user's files"
            )
        os.makedirs(folder_paths.get_user_directory(), exist_ok=True)
        if not multi_user:
            self.users = {DEFAULT_USER: DEFAULT_USER}
        elif os.path.isfile(self.get_users_file()):
            self.users = _read_users(self.get_users_file())

    def get_users_file(self) -> str:
        return os.path.join(folder_paths.get_user_directory(), "users.json")

    def get_request_user_id(self, request: web.Request) -> str:
        """Id of the user that asks. Raises KeyError for an unknown one."""
        user = request.headers.get("comfy-user", "") if self.multi_user else DEFAULT_USER
        if user not in self.users:
            raise KeyError("Unknown user: " + user)
        return user

    def get_request_user_filepath(
        self, request: web.Request, file: str | None, type: str = "userdata", create_dir: bool = True
    ) -> str | None:
        """Path of a user's file (None: of the user's folder); None when it would lie outside. KeyError: unknown user."""
        if type != "userdata":
            raise KeyError("Unknown filepath type:" + type)
        folder = folder_paths.get_public_user_directory(self.get_request_user_id(request))
        if folder is None:
            raise KeyError("Not a person: " + self.get_request_user_id(request))
        root = os.path.abspath(folder)
        if file is None:
            return root
        name = unquote(file) if "%" in file else file
        try:
            path = inside(root, name)
        except UnsafePath:
            return None
        if create_dir:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def add_user(self, name: str) -> str:
        """Register a user; returns the new id. Raises ValueError when the name says nothing, OSError (see `write`)."""
        name = name.strip()
        if not name:
            raise ValueError("username not provided")
        if name.startswith(folder_paths.SYSTEM_USER_PREFIX):
            raise ValueError(f"names that begin with {folder_paths.SYSTEM_USER_PREFIX} are reserved for the program")
        user_id = f"{re.sub('[^a-zA-Z0-9-_]+', '-', name)}_{uuid.uuid4()}"
        users = {**self.users, user_id: name}
        atomic_files.write(self.get_users_file(), json_text.dumps(users))
        self.users = users
        return user_id

    # ---- routes ----------------------------------------------------------------------------------------------------

    def _root(self, request: web.Request) -> str:
        try:
            root = self.get_request_user_filepath(request, None)
        except KeyError as error:
            raise web.HTTPUnauthorized(text=str(error)) from None
        assert root is not None
        return root

    def _file(self, request: web.Request, param: str, must_exist: bool, create_dir: bool = False) -> str:
        self._root(request)
        name = request.match_info.get(param)
        if not name:
            raise web.HTTPBadRequest()
        try:
            path = self.get_request_user_filepath(request, name, create_dir=create_dir)
        except OSError as error:
            raise storage_error(error, name[:200]) from None
        if path is None:
            raise web.HTTPForbidden()
        if must_exist and not os.path.exists(path):
            raise web.HTTPNotFound()
        return path

    def add_routes(self, routes: web.RouteTableDef) -> None:
        """/settings, /users, /userdata and /v2/userdata."""
        self.settings.add_routes(routes)
        self._add_users(routes)
        self._add_lists(routes)
        self._add_files(routes)

    def _add_users(self, routes: web.RouteTableDef) -> None:
        @routes.get("/users")
        async def get_users(request: web.Request) -> web.Response:
            if self.multi_user:
                return json_response({"storage": "server", "users": self.users})
            return json_response({"storage": "server", "migrated": os.path.exists(self._root(request))})

        @routes.post("/users")
        async def post_users(request: web.Request) -> web.Response:
            body = await json_object(request)
            name = str(body.get("username", ""))
            async with self._adding:
                if name in self.users.values():
                    return json_response({"error": "Duplicate username."}, 400)
                try:
                    return json_response(await asyncio.to_thread(self.add_user, name))
                except ValueError as error:
                    return json_response({"error": str(error)}, 400)
                except OSError as error:
                    raise storage_error(error, "the list of users") from None

    def _add_lists(self, routes: web.RouteTableDef) -> None:
        @routes.get("/userdata")
        async def list_userdata(request: web.Request) -> web.Response:
            query = request.query
            if not query.get("dir"):
                return web.Response(status=400, text="Directory not provided")
            self._root(request)
            path = self.get_request_user_filepath(request, query["dir"], create_dir=False)
            if path is None:
                return web.Response(status=403, text="Invalid directory")
            if not os.path.isdir(path):
                return web.Response(status=404, text="Directory not found")
            result = await asyncio.to_thread(
                _listed,
                path,
                query.get("recurse") == "true",
                query.get("full_info") == "true",
                query.get("split") == "true",
            )
            return json_response(result)

        @routes.get("/v2/userdata")
        async def list_userdata_v2(request: web.Request) -> web.Response:
            root = self._root(request)
            wanted = unquote(request.query.get("path", ""))
            path = self.get_request_user_filepath(request, wanted, create_dir=False) if wanted else root
            if path is None:
                return web.Response(status=403, text="Invalid path")
            if not os.path.exists(path):
                return web.Response(status=404, text="Path not found")
            if not os.path.isdir(path):
                return web.Response(status=404, text="Path is not a directory")
            return json_response(await asyncio.to_thread(_listed_v2, path, root))

    def _add_files(self, routes: web.RouteTableDef) -> None:
        def answer(request: web.Request, path: str) -> web.Response:
            root = self._root(request)
            if request.query.get("full_info", "").lower() == "true":
                return json_response(file_info(path, root))
            return json_response(os.path.relpath(path, root).replace(os.sep, "/"))

        def replaces(request: web.Request) -> bool:
            """Whether a file that is there may be replaced."""
            return request.query.get("overwrite") != "false"

        def refuse_overwriting(request: web.Request, path: str) -> None:
            if not replaces(request) and os.path.exists(path):
                raise web.HTTPConflict(text="File already exists")

        @routes.get("/userdata/{file}")
        async def get_userdata(request: web.Request) -> web.StreamResponse:
            path = self._file(request, "file", must_exist=True)
            # raw data for the page's own use; never to be run when opened by itself
            kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
            # user.css is linked as a style sheet
            kind = kind if kind == "text/css" else served_type(kind)
            return web.FileResponse(path, headers={"Content-Type": kind, "X-Content-Type-Options": "nosniff"})

        @routes.post("/userdata/{file}")
        async def post_userdata(request: web.Request) -> web.Response:
            path = self._file(request, "file", must_exist=False, create_dir=True)
            refuse_overwriting(request, path)
            try:
                with Unfinished(os.path.dirname(path)) as file:
                    await store(body_parts(request), file, max_size(request))
                    await asyncio.to_thread(file.finish, path, replaces(request))
                return answer(request, path)
            except FileExistsError:
                raise web.HTTPConflict(text="File already exists") from None
            except OSError as error:
                raise storage_error(error, os.path.basename(path)) from None

        @routes.delete("/userdata/{file}")
        async def delete_userdata(request: web.Request) -> web.Response:
            path = self._file(request, "file", must_exist=True)
            try:
                os.remove(path)
            except OSError as error:
                raise web.HTTPBadRequest(text=f"{os.path.basename(path)} cannot be deleted: {error.strerror}") from None
            return web.Response(status=204)

        @routes.post("/userdata/{file}/move/{dest}")
        async def move_userdata(request: web.Request) -> web.Response:
            source = self._file(request, "file", must_exist=True)
            target = self._file(request, "dest", must_exist=False, create_dir=True)
            refuse_overwriting(request, target)
            try:
                if replaces(request) or os.path.isdir(source):
                    os.replace(source, target)
                else:
                    rename_to_free(source, target)
            except FileExistsError:
                raise web.HTTPConflict(text="File already exists") from None
            except OSError as error:
                raise storage_error(error, os.path.basename(target)) from None
            return answer(request, target)


def _read_users(path: str) -> dict[str, str]:
    """Users by id. Raises ConfigError naming the file when it is damaged: starting without it would lose its users."""
    with open(path, encoding="utf-8") as stream:
        try:
            users = json_text.loads(stream.read())
            if not isinstance(users, dict):
                raise ValueError(f"it holds {type(users).__name__}, not an object")
        except ValueError as error:
            raise ConfigError(f"the list of users {path} is damaged ({error}); repair it or move it away") from None
    return users


def _listed(path: str, recurse: bool, full_info: bool, split: bool) -> list[Any]:
    found = []
    for at, folders, names in os.walk(path):
        folders.sort()
        found += [os.path.join(at, name) for name in sorted(names)]
        if not recurse:
            break
    if full_info:
        return [file_info(file, path) for file in found]
    relative = [os.path.relpath(file, path).replace(os.sep, "/") for file in found]
    return [[name, *name.split("/")] for name in relative] if split else relative


def _listed_v2(path: str, root: str) -> list[dict[str, Any]]:
    """Everything below `path`, folders first: a folder is looked into unless it is a link, which may lead back up."""
    result = []
    for at, folders, names in os.walk(path):
        for kind, found in (("directory", folders), ("file", names)):
            for name in found:
                full = os.path.join(at, name)
                item: dict[str, Any] = {
                    "name": name, "path": os.path.relpath(full, root).replace(os.sep, "/"), "type": kind,
                }  # fmt: skip
                if kind == "file":
                    try:
                        stat = os.stat(full)
                    except OSError:  # deleted meanwhile, or a link to nothing
                        continue
                    item.update(size=stat.st_size, modified=int(stat.st_mtime * 1000))
                result.append(item)
    return sorted(result, key=lambda item: (item["type"] != "directory", item["name"].lower(), item["path"]))
