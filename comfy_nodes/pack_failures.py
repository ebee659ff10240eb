"""Why a pack could not be imported: the package that is missing, and the command that installs it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from utils import torch_packages

# module -> names of packages that have it, the one to install by default first; other packages are called as their module
_PACKAGES: dict[str, tuple[str, ...]] = {
    "Crypto": ("pycryptodome",),
    "OpenGL": ("PyOpenGL",),
    "PIL": ("Pillow",),
    "attr": ("attrs",),
    "bs4": ("beautifulsoup4",),
    "clip": ("openai-clip", "clip"),
    "color_matcher": ("color-matcher",),
    "cv2": ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    "dateutil": ("python-dateutil",),
    "dotenv": ("python-dotenv",),
    "faiss": ("faiss-cpu", "faiss-gpu"),
    "ffmpeg": ("ffmpeg-python",),
    "fitz": ("pymupdf",),
    "git": ("GitPython",),
    "jwt": ("PyJWT",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "pkg_resources": ("setuptools",),
    "pywt": ("PyWavelets",),
    "rembg": ("rembg", "rembg[gpu]"),
    "serial": ("pyserial",),
    "skimage": ("scikit-image",),
    "sklearn": ("scikit-learn",),
    "usb": ("pyusb",),
    "websocket": ("websocket-client",),
    "win32api": ("pywin32",),
    "yaml": ("PyYAML",),
    "zmq": ("pyzmq",),
}
_FITTED = ("torchvision", "torchaudio")


@dataclass(frozen=True)
class PackFailure:
    """A pack that could not be imported. `package` and `command` are "" where no package is missing."""

    name: str
    reason: str
    package: str = ""
    command: str = ""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        if not self.command:
            return "Update the pack, or remove it; all other nodes work."
        return f"Run this and start again: {self.command}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "remedy": self.remedy}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, what caused it, and so on; each once."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def missing_module(error: BaseException) -> str | None:
    """The top-level module for want of which an import failed, or None."""
    for cause in _causes(error):
        top = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
        if top.isidentifier() and top not in sys.modules and importlib.util.find_spec(top) is None:
            return top
    return None


def _requirements(folder: str) -> dict[str, str]:
    """The lines of a pack's requirements.txt by normalised name of the package."""
    path = os.path.join(folder, "requirements.txt")
    if not os.path.isfile(path):
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.partition("#")[0].strip() for line in file]
    return {_normalised(re.split(r"[\s=<>!~;\[@]", line)[0]): line for line in lines if line and line[0].isalnum()}


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _requirement(module: str, folder: str) -> str:
    """What to give to pip for a module: as the pack asks for it, or the package that is known to have it."""
    names = _PACKAGES.get(module, (module,))
    wanted = _requirements(folder)
    return next((wanted[_normalised(name)] for name in names if _normalised(name) in wanted), names[0])


def explain(name: str, path: str, error: BaseException) -> PackFailure:
    """The failure of the pack at `path` (a folder, or a file)."""
    reason = f"{type(error).__name__}: {error}"
    module = missing_module(error)
    if module is None:
        return PackFailure(name, reason)
    if module in _FITTED:
        package, command = module, torch_packages.install_command(module)
    else:
        package = _requirement(module, path if os.path.isdir(path) else os.path.dirname(path))
        command = [sys.executable, "-m", "pip", "install", package]
    return PackFailure(name, f"it needs the package {package}, which is not installed", package, shlex.join(command))
