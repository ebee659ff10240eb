"""Paths that come from a request, kept inside the directory they are meant for."""

from __future__ import annotations

import os
import re

# shown as text or downloaded, never run by the browser in our origin
_ACTIVE_TYPES = {
    "text/html",
    "text/html-sandboxed",
    "application/xhtml+xml",
    "text/javascript",
    "application/javascript",
    "application/x-javascript",
    "text/css",
    "image/svg+xml",
    "text/xml",
    "application/xml",
}
_DRIVE = re.compile(r"^[A-Za-z]:")


class UnsafePath(ValueError):
    """A requested path lies outside its directory."""


def inside(root: str, *parts: str) -> str:
    """Absolute path of `parts` joined below `root`.

    Raises UnsafePath for `..`, absolute, drive and UNC paths, for NUL bytes, and when a symbolic link leads outside.
    """
    for part in parts:
        if "\0" in part or part.startswith(("/", "\\")) or _DRIVE.match(part):
            raise UnsafePath(f"{part!r} is not a path inside the folder")
        if ".." in re.split(r"[\\/]", part):
            raise UnsafePath(f"{part!r} leads outside the folder")
    path = os.path.abspath(os.path.join(root, *parts))
    real_root = os.path.realpath(root)
    real = os.path.realpath(path)
    if real != real_root and not real.startswith(real_root.rstrip(os.sep) + os.sep):
        raise UnsafePath("the path leads outside the folder")
    return path


def plain_name(name: str) -> str:
    """The last part of a file name as sent by a browser. Raises UnsafePath when nothing usable is left."""
    name = re.split(r"[\\/]", name)[-1]
    if name in ("", ".", "..") or "\0" in name:
        raise UnsafePath("the file has no usable name")
    return name


def served_type(content_type: str) -> str:
    """The content type to serve a user's file with."""
    bare = content_type.split(";")[0].strip().lower()
    return "application/octet-stream" if bare in _ACTIVE_TYPES or bare.endswith("+xml") else content_type


def disposition(content_type: str, name: str) -> str:
    """Content-Disposition for a user's file: what a browser could run is downloaded, the rest shown."""
    from urllib.parse import quote

    kind = "attachment" if content_type == "application/octet-stream" else "inline"
    plain = name.encode("ascii", "replace").decode().replace('"', "'").replace("\\", "_")
    plain = "".join(char if char.isprintable() else "_" for char in plain)
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
