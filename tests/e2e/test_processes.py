"""Starting in every way there is, and ending: no rank stays behind, whatever is running."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.e2e.compare import furthest
from tests.e2e.server import ROOT, Server, is_alive, wait_until
from tests.e2e.workflows import flux, insert, node


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_ends(server, number, pids, seconds=5.0):
    """After a signal to the launcher everything is gone in time."""
    begun = time.monotonic()
    server.process.send_signal(number)
    server.process.wait(seconds + 5)
    gone = wait_until(lambda: not any(is_alive(pid) for pid in pids), seconds)
    took = time.monotonic() - begun
    assert gone, f"left behind: {[pid for pid in pids if is_alive(pid)]}"
    assert took < seconds, f"took {took:.1f} s"


def busy_prompt():
    return insert(flux(seed=801, steps=500), "watch", "TestModel", label="busy", slow_ms=100, fail="never",
                  fail_rank=0, fail_step=1)  # fmt: skip


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_signals_to_the_launcher(base, ranks, number, busy):
    with Server(base, ranks) as server:
        pids = server.pids()
        assert len(set(pids)) == ranks
        if busy:
            with server.page() as page:
                page.post(busy_prompt())
                page.wait("progress")
        check_ends(server, number, pids)


def test_a_killed_launcher_leaves_nobody(base):
    with Server(base, 2) as server:
        pids = server.pids()
        with server.page() as page:
            page.post(busy_prompt())
            page.wait("progress")
        check_ends(server, signal.SIGKILL, pids)


def test_when_rank_0_dies_all_start_again(base, serve):
    """On the same port, and the next prompt is right."""
    with Server(base, 2, ["--port", str(free_port())]) as server:
        port, pids = server.port, server.pids()
        server.listening_again()
        os.kill(pids[0], signal.SIGKILL)
        server.wait_ready()
        assert server.port == port
        assert not set(server.pids()) & set(pids)
        assert furthest(server.pictures(flux(seed=802)), serve(1).pictures(flux(seed=802))) <= 1
        assert wait_until(lambda: not any(is_alive(pid) for pid in pids), 5)


def test_ranks_are_forked_from_one_process_and_outlive_its_end(base, serve):
    """What they have imported is shared; when that process is killed, all start again."""
    with Server(base, 2, ["--port", str(free_port())]) as server:
        ranks = [psutil.Process(pid) for pid in server.pids()]
        template = ranks[0].parent()
        assert template == ranks[1].parent() and template.name() == "taco-template"
        assert [rank.name() for rank in ranks] == ["taco-rank-0", "taco-rank-1"]
        for rank in ranks:
            memory = rank.memory_full_info()
            assert memory.pss < 0.75 * memory.rss
        server.listening_again()
        template.kill()
        server.wait_ready()
        assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
        assert furthest(server.pictures(flux(seed=802)), serve(1).pictures(flux(seed=802))) <= 1
        assert psutil.Process(server.pids()[1]).parent() != template


def test_a_server_that_starts_again_in_its_process(base, serve):
    """The followers are replaced, and the supervisor does not count that as a fault."""
    with Server(base, 2, ["--port", str(free_port())]) as server:
        pids = server.pids()
        for _ in range(2):
            server.run({"restart": node("TestRestart", seconds=1.0)})
            server.listening_again()
            server.wait_ready()
            assert furthest(server.pictures(flux(seed=802)), serve(1).pictures(flux(seed=802))) <= 1
        after = server.pids()
        assert after[0] == pids[0] and after[1] != pids[1]


def test_a_pack_that_prepares_the_start_does_so_once_for_all_ranks(tmp_path):
    """Before torch is imported, in the process that ranks are forked from; also for a rank that is replaced."""
    pack = tmp_path / "custom_nodes" / "prepares"
    pack.mkdir(parents=True)
    (pack / "prestartup_script.py").write_text(
        "import os, sys\nprint('prepared before torch:', 'torch' not in sys.modules, flush=True)\n"
        "os.environ['PREPARED'] = os.environ.get('PREPARED', '') + 'yes'\nos.environ.pop('NOT_WANTED')\n"
    )
    (pack / "__init__.py").write_text(
        "import os\nassert os.environ['PREPARED'] == 'yes' and 'NOT_WANTED' not in os.environ\n"
        "NODE_CLASS_MAPPINGS = {}\nprint('imported', flush=True)\n"
    )
    with Server(str(tmp_path), 2, env={"NOT_WANTED": "1"}) as server:
        first, second = server.pids()
        parent = psutil.Process(first).parent()
        assert parent.pid != server.process.pid and parent.parent().pid == server.process.pid, "ranks are forked"
        os.kill(second, signal.SIGKILL)
        assert wait_until(lambda: server.log.count("imported") == 3, 15), server.tail()
        assert server.log.count("prepared before torch: True") == 1, server.tail()


@pytest.mark.parametrize("ranks", [1, 3])
def test_starts_that_cannot_succeed_end_at_once_in_one_line(base, tmp_path, ranks):
    """Before any rank is started: all together take a few seconds. What the first process says is all that is said."""
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        starts = {
            ("--port", port): f"cannot listen on 127.0.0.1:{port} (Address already in use); is another server running? choose",
            ("--port", "70000"): "argument --port: '70000' is not a port; give a number from 1 to 65535, or 0",
            ("--taco-config", "no.yaml"): "configuration file no.yaml does not exist; give another with --taco-config",
            ("--gpu", "3"): "unrecognized arguments: --gpu 3; did you mean --gpus? (--help lists all flags)",
        }  # fmt: skip
        more = {
            ("--listen", "192.0.2.1"): "cannot listen on 192.0.2.1:8188 (Cannot assign requested address); give an address of",
            ("--extra-model-paths-config", "no.yaml"): "--extra-model-paths-config no.yaml cannot be read (No such file",
            ("--extra-model-paths-config", str(tmp_path / "bad.yaml")): f"{tmp_path}/bad.yaml is not valid YAML in line 2",
            ("--tls-keyfile", "k", "--tls-certfile", "c"): "--tls-keyfile k: there is no such file; give a PEM file",
            ("--tls-keyfile", "k"): "TLS needs both --tls-keyfile and --tls-certfile",
            ("--user-directory", "nowhere"): "argument --user-directory: nowhere is not a directory",
            ("--input-directory", "main.py"): "--input-directory main.py is a file; give a folder",
        }  # fmt: skip
        for flags, said in (starts | (more if ranks == 1 else {})).items():
            command = [sys.executable, "main.py", "--cpu", "--taco-ranks", str(ranks), "--base-directory", base, *flags]
            begun = time.monotonic()
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
            assert time.monotonic() - begun < 5
            assert (done.returncode, done.stdout) == (2, ""), flags
            assert done.stderr.startswith(f"TACO-DiT: {said}") and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(("ranks", "moments"), [(1, [1.0]), (3, [0.3, 2.0])])
def test_ctrl_c_while_it_starts_says_nothing(base, ranks, moments):
    """While the first process parses, while torch is imported, while ranks load nodes."""
    for seconds in moments:
        command = [sys.executable, "main.py", "--cpu", "--taco-ranks", str(ranks), "--port", "0", "--base-directory",
                   base]  # fmt: skip
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            time.sleep(seconds)
            begun = time.monotonic()
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=10)
        assert time.monotonic() - begun < 3
        assert "Traceback" not in said and "Error" not in said, said
        assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 0)


def test_torchrun(base, serve):
    command = [os.path.join(os.path.dirname(sys.executable), "torchrun"), "--nproc-per-node", "2", "--master-port",
               str(free_port()), "main.py"]  # fmt: skip
    with Server(base, 0, command=command) as server:
        pids = server.pids()
        assert len(set(pids)) == 2
        prompt = flux(seed=803, cfg=4.5)
        assert furthest(server.pictures(prompt), serve(1).pictures(prompt)) <= 1
        check_ends(server, signal.SIGTERM, pids)


def test_ranks_on_several_hosts(base, serve):
    """As torchrun starts them there: each rank is alone on its host, and they meet at an address of rank 0's."""
    address = f"127.0.0.1:{free_port()}"
    hosts = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TACO_CONTROL": address,
             "TACO_SECRET": "a secret of all hosts"}  # fmt: skip
    follow = [sys.executable, "main.py", "--cpu", "--base-directory", base]
    first = Server(base, 0, env={**hosts, "RANK": "0"})
    with subprocess.Popen(follow, cwd=ROOT, env={**os.environ, **hosts, "RANK": "1"}) as second:
        try:
            with first as server:
                assert second.pid in server.pids()
                prompt = flux(seed=805, cfg=4.5)
                assert furthest(server.pictures(prompt), serve(1).pictures(prompt)) <= 1
        finally:
            second.kill()


def test_ranks_on_several_hosts_need_a_secret(base):
    hosts = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
    done = subprocess.run([sys.executable, "main.py", "--cpu"], cwd=ROOT, env={**os.environ, **hosts}, timeout=60,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert "TACO_SECRET" in done.stderr and "Traceback" not in done.stderr


# --- the start script ----------------------------------------------------------------------------------------------

SCRIPT = "start_comfyui_gpu345.sh"


@pytest.fixture
def installed(tmp_path):
    """A folder with the start script in which everything is installed already; main.py is the real one."""
    shutil.copy(os.path.join(ROOT, SCRIPT), tmp_path)
    setup = tmp_path / "setup_environment.sh"
    setup.write_text("#!/usr/bin/env bash\nexit 0\n")
    setup.chmod(0o755)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    main = os.path.join(ROOT, "main.py")
    (tmp_path / "main.py").write_text(f"import runpy\nrunpy.run_path({main!r}, run_name='__main__')\n")
    return tmp_path


ALL = "TACO-DiT: GPU 3, 4, 5 are not all there, so all of this machine are used: "


@pytest.mark.skipif(torch.cuda.is_available(), reason="the made-up GPUs would hide real ones")
@pytest.mark.parametrize(
    ("present", "ranks", "said"),
    [
        (0, 1, "TACO-DiT: no NVIDIA GPU found: computing on the CPU, which is slow"),
        (2, 2, ALL + "GPU 0, 1 (Made-up GPU, 80 GiB each); 2 ranks"),
        (6, 3, "TACO-DiT: using GPU 3, 4, 5 (Made-up GPU, 80 GiB each); 3 ranks"),
    ],
)
def test_the_start_script_ends_in_a_page_and_a_picture(base, installed, serve, present, ranks, said):
    """On made-up GPUs: the ranks compute on the CPU, since torch has none."""
    port = free_port()
    paths = [os.path.join(ROOT, "tests/e2e/made_up_gpus"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "TACO_LISTEN": "127.0.0.1",
        "TACO_TEST_GPUS": str(present),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with Server(base, None, ["--port", str(port)], [str(installed / SCRIPT)], environment) as server:
        assert server.port == port
        assert len(server.pids()) == ranks
        assert b"<html" in server.request("/")[1]
        assert furthest(server.pictures(flux(seed=804)), serve(1).pictures(flux(seed=804))) <= 1
        assert [line for line in server.log if line.startswith("TACO-DiT: ")] == [said]
        assert any("cannot use a GPU" in line for line in server.log) == (present > 0)
        check_ends(server, signal.SIGTERM, server.pids())


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, [], "--prefer-gpus 3,4,5 --port 12215 --listen 0.0.0.0"),
        ({"TACO_GPUS": "0,1"}, [], "--gpus 0,1 --port 12215 --listen 0.0.0.0"),
        ({"TACO_LISTEN": "127.0.0.1"}, ["--port", "9"], "--prefer-gpus 3,4,5 --listen 127.0.0.1 --port 9"),
        ({"TACO_TOKEN": "t"}, ["--prefer-gpus", "1"], "--port 12215 --listen 0.0.0.0 --prefer-gpus 1"),
        (
            {"TACO_LISTEN": "::1"},
            ["--cuda-device", "1"],
            "--prefer-gpus 3,4,5 --port 12215 --listen ::1 --cuda-device 1",
        ),
        ({}, ["--cpu", "--taco-ranks", "2", "--listen", "::1"], "--port 12215 --cpu --taco-ranks 2 --listen ::1"),
        ({"TACO_GPUS": "1"}, ["--gpus=0", "--port=7"], "--listen 0.0.0.0 --gpus=0 --port=7"),
    ],
)
def test_what_the_start_script_passes_on(installed, environment, arguments, expected):
    (installed / "main.py").write_text("import sys\nprint(*sys.argv[1:])\n")
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TACO_")}
    done = subprocess.run([str(installed / SCRIPT), *arguments], env=plain | environment, capture_output=True,
                          text=True, timeout=20, check=True)  # fmt: skip
    *said, passed = done.stdout.splitlines()
    assert passed == expected
    warned = "anyone on your network can use this server" in "".join(said)
    assert bool(said) == ("0.0.0.0" in expected) and warned == (bool(said) and "TACO_TOKEN" not in environment)


def test_the_start_script_runs_from_elsewhere_and_through_a_link(installed, tmp_path_factory):
    (installed / "main.py").write_text("import os\nprint(os.getcwd())\n")
    link = tmp_path_factory.mktemp("bin") / "start"
    link.symlink_to(installed / SCRIPT)
    done = subprocess.run([str(link)], cwd="/", capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout.splitlines()[-1] == os.path.realpath(installed)
