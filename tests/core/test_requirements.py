"""What setup_environment.sh installs fits together."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def names(file: str) -> list[str]:
    """Packages of a requirements file."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [re.split(r"[=<>\[ ]", line)[0] for line in lines if line and not line.startswith("#")]


def asked_for(package: str) -> list[str]:
    """Packages that a package always asks for."""
    found = importlib.metadata.requires(package) or []
    return [re.split(r"[=<>!~;\[( ]", entry)[0].lower() for entry in found if "extra ==" not in entry]


@pytest.mark.parametrize("package", names("requirements.txt"))
def test_nothing_brings_torchvision_along(package: str) -> None:
    """Its build for the GPU does not import beside torch for the CPU."""
    assert "torchvision" not in asked_for(package)


def test_what_comes_without_its_dependencies_has_them() -> None:
    there = set(names("requirements.txt")) | {"typing_extensions"}  # torch asks for that one
    for package in names("requirements_no_deps.txt"):
        assert set(asked_for(package)) - there == {"torchvision"}
