"""An installed copy, of which `pip install .` makes a command: complete, it serves the page and draws with the demo model."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from app import command
from demo.evaluate import cases, evaluate, through_server
from tests.e2e.server import ROOT, Server

pytest.importorskip("setuptools", minversion="77")
PROGRAM = "taco_dit_program"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as site-packages is after the installation."""
    folder = tmp_path_factory.mktemp("site")
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(folder),
        "build_py",
        "--build-lib",
        str(folder),
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return folder


def test_everything_but_tests_and_documents_is_installed(site):
    wanted = set()
    for top in (
        "app",
        "comfy",
        "comfy_api",
        "comfy_execution",
        "comfy_extras",
        "comfy_nodes",
        "demo",
        "middleware",
        "utils",
    ):
        for at, names, files in os.walk(os.path.join(ROOT, top)):
            names[:] = [name for name in names if name != "__pycache__"]
            wanted |= {os.path.relpath(os.path.join(at, name), ROOT) for name in files if not name.endswith(".pyc")}
    wanted |= {name for name in os.listdir(ROOT) if name.endswith(".py") and name != "setup.py"}
    wanted |= {
        "taco_dit_config.yaml",
        "input/example.png",
        "models/vae/README.md",
        "custom_nodes/websocket_image_save.py",
    }
    assert not sorted(path for path in wanted if not os.path.isfile(site / PROGRAM / path))
    assert not (site / PROGRAM / "tests").exists() and not (site / PROGRAM / "setup.py").exists()


def test_it_serves_the_page_and_draws(site, tmp_path):
    start = f"import sys; sys.path.insert(0, {str(site)!r}); from {PROGRAM}.app.command import run; run()"
    with Server(str(tmp_path), 1, command=[sys.executable, "-c", start]) as server:
        assert b"<html" in server.request("/")[1]
        assert server.json("/taco_dit/first_screen")["graph"]
        assert json.loads(server.request("/system_stats")[1])["system"]["argv"]
        drawn = evaluate(through_server(f"http://127.0.0.1:{server.port}"), cases(1, seed=7)[:1], 12, 3.0)
    assert drawn[0].verdict.right, drawn[0].verdict.wrong


def test_a_new_folder_gets_notes_and_an_example_and_an_old_one_stays(tmp_path, monkeypatch):
    home = tmp_path / "home"
    command.prepare(str(home))
    assert sorted(os.listdir(home)) == sorted(command.FIRST_FILES)
    assert (home / "models/loras/README.md").is_file() and sorted(os.listdir(home / "input")) == ["example.png"]
    assert sorted(os.listdir(home / "custom_nodes")) == ["README.md", "websocket_image_save.py"]
    (home / "input/example.png").unlink()
    command.prepare(str(home))
    assert not os.listdir(home / "input")


@pytest.mark.parametrize(("flags", "environ", "passed"), [
    (["--cpu"], {"TACO_HOME": "{0}/mine"}, ["--base-directory", "{0}/mine", "--cpu"]),
    (["--base-directory", "{0}"], {"TACO_HOME": "/none/mine"}, ["--base-directory", "{0}"]),
    (["--port", "5"], {"TACO_HOME": "", "HOME": "{0}"}, ["--base-directory", "{0}/taco-dit", "--port", "5"]),
])  # fmt: skip
def test_the_command_chooses_a_folder(tmp_path, monkeypatch, capsys, flags, environ, passed):
    import comfy.cli_args
    import main

    kept = dict(vars(comfy.cli_args.args))
    monkeypatch.setattr(main, "main", lambda argv: print(*argv, sep="|"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["taco-dit", *(flag.format(tmp_path) for flag in flags)])
    for name, value in environ.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    try:
        with pytest.raises(SystemExit) as end:
            command.run()
    finally:
        vars(comfy.cli_args.args).update(kept)
    assert end.value.code is None
    assert capsys.readouterr().out.splitlines()[-1] == "|".join(passed).format(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["taco-dit"])
    monkeypatch.setenv("TACO_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(SystemExit) as end:
        command.run()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"TACO-DiT: {tmp_path}/file/home cannot be made (Not a directory); choose another folder with --base-directory\n"
    )
