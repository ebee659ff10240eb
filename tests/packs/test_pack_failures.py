"""What is said about packs that cannot be imported, and about packages that have no build beside this torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from comfy_nodes import pack_failures
from utils import torch_packages


def failed(source: str, folder: Path) -> pack_failures.PackFailure:
    """The failure of a pack whose module is `source`."""
    try:
        exec(source, {})  # noqa: S102 - as an import does
    except Exception as error:  # noqa: BLE001 - any
        return pack_failures.explain("pack", str(folder), error)
    raise AssertionError("it did not fail")


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import nothing_of_that_name.part", "nothing_of_that_name"),
        ("try:\n import nothing_of_that_name\nexcept ImportError:\n raise RuntimeError", "nothing_of_that_name"),
        ("import torch.nothing_of_that_name", ""),
        ("from torch import nothing_of_that_name", ""),
        ("raise ModuleNotFoundError(\"No module named '/x/pack'\", name='/x/pack')", ""),
        ("1 / 0", ""),
    ],
)  # fmt: skip
def test_the_missing_package_is_found(source: str, package: str, tmp_path: Path) -> None:
    failure = failed(source, tmp_path)
    assert failure.package == package
    assert failure.command == (f"{shlex.quote(sys.executable)} -m pip install {package}" if package else "")
    assert failure.as_dict()["remedy"].endswith(failure.command or "all other nodes work.")


def test_packages_are_asked_for_as_the_pack_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_failures.importlib.util, "find_spec", lambda name: None)
    missing = "raise ModuleNotFoundError('x', name='cv2')"
    assert failed(missing, tmp_path).package == "opencv-python-headless"
    (tmp_path / "requirements.txt").write_text("# needs\nnumpy\nOpenCV_Python >= 4.8  # for edges\n-r more.txt\n")
    failure = failed(missing, tmp_path)
    assert failure.package == "OpenCV_Python >= 4.8" and failure.command.endswith("'OpenCV_Python >= 4.8'")
    failure = failed("raise ModuleNotFoundError('x', name='torchvision')", tmp_path)
    assert "--no-deps" in failure.command and torch_packages.fitting("torchvision") in failure.command


def test_releases_that_go_with_torch() -> None:
    fitting = torch_packages.fitting
    assert (
        fitting("torchvision", "2.13.0+cpu") == "torchvision==0.28.*"
        and fitting("torchvision", "2.0.1") == "torchvision==0.15.*"
    )
    assert fitting("torchaudio", "2.11.0") == "torchaudio==2.11.*"


@pytest.mark.parametrize("builds", ["loads", "does not load", "none", "is there"])
def test_a_build_that_does_not_load_is_left_out(
    builds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for pack, line in (
        ("faces", "from torchvision import ops"),
        ("words", "import torchvision_like"),
        ("a", "import torchvision"),
    ):
        (tmp_path / pack).mkdir()
        (tmp_path / pack / "nodes.py").write_text(f"x = 1\n{line}\n")
    ran, there = [], builds == "is there"

    def run(command: list[str], **kwargs: Any) -> Any:
        nonlocal there
        action = next((word for word in ("uninstall", "install", "-c") if word in command), "")
        ran.append(action)
        if action == "-c":
            return subprocess.CompletedProcess(command, 0 if there else 1)
        there = action == "install" and builds == "loads"
        return subprocess.CompletedProcess(command, 1 if builds == "none" else 0)

    monkeypatch.setattr(torch_packages.subprocess, "run", run)
    good = torch_packages.install("torchvision", str(tmp_path))
    out = capsys.readouterr().out
    assert good is (builds in ("loads", "is there"))
    if good:
        assert out == "" and "uninstall" not in ran
    else:
        assert ran[-1] == "uninstall" and out.count("\n") == 1
        assert "torchvision is left out" in out and "these packs need it: a, faces" in out
