"""What `pip install .` puts where; everything else about the package is in pyproject.toml.

The program's modules have ComfyUI's names (`nodes`, `server`, `utils`, `app` and so on), by which node packs import them. In
site-packages they would be in the way of others, so the whole program is a folder there, `taco_dit_program`, which the
command `taco-dit` puts first on the path.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

PROGRAM = "taco_dit_program"
ROOT = os.path.dirname(os.path.abspath(__file__))
FOLDERS = (
    "app", "comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_nodes", "custom_nodes", "demo", "middleware",
    "utils",
)  # fmt: skip
DATA = [
    "LICENSE", "requirements.txt", "taco_dit_config.yaml", "extra_model_paths.yaml.example", "input/example.png",
    "models/README.md", "models/*/README.md", "custom_nodes/README.md", "app/web/**/*", "app/builtin_models/**/*",
    "comfy/text_encoders/tokenizers/**/*", "comfy_nodes/*.json", "demo/models/**/*", "demo/example_workflows/*",
]  # fmt: skip


class FreshBuild(build_py):
    """A build without files of an earlier version, which would be installed again."""

    def run(self) -> Any:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        return super().run()


def packages() -> list[str]:
    """The program's folders with modules, under their names in site-packages."""
    found = [PROGRAM]
    for folder in FOLDERS:
        for at, names, files in os.walk(os.path.join(ROOT, folder)):
            names[:] = sorted(name for name in names if name != "__pycache__" and folder != "custom_nodes")
            if any(name.endswith(".py") for name in files):
                found.append(".".join([PROGRAM, *os.path.relpath(at, ROOT).split(os.sep)]))
    return found


setup(
    packages=packages(), package_dir={PROGRAM: "."}, package_data={PROGRAM: DATA}, cmdclass={"build_py": FreshBuild}
)  # fmt: skip
