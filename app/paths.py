"""Paths that come from a request, kept inside the directory they are meant for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

# what a browser shows without running anything of it in our origin; all else is downloaded (pages, scripts, SVG and other
# XML, PDF, saved pages)
_PASSIVE_KINDS = ("image/", "audio/", "video/", "model/")
_PASSIVE_TYPES = ("text/plain", "application/json")
_DRIVE = re.compile(r"^[A-Za-z]:")


class UnsafePath(ValueError):
    """A requested path lies outside its directory."""


def inside(root: str, *parts: str, also: Iterable[str] = ()) -> str:
    """Absolute path of `parts` joined below `root`, which may itself be a symbolic link.

    Raises UnsafePath for `..`, absolute, drive and UNC paths, for NUL bytes, and when a symbolic link leads out of `root`
    and of the folders in `also`.
    """
    for part in parts:
        if "\0" in part or part.startswith(("/", "\\")) or _DRIVE.match(part):
            raise UnsafePath(f"{part!r} is not a path inside the folder")
        if ".." in re.split(r"[\\/]", part):
            raise UnsafePath(f"{part!r} leads outside the folder")
    path = os.path.abspath(os.path.join(root, *parts))
    real = os.path.realpath(path)
    for top in map(os.path.realpath, (root, *also)):
        if real == top or real.startswith(top.rstrip(os.sep) + os.sep):
            return path
    raise UnsafePath("the path leads outside the folder")


def plain_name(name: str) -> str:
    """The last part of a file name as sent by a browser. Raises UnsafePath when nothing usable is left."""
    name = re.split(r"[\\/]", name)[-1]
    if name in ("", ".", "..") or "\0" in name:
        raise UnsafePath("the file has no usable name")
    return name


def served_type(content_type: str) -> str:
    """The content type to serve a user's file with."""
    bare = content_type.split(";")[0].strip().lower()
    passive = bare in _PASSIVE_TYPES or bare.startswith(_PASSIVE_KINDS) and not bare.endswith(("+xml", "/xml"))
    return content_type if passive else "application/octet-stream"


def disposition(content_type: str, name: str) -> str:
    """Content-Disposition for a user's file: what a browser could run is downloaded, the rest shown."""
    from urllib.parse import quote

    kind = "attachment" if content_type == "application/octet-stream" else "inline"
    plain = name.encode("ascii", "replace").decode().replace('"', "'").replace("\\", "_")
    plain = "".join(char if char.isprintable() else "_" for char in plain)
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
