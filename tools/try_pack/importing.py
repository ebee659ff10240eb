"""How a pack's import went, from the console of the server that loaded it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# packages on PyPI that are not named like the module they bring
PACKAGES = {
    "cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "git": "GitPython",
    "sklearn": "scikit-learn", "dotenv": "python-dotenv", "bs4": "beautifulsoup4", "Crypto": "pycryptodome",
    "google.generativeai": "google-generativeai", "google.genai": "google-genai", "fitz": "pymupdf", "docx": "python-docx",
    "serial": "pyserial", "imageio_ffmpeg": "imageio-ffmpeg", "github": "PyGithub", "toml": "toml",
}  # fmt: skip
_FAILED = re.compile(r"Cannot import .*[/\\]([^/\\ ]+?)(?:\.py)? module for custom nodes")
_MISSING = re.compile(r"ModuleNotFoundError: No module named '([^']+)'")
_ERROR = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b.*$")
_UNDESCRIBED = re.compile(r"An error occurred while retrieving information for the '(.+)' node")
_PRESTARTUP = re.compile(r"\(PRESTARTUP FAILED\): (.+)$")


def install_command(module: str) -> str:
    """The command that installs the package a module is part of."""
    top = module.split(".")[0]
    return f"pip install {PACKAGES.get(module) or PACKAGES.get(top) or top.replace('_', '-')}"


def _reason(lines: Sequence[str]) -> str:
    """The last error that a traceback ends with; of a message of several lines also the last."""
    for number in reversed(range(len(lines))):
        text = lines[number].strip()
        if _ERROR.match(text):
            rest = [line.strip() for line in lines[number + 1 :] if line.strip()]
            return f"{text} {rest[-1]}" if text.endswith(":") and rest else text
    return "no error was shown"


def problems(log: Sequence[str], pack: str) -> list[str]:
    """What went wrong when the pack was loaded, a sentence each."""
    found = []
    for number, line in enumerate(log):
        failed = _FAILED.search(line)
        if failed and failed[1] == pack:
            reason = _reason(log[max(0, number - 60) : number])
            missing = _MISSING.search(reason)
            cure = f"; {install_command(missing[1])}" if missing else ""
            found.append(f"it could not be imported: {reason}{cure}")
        elif line.startswith("Skip ") and f"/{pack}:" in line:
            found.append("it has no NODE_CLASS_MAPPINGS and no comfy_entrypoint, so it is no node pack")
        elif (named := _PRESTARTUP.search(line)) and named[1].rstrip("/").endswith(f"/{pack}"):
            found.append("its prestartup_script.py failed; the console says why")
    return list(dict.fromkeys(found))


def undescribed(log: Sequence[str]) -> dict[str, str]:
    """Nodes that cannot describe themselves, hence are not offered, with the error."""
    found = {}
    for number, line in enumerate(log):
        named = _UNDESCRIBED.search(line)
        if named:
            after = log[number + 1 : number + 60]
            found[named[1]] = next((text.strip() for text in after if _ERROR.match(text.strip())), "no error was shown")
    return found
