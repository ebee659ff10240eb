"""The commands of an installed copy: the program and its doctor, with a person's files in a folder of theirs.

    taco-dit                              files in ~/taco-dit
    TACO_HOME=/data/taco-dit taco-dit     elsewhere; or --base-directory /data/taco-dit
    taco-dit-doctor                       examines machine and installation

All flags are main.py's.
"""

from __future__ import annotations

import os
import shutil
import sys

PROGRAM = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOME = "TACO_HOME"
# what a new folder begins with
FIRST_FILES = ("models", "input", "custom_nodes", "taco_dit_config.yaml", "extra_model_paths.yaml.example")


def run() -> None:
    """`taco-dit`; leaves by SystemExit with main.py's exit status."""
    sys.path.insert(0, PROGRAM)  # the program's modules are imported by ComfyUI's names
    from comfy.cli_args import parse_command_line
    from main import main

    argv = sys.argv[1:]
    if parse_command_line(argv).base_directory is None:  # ends here for --help and flags that are wrong
        home = _home()
        try:
            prepare(home)
        except OSError as error:
            print(
                f"TACO-DiT: {home} cannot be made ({error.strerror}); choose another folder with --base-directory",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(2)
        print(f"TACO-DiT: models, node packs, pictures and settings are in {home}", flush=True)
        argv = ["--base-directory", home, *argv]
    sys.exit(main(argv))


def doctor() -> None:
    """`taco-dit-doctor`, with the flags that one starts with."""
    sys.path.insert(0, PROGRAM)
    from comfy.taco_dit.doctor.__main__ import main

    argv = sys.argv[1:]
    own = [] if any(flag.startswith("--base-directory") for flag in argv) else ["--base-directory", _home()]
    sys.exit(main([*own, *argv]))


def _home() -> str:
    return os.path.abspath(os.path.expanduser(os.environ.get(HOME) or "~/taco-dit"))


def prepare(home: str) -> None:
    """Make a person's folder, with notes where models go and an example picture; one that exists stays as it is."""
    if os.path.isdir(os.path.join(home, "models")):
        return
    os.makedirs(home, exist_ok=True)
    for name in FIRST_FILES:
        source, target = os.path.join(PROGRAM, name), os.path.join(home, name)
        if os.path.isdir(source):
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=_not_first)
        elif not os.path.exists(target):
            shutil.copyfile(source, target)


def _not_first(folder: str, names: list[str]) -> set[str]:
    """Of a checkout's folders only what it was shipped with."""
    kept = {"README.md", "example.png", "websocket_image_save.py"}
    return {name for name in names if not os.path.isdir(os.path.join(folder, name)) and name not in kept} | {
        "__pycache__"
    }
