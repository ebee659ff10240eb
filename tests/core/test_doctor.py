"""The doctor finds nothing wrong with a sound machine, and names planted faults with their cures."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
import types

import pytest
import torch

from comfy.taco_dit.doctor import machine, ranks
from comfy.taco_dit.doctor.findings import OK, PROBLEM, WARNING, Finding, as_text, examine

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def doctor(*flags: str, **environ: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "comfy.taco_dit.doctor", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, **environ})
    return done.returncode, done.stdout + done.stderr


def test_a_sound_machine(tmp_path):
    report = tmp_path / "report.json"
    status, text = doctor("--cpu", "--taco-ranks", "2", "--doctor-json", str(report))
    assert status == 0, text
    assert "no problem found" in text
    assert "ulysses 2, predicted " in text and "2 x CPU, " in text
    sections = {section["title"]: section["findings"] for section in json.loads(report.read_text())}
    links = {f["subject"]: f for f in sections["groups and links of 2 ranks"]}
    assert links["ranks 0, 1"]["level"] == "ok" and "GB/s" in links["rank 0 - rank 1"]["text"]
    assert {f["level"] for f in sections["attention"]} == {"ok"}
    assert any(f["subject"] == "comfyui-frontend-package" for f in sections["versions"])


def test_a_wrong_degree_is_named(tmp_path):
    config = tmp_path / "taco.yaml"
    config.write_text("parallel:\n  sequence_parallel_degree: 5\n")
    status, text = doctor("--cpu", "--taco-ranks", "2", "--taco-config", str(config), "--doctor-quick")
    assert status == 1
    assert "sequence_parallel_degree" in text and "docs/configuration.md" in text
    assert "1 problem:" in text


def test_a_missing_gpu_is_named():
    status, text = doctor("--gpus", "97", "--doctor-quick")
    assert status == 1
    assert "GPU 97 not found" in text and "nvidia-smi" in text


def test_more_ranks_than_gpus_is_a_problem(monkeypatch, capsys):
    from comfy.taco_dit.core import launcher
    from comfy.taco_dit.core.gpus import Gpu
    from comfy.taco_dit.doctor import __main__ as program

    monkeypatch.setattr(launcher, "list_gpus", lambda: (Gpu(0), Gpu(1)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert program.main(["--taco-ranks", "4"]) == 1
    assert "--taco-ranks 4 needs 4 GPUs but 2 can be used" in capsys.readouterr().err


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    def full(**kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    found = {f.subject: f for f in machine.resources({"output": str(tmp_path / "not" / "yet")})}
    assert found["output folder"].level == PROBLEM
    assert "No space left on device" in found["output folder"].text
    assert "--output-directory" in found["output folder"].cure


def test_little_room_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "LEAST_DISK", 2**70)
    found = {f.subject: f for f in machine.resources({"temp": str(tmp_path)})}
    assert found["temp folder"].level == WARNING and found["temp folder"].cure


@pytest.mark.parametrize(
    ("line", "level"),
    [("torch", OK), ("numpy>=1.0", OK), ("numpy>=99", PROBLEM), ("numpy==0.1", WARNING), ("no-such-package", PROBLEM)],
)
def test_packages(tmp_path, line, level):
    file = tmp_path / "requirements.txt"
    file.write_text(f"# a remark\n{line}\n")
    levels = [f.level for f in machine.versions(str(file))]
    assert levels[:2] == [OK, OK]
    assert levels[2:] == ([] if line == "torch" else [level])


@pytest.fixture
def planted(tmp_path):
    """Environment in which rank 1 runs some code when Python starts."""

    def make(code: str) -> dict[str, str]:
        lines = "\n".join("    " + line for line in code.splitlines())
        (tmp_path / "sitecustomize.py").write_text(f'import os\nif os.environ.get("RANK") == "1":\n{lines}\n')
        return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    return make


def test_a_rank_that_dies_is_named(planted):
    environ = planted("import sys\nprint('out of memory on purpose', flush=True)\nos._exit(7)")
    found = list(ranks.run_ranks(2, True, environ, 60))
    dead = [f for f in found if f.level == PROBLEM]
    assert [f.subject for f in dead] == ["rank 1"]
    assert "status 7" in dead[0].text and "out of memory on purpose" in dead[0].text
    assert "NCCL_DEBUG" in dead[0].cure


def test_a_rank_that_hangs_is_named_with_what_it_did(planted):
    found = list(ranks.run_ranks(2, True, planted("import time\ntime.sleep(600)"), 12))
    assert [f.subject for f in found] == ["rank 0", "rank 1"]
    assert all(f.level == PROBLEM and "hangs" in f.text for f in found)
    assert "waiting for the others before ranks 0, 1" in found[0].text
    assert "starting" in found[1].text


def test_wrong_values_are_noticed():
    class Broken:
        size, index = 2, 0

        def all_to_all(self, out, send, out_splits, send_splits):
            out.copy_(send[: len(out)])

        def all_gather(self, local, rows):
            return torch.cat([local.new_full((n, 3), float(i)) for i, n in enumerate(rows)])

        def broadcast(self, tensor, source=0):
            tensor += 1

        def shift(self, out, send):
            return types.SimpleNamespace(wait=lambda: None)

    rank = ranks.Rank.__new__(ranks.Rank)
    rank.device, rank.results, rank.manager = torch.device("cpu"), [], type("Manager", (), {"rank": 0})
    rank.doing = lambda what: None
    rank._collectives(Broken(), "ranks 0, 1")
    assert len(rank.results) == 1
    assert rank.results[0]["level"] == PROBLEM
    assert rank.results[0]["text"].startswith("all-to-all, broadcast, shift: wrong values on rank 0")


def test_every_group_of_every_plan_is_tested():
    assert ranks.groups_of(2) == [(0, 1)]
    assert set(ranks.groups_of(4)) == {(0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 3)}
    assert (0, 1, 2, 3, 4, 5) in ranks.groups_of(6) and (0, 3) in ranks.groups_of(6)


def test_a_check_that_breaks_is_a_problem_and_keeps_what_it_found():
    def check():
        yield Finding(OK, "first", "fine")
        raise KeyError("gone")

    section = examine("links", check)
    assert [f.level for f in section.findings] == [OK, PROBLEM]
    text = as_text([section])
    assert "KeyError" in text and "1 problem:" in text and "no problem found" not in text


def test_a_problem_needs_a_remedy():
    with pytest.raises(ValueError, match="needs a remedy"):
        Finding(PROBLEM, "x", "y")
