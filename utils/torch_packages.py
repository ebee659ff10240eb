"""torchvision and torchaudio, of the release that fits the installed torch, which packs take for granted.

    python -m utils.torch_packages install     install both where their builds load beside this torch; run by the set-up

Their builds are made for one release and one kind (CPU, a CUDA version) of torch. One that does not load is taken away
again, because a package that is there and cannot be imported stops more packs than one that is missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what shows that a package's compiled part works beside torch
_CHECKS = {
    "torchvision": "torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)",
    "torchaudio": "torchaudio.functional.resample(torch.zeros(1, 64), 2, 1)",
}


def fitting(package: str, torch_version: str | None = None) -> str:
    """The requirement for the release of torchvision or torchaudio that goes with a release of torch (the installed one).

    torchaudio has torch's numbers; torchvision 0.15 came with torch 2.0, and each release since is one more.
    """
    major, minor = re.findall(r"\d+", torch_version or importlib.metadata.version("torch"))[:2]
    if package == "torchaudio":
        return f"torchaudio=={major}.{minor}.*"
    return f"torchvision==0.{int(minor) + 15}.*"


def install_command(package: str) -> list[str]:
    """The command that installs one of them and leaves torch as it is."""
    return [sys.executable, "-m", "pip", "install", "--no-deps", fitting(package)]


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def loads(package: str) -> bool:
    """Whether a package can be imported and computes beside torch; tried in another process."""
    return _succeeds([sys.executable, "-c", f"import torch, {package}; {_CHECKS[package]}"])


def _sources(folder: str) -> Iterator[str]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        yield from (os.path.join(at, name) for name in names if name.endswith(".py"))


def packs_with(package: str, folder: str) -> list[str]:
    """Names of the packs in a folder whose code imports a package."""
    statement = re.compile(rf"^\s*(?:import|from)\s+{package}\b", re.MULTILINE)
    found = set()
    for path in _sources(folder):
        with open(path, encoding="utf-8", errors="replace") as file:
            if statement.search(file.read()):
                found.add(os.path.relpath(path, folder).split(os.sep)[0])
    return sorted(found)


def left_out(package: str, folder: str) -> str:
    """One line for a package that has no build here: which packs miss it."""
    packs = packs_with(package, folder)
    whom = f"these packs need it: {', '.join(packs)}" if packs else "packs that import it do not load"
    torch = f"torch {importlib.metadata.version('torch')}"
    return f"TACO-DiT: {package} is left out, no build of {fitting(package)} loads beside {torch}; {whom}"


def install(package: str, folder: str) -> bool:
    """Install a package unless one is there that loads; one that does not load is removed. Prints what is left out."""
    if loads(package):
        return True
    if _succeeds([*install_command(package), "--force-reinstall"]) and loads(package):
        return True
    _succeeds([sys.executable, "-m", "pip", "uninstall", "--yes", package])
    print(left_out(package, folder), flush=True)
    return False


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python -m utils.torch_packages install")
    for each in _CHECKS:
        install(each, os.path.join(ROOT, "custom_nodes"))
