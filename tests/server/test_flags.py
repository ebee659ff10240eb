"""Flags that change how the server answers, through HTTP; and the warning about those that change nothing."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from app.run import _name_flags_without_effect, _open_store
from comfy.cli_args import FRONT_END_DEFAULT, build_parser

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def request(port, path, scheme="http", context=None, **headers):
    """(status, headers, content)."""
    call = urllib.request.Request(f"{scheme}://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(call, timeout=20, context=context) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


@pytest.fixture
def start(tmp_path):
    """`start(*flags)`: a real server with these flags."""
    from tests.e2e.server import Server

    running = []

    def begin(*flags):
        base = tmp_path / f"base{len(running)}"
        base.mkdir()
        running.append(Server(str(base), 1, flags))
        return running[-1]

    yield begin
    for server in running:
        server.stop()


def certificate(folder):
    """Key and certificate for 127.0.0.1, made with the openssl command."""
    key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key,
               "-out", cert, "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return key, cert


def test_tls(start, tmp_path):
    try:
        key, cert = certificate(tmp_path)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    server = start("--tls-keyfile", key, "--tls-certfile", cert)
    with pytest.MonkeyPatch.context() as patch:
        import re

        from tests.e2e import server as module

        patch.setattr(module, "_LISTENING", re.compile(r"To see the GUI go to: https://[^:]+:(\d+)"))
        server.wait_ready()
    trusted = ssl.create_default_context(cafile=cert)
    status, _, content = request(server.port, "/prompt", "https", trusted)
    assert status == 200 and json.loads(content) == {"exec_info": {"queue_remaining": 0}}
    with pytest.raises(urllib.error.URLError):
        request(server.port, "/prompt", "https", ssl.create_default_context())
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        request(server.port, "/prompt")
    said = subprocess.run(
        [sys.executable, "main.py", "--cpu", "--port", "0", "--base-directory", str(tmp_path), "--tls-keyfile", key],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert said.returncode == 2 and "needs both --tls-keyfile and --tls-certfile" in said.stdout + said.stderr
    assert "Traceback" not in said.stderr


def test_a_folder_without_a_page_is_one_clear_line(tmp_path, capsys):
    from comfy.cli_args import build_parser

    for folder, problem in (
        (tmp_path, "has no index.html; give the folder of a built page"),
        (tmp_path / "none", "is not a directory"),
    ):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--front-end-root", str(folder)])
        assert f"argument --front-end-root: {folder} {problem}" in capsys.readouterr().err


def test_compression_cross_origin_and_a_page_of_ones_own(start, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page/index.html").write_text("<p>mine</p>")
    server = start(
        "--enable-compress-response-body", "--enable-cors-header", "https://friend.example", "--multi-user",
        "--front-end-root", str(tmp_path / "page"), "--front-end-version", "someone/else@1.0", "--fast", "cublas_ops",
    )  # fmt: skip
    server.wait_ready()
    port = server.port
    status, headers, content = request(port, "/object_info", **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip" and "KSampler" in json.loads(gzip.decompress(content))
    assert request(port, "/object_info")[1]["Content-Encoding"] is None
    status, headers, _ = request(port, "/prompt", Origin="https://friend.example")
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://friend.example"
    assert request(port, "/")[2] == b"<p>mine</p>"
    assert json.loads(request(port, "/users")[2]) == {"storage": "server", "users": {}}
    assert request(port, "/settings")[0] == 401
    user = server.json("/users", {"username": "Ann"})
    assert request(port, "/settings", **{"comfy-user": user})[0] == 200
    assert any("without effect in this version: --front-end-version, --fast cublas_ops" in line for line in server.log)


def test_the_address_can_be_kept_quiet(tmp_path):
    command = [
        sys.executable,
        "main.py",
        "--cpu",
        "--port",
        "0",
        "--base-directory",
        str(tmp_path),
        "--dont-print-server",
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "free" in line:  # the last line of the start
                break
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.terminate()
        said += process.stdout.readlines()
    assert not any("GUI" in line for line in said), said
    assert any("Stopped" in line for line in said), said


@pytest.mark.parametrize("flags, named", [
    ([], None),
    (["--fast", "autotune", "fp16_accumulation"], None),
    (["--comfy-api-base", "https://x.example"], "--comfy-api-base"),
    (["--front-end-version", FRONT_END_DEFAULT], None),
    (["--fp8_e8m0fnu-unet", "--directml"], "--directml, --fp8_e8m0fnu-unet"),
    (["--fast"], "--fast cublas_ops"),
])  # fmt: skip
def test_flags_without_effect_are_named(caplog, flags, named):
    from comfy.cli_args import _finish

    with caplog.at_level(logging.WARNING):
        _name_flags_without_effect(_finish(build_parser().parse_args(flags)))
    assert caplog.messages == ([] if named is None else [f"without effect in this version: {named}"])


OF_DEFAULTS = {"cache_classic", "normalvram", "disable_cuda_malloc"}  # they name what is so without them


def test_flags_in_the_help_work_and_others_are_not_in_it():
    """Each is read somewhere in the program; those without effect are accepted only."""
    import argparse

    from comfy.cli_args import ALWAYS_SO, WITHOUT_EFFECT

    program = ["*.py", "app/*.py", "comfy*/**/*.py", "utils/*.py"]
    files = {path for pattern in program for path in glob.glob(os.path.join(ROOT, pattern), recursive=True)}
    texts = [Path(path).read_text(encoding="utf-8") for path in files]
    read = set(re.findall(r"""(?:args|namespace)\.(\w+)|"(\w+)\"""", "\n".join(texts)))
    used = {name for pair in read for name in pair}
    shown = [action for action in build_parser()._actions if action.help != argparse.SUPPRESS]
    of_the_manager = {"enable_manager_legacy_ui"}  # its package reads it
    assert {action.dest for action in shown} - used <= OF_DEFAULTS | of_the_manager | {"help"}
    assert not {action.option_strings[0] for action in shown} & {*WITHOUT_EFFECT, *ALWAYS_SO}
    text = build_parser().format_help()
    assert "--use-sage-attention" in text and not any(f"{flag} " in text for flag in WITHOUT_EFFECT)


def test_the_allocator_is_chosen_before_torch_is_imported(tmp_path):
    """In a process of its own: torch reads the variable once."""
    code = (
        "import os, sys, main\n"
        "import comfy.taco_dit.core.launcher as launcher\n"
        "def plan(*a): raise launcher.LaunchError(os.environ['PYTORCH_CUDA_ALLOC_CONF'] + ' ' + str('torch' in sys.modules))\n"
        "launcher.plan_launch = plan\n"
        "main.main(['--cpu', '--cuda-malloc'])\n"
    )
    environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environ, timeout=60
    )
    assert said.stderr.strip() == "TACO-DiT: max_split_size_mb:64,backend:cudaMallocAsync False"


def test_no_persist_keeps_nothing_on_disk(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    assert _open_store(build_parser().parse_args(["--no-persist"])) is None and not os.listdir(tmp_path)
    store = _open_store(build_parser().parse_args([]))
    assert os.listdir(tmp_path / "taco_dit")
    store.close()


@pytest.mark.parametrize("address, host", [
    ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.7", "10.0.0.7"),
])  # fmt: skip
def test_the_address_that_is_printed_can_be_opened(address, host):
    from server import _host_to_open

    assert _host_to_open(address) == host


def test_settings_in_the_base_directory_come_first(tmp_path):
    """Without any there, those beside main.py count."""
    from app.start_checks import extra_path_files
    from comfy.taco_dit.core.launcher import read_config

    program, base = tmp_path / "program", tmp_path / "base"
    for folder, enabled in ((program, "true"), (base, "false")):
        folder.mkdir()
        (folder / "taco_dit_config.yaml").write_text(f"parallel:\n  enabled: {enabled}\n")
        (folder / "extra_model_paths.yaml").write_text("")
    args = build_parser().parse_args(["--base-directory", str(base), "--extra-model-paths-config", "a", "b"])
    assert not read_config(args, str(program), 1).parallel.enabled
    assert extra_path_files(args, str(program)) == [str(base / "extra_model_paths.yaml"), "a", "b"]
    for name in ("taco_dit_config.yaml", "extra_model_paths.yaml"):
        (base / name).unlink()
    assert read_config(args, str(program), 1).parallel.enabled
    assert extra_path_files(args, str(program)) == [str(program / "extra_model_paths.yaml"), "a", "b"]
