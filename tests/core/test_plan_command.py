"""`python -m comfy.taco_dit.plan` explains plans without GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from comfy.taco_dit import plan

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def run(capsys, *flags: str) -> tuple[int, str, str]:
    status = plan.main(list(flags))
    done = capsys.readouterr()
    return status, done.out, done.err


def test_it_runs_without_torch():
    command = "import sys; from comfy.taco_dit import plan; plan.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    flags = ["--model", "flux-dev", "--size", "1024", "--gpus", "6", "--link", "pcie4"]
    done = subprocess.run([sys.executable, "-c", command, *flags], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "6 x H100 SXM" in done.stdout and "PCIe 4.0 x16 through host memory" in done.stdout
    assert "4608 tokens" in done.stdout and "Chosen: weights whole, " in done.stdout
    assert "a call has 1 conditioning" in done.stdout and "GiB" in done.stdout


def test_json(capsys):
    status, out, _ = run(capsys, "--model", "flux-dev", "--gpus", "2", "--cfg", "3.5", "--batch", "4", "--json")
    found = json.loads(out)
    assert status == 0 and found["conds"] == 2 and found["pictures"] == 4
    assert found["layouts"][0]["layout"] == "whole" and found["layouts"][0]["plan"] == found["plans"][0]["plan"]
    assert found["layouts"][0]["memory_bytes"] > 23.8e9


def test_what_does_not_fit(capsys):
    _, out, _ = run(capsys, "--model", "qwen-image", "--gpus", "2", "--gpu", "4090", "--link", "pcie4")
    assert "the smallest GPU has 21.6 for it" in out
    _, out, _ = run(
        capsys, "--model", "wan-14b", "--size", "1280x720", "--frames", "81", "--gpu", "3090", "--batch", "64"
    )
    assert "75600 tokens" in out and "Nothing can be chosen: " in out and "activations alone do not fit" in out


def test_mixed_cards_and_hosts(capsys):
    status, out, _ = run(
        capsys, "--model", "flux-dev", "--gpu", "h100,h100,h200,h200", "--hosts", "2", "--network", "10"
    )
    assert status == 0 and "2 x H100 SXM + 2 x H200 SXM" in out and "10 Gb/s between hosts" in out


def test_a_configuration_holds(capsys, tmp_path):
    file = tmp_path / "taco.yaml"
    file.write_text("parallel:\n  ring_degree: 2\n")
    _, out, _ = run(capsys, "--model", "flux-dev", "--gpus", "4", "--taco-config", str(file))
    assert "ulysses 2 x ring 2" in out and "degrees in the configuration leave no room for it" in out


@pytest.mark.parametrize(("flags", "message"), [
    (("--gpu", "h101"), "GPU 'h101' is not known; known: h200, h100"),
    (("--gpu", "h100,h200", "--gpus", "3"), "--gpu names 2 GPUs, but --gpus is 3"),
    (("--gpus", "3", "--hosts", "2"), "3 GPUs cannot be spread evenly over 2 hosts"),
    (("--gpus", "2", "--network", "0"), "it must be above 0"),
    (("--taco-config", "nowhere.yaml"), "nowhere.yaml does not exist"),
])  # fmt: skip
def test_flags_that_cannot_be(capsys, flags, message):
    status, _, error = run(capsys, "--model", "flux-dev", *flags)
    assert status == 2 and message in error
