"""setup_environment.sh with stand-ins for Python, pip and nvidia-smi, which write down how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in *"$FAILS"*) exit 1 ;; esac
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
FILES = ["requirements.txt", "requirements_no_deps.txt", "requirements_taco_dit.txt", "requirements_template_pictures.txt",
         "requirements_tests.txt", "setup_environment.sh"]  # fmt: skip
RUNTIME = ["torch==", "-r requirements.txt", "--no-deps -r requirements_no_deps.txt"]
XFUSER, PICTURES = "-r requirements_taco_dit.txt", "-r requirements_template_pictures.txt"


@pytest.fixture
def setup(tmp_path):
    """`setup(kind, gpu=False, **environment)`: (exit status, what was said, what pip was asked for)."""
    for name in FILES:
        shutil.copy(os.path.join(ROOT, name), tmp_path)
    (tmp_path / "utils").mkdir()
    shutil.copy(os.path.join(ROOT, "utils", "torch_packages.py"), tmp_path / "utils")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("python3", PYTHON), ("chromium", "#!/bin/sh\n"), ("nvidia-smi", '#!/bin/sh\nexit "$NO_GPU"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(kind, gpu=False, fails="nothing fails", **environment):
        calls.write_text("")
        environment |= {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "FAILS": fails,
            "NO_GPU": str(int(not gpu)),
        }
        done = subprocess.run(
            ["bash", str(tmp_path / "setup_environment.sh"), kind],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
        asked = [line for line in calls.read_text().splitlines() if line.startswith("-m pip install")]
        return (
            done.returncode,
            done.stdout + done.stderr,
            [call.partition("--disable-pip-version-check ")[2] for call in asked],
        )

    return run


def installed(asked, wanted):
    return [call.startswith(start) for call, start in zip(asked, wanted, strict=True)] == [True] * len(wanted)


def test_it_installs_once_torch_first(setup, tmp_path):
    status, said, asked = setup("runtime")
    assert status == 0 and installed(asked, [*RUNTIME, PICTURES])
    assert "-m utils.torch_packages install" in (tmp_path / "calls").read_text(), "for packs, where they load"
    assert said.count("\n") == 2 and "first run, making .venv" in said and "about 600 MB" in said
    assert setup("runtime") == (0, "", [])
    (tmp_path / "requirements.txt").write_text("torch==2.0\nnew\n")
    assert setup("runtime", TACO_TEMPLATE_PICTURES="no")[2][0] == "torch==2.0"


def test_gpus_bring_the_optional_engine_and_its_failure_ends_nothing(setup):
    status, said, asked = setup("runtime", gpu=True, TACO_TEMPLATE_PICTURES="no")
    assert status == 0 and installed(asked, [*RUNTIME, XFUSER]) and "600 MB" not in said
    assert setup("runtime", gpu=True, TACO_TEMPLATE_PICTURES="no")[2] == []
    status, said, asked = setup("runtime", gpu=False, TACO_TEMPLATE_PICTURES="no")
    assert status == 0 and installed(asked, RUNTIME)
    status, said, asked = setup("runtime", gpu=True, fails=XFUSER, TACO_TEMPLATE_PICTURES="no")
    assert status == 0 and "the native engine works without them" in said


def test_what_must_be_there_and_fails_is_tried_again(setup):
    status, said, asked = setup("runtime", fails="-r requirements.txt")
    assert status != 0 and installed(asked, RUNTIME[:2])
    status, said, asked = setup("runtime", fails=PICTURES)
    assert status == 0 and installed(asked, [*RUNTIME, PICTURES]) and "the page shows gradients" in said


def test_tests_need_no_pictures(setup):
    assert installed(setup("tests", gpu=True)[2], [*RUNTIME[:2], "-r requirements_tests.txt", RUNTIME[2]])


def test_an_old_python_is_named(setup):
    status, said, asked = setup("runtime", fails="sys.version_info")
    assert (status, asked) == (1, [])
    assert said == "TACO-DiT needs Python 3.11 or newer; set TACO_PYTHON to one\n"
