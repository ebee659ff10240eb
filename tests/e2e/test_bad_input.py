"""Wrong files, values, flags and configurations: one line that says why and what to do, and the server lives on."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from safetensors.torch import save_file

from tests.e2e.compare import furthest
from tests.e2e.server import ROOT
from tests.e2e.workflows import changed, flux, insert, node, parts
from tests.tiny_models import random_weights, t5_shapes


@pytest.fixture
def lives_on(serve):
    """The server with two ranks; afterwards it must still render, with the same processes."""
    server = serve(2)
    pids = server.pids()
    yield server
    prompt = flux(seed=701)
    assert furthest(server.pictures(prompt), serve(1).pictures(prompt)) <= 1
    assert server.pids() == pids


def reason(outcome, *words):
    """The message of a failed prompt: a single line with these words."""
    assert outcome.error is not None, outcome.messages
    message = outcome.error["exception_message"].strip()
    assert "\n" not in message, message
    assert all(word in message for word in words), message
    return message


@pytest.fixture(scope="session")
def bad_files(base):
    """Files that are not what their folder promises."""
    models = os.path.join(base, "models")
    with open(os.path.join(models, "checkpoints/tiny_flux_dev.safetensors"), "rb") as file:
        whole = file.read()
    for name, content in (("truncated", whole[: len(whole) // 2]), ("empty", b""), ("text", b"<html>not found</html>")):
        with open(os.path.join(models, f"checkpoints/{name}.safetensors"), "wb") as file:
            file.write(content)
    with open(os.path.join(models, "loras/truncated.safetensors"), "wb") as file:
        file.write(whole[:5000])
    save_file(random_weights(t5_shapes(), 3), os.path.join(models, "checkpoints/only_t5.safetensors"))
    with open(os.path.join(base, "input/text.png"), "w", encoding="utf-8") as file:
        file.write("not a picture")


@pytest.mark.parametrize("name", ["truncated", "empty", "text"])
def test_broken_checkpoints(lives_on, bad_files, name):
    message = reason(lives_on.run(flux(f"{name}.safetensors")), f"{name}.safetensors")
    assert "again" in message or "another" in message, f"no next step: {message}"


def test_a_checkpoint_without_a_diffusion_model(lives_on, bad_files):
    reason(lives_on.run(flux("only_t5.safetensors")), "only_t5.safetensors", "no diffusion model", "use another file")


def test_a_broken_lora(lives_on, bad_files):
    prompt = insert(flux(), "lora", "LoraLoaderModelOnly", lora_name="truncated.safetensors", strength_model=1.0)
    reason(lives_on.run(prompt), "truncated.safetensors")


def test_a_picture_that_is_none(lives_on, bad_files):
    prompt = flux()
    prompt["image"] = node("LoadImage", image="text.png")
    prompt["latent"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    reason(lives_on.run(prompt), "text.png")


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("text, value", [("x" * 12_000_000, {}), ("value", nested(190)), ("value", {"a": [0] * 300_000})],
                         ids=["12 MB", "nested 190 deep", "300,000 values"])  # fmt: skip
def test_large_and_deep_prompts_reach_every_rank(lives_on, request, text, value):
    label = request.node.callspec.id.replace(" ", "-")
    outcome = lives_on.run({"record": node("TestRecord", label=label, text=text, value=value)})
    assert outcome.error is None
    wanted = str(value) if text == "value" else text
    assert lives_on.records(label) == {0: [wanted], 1: [wanted]}


def test_a_prompt_that_is_nested_too_deeply_is_refused(lives_on):
    status, content = lives_on.request(
        "/prompt", {"prompt": {"1": node("TestRecord", label="deep", text="", value=nested(600))}}
    )
    assert status == 400 and b"nested more than 200 levels deep" in content


def test_an_exception_with_a_huge_message(lives_on):
    """It is that prompt's error, and other ranks get the beginning and the end of the text."""
    outcome = lives_on.run({"raise": node("TestRaise", length=6_000_000)})
    assert outcome.error["exception_message"].startswith("rank ") and outcome.error["exception_type"] == "ValueError"


def test_a_model_that_is_not_there(lives_on):
    status, content = lives_on.request("/prompt", {"prompt": flux("nothing.safetensors")})
    assert status == 400
    assert b"value_not_in_list" in content and b"nothing.safetensors" in content


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0}, {"steps": "many"}, {"cfg": -1.0}, {"sampler_name": "none"}, {"model": ["positive", 0]},
        {"model": ["nowhere", 0]},

    ],
)  # fmt: skip
def test_values_out_of_range(lives_on, change):
    status, content = lives_on.request("/prompt", {"prompt": changed(flux(), "sample", **change)})
    assert status == 400, content
    assert b'"sample"' in content


def test_prompts_that_are_none(lives_on):
    for body in (
        {},
        {"prompt": {}},
        {"prompt": []},
        {"prompt": {"1": {}}},
        {"prompt": {"1": {"class_type": "No"}}},
        [],
    ):
        assert lives_on.request("/prompt", body)[0] == 400, body


def test_a_latent_of_another_model(lives_on):
    """4 channels where Flux has 16: an empty one is fitted, one with a picture in it is refused."""
    decode = flux()
    decode["decode"]["inputs"]["samples"] = ["latent", 0]
    reason(lives_on.run(decode), "4 channels", "16")
    sample = insert(flux(), "noise", "TestUnseeded", slot="latent_image", label="channels")
    reason(lives_on.run(sample), "4 channels", "16", "matching VAE")


def test_text_encoders_that_do_not_fit(lives_on):
    prompt = changed(parts("tiny_flux_dev_bfl.safetensors"), "clip", clip_name2="tiny_clip_l.safetensors")
    outcome = lives_on.run(prompt)
    if outcome.error is not None:
        assert outcome.error["exception_message"].strip()


# --- before ranks start --------------------------------------------------------------------------------------------


def start(*flags):
    """(status, output, seconds) of a start that must end by itself."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "main.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=30,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).strip(), time.monotonic() - begun


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("parallel:\n  ulyses_degree: 2\n", ["parallel.ulyses_degree", "did you mean ulysses_degree?"]),
        ("paralel:\n  enabled: true\n", ["paralel", "did you mean parallel?"]),
        ("parallel:\n  ulysses_degree: 2\n", ["ulysses_degree is 2", "does not divide the 3 ranks", "auto, 1, 3"]),
        ("parallel:\n  data_parallel_degree: 3\n  ulysses_degree: 3\n", ["9", "set one of them to auto"]),
        ("parallel:\n  enabled: maybe\n", ["parallel.enabled", "allowed: true, false"]),
        ("parallel: [\n", ["not valid YAML"]),
        ("optimization:\n  engine: warp\n", ["optimization.engine", "native, xfuser"]),
    ],
)
def test_configurations_that_cannot_work(tmp_path, content, words):
    path = tmp_path / "taco.yaml"
    path.write_text(content)
    status, said, seconds = start("--cpu", "--taco-ranks", "3", "--taco-config", str(path))
    assert status == 2 and seconds < 10
    assert len(said.splitlines()) == 1 and "Traceback" not in said, said
    assert str(path) in said and all(word in said for word in words), said


def test_a_configuration_that_is_not_there(tmp_path):
    status, said, _ = start("--cpu", "--taco-config", str(tmp_path / "nothing.yaml"))
    assert status == 2 and len(said.splitlines()) == 1
    assert "does not exist" in said and "--taco-config" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--taco-rank", "2"], ["--taco-rank", "did you mean --taco-ranks?"]),
        (["--taco-ranks", "0"], ["--taco-ranks", "at least 1"]),
        (["--gpus", "a,b"], ["--gpus", "3,4,5"]),
        (["--preview-method", "latent3rgb"], ["--preview-method"]),
    ],
)
def test_flags_that_are_unknown(flags, words):
    status, said, _ = start(*flags)
    assert status == 2 and "Traceback" not in said
    assert all(word in said for word in words), said
