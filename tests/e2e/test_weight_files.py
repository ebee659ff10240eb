"""Weight files that change under a running server: the new weights or an error that names the file, on all ranks."""

from __future__ import annotations

import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.compare import furthest
from tests.e2e.workflows import insert, node, parts, with_lora


@pytest.fixture
def models(base):
    """A path `models/<folder>/changing.safetensors` with what is in `one`, and the path of `other`, of the same size."""
    made = []

    def make(folder, one):
        path = os.path.join(base, "models", folder, "changing.safetensors")
        other = os.path.join(base, "models", folder, "other.safetensors")
        shutil.copy(os.path.join(base, "models", folder, one), path)
        save_file({key: value * -0.7 for key, value in load_file(path).items()}, other)
        made.extend((path, other))
        return path, other

    yield make
    for path in made:
        os.remove(path)


def rewrite(path, other):
    with open(other, "rb") as source, open(path, "r+b") as file:
        file.write(source.read())


def replace(path, other):
    os.replace(shutil.copy(other, f"{path}.new"), path)


def picture(server, name, **more):
    return server.pictures(parts(name, seed=431, **more))


@pytest.mark.parametrize("change", [rewrite, replace])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_next_prompt_has_the_new_weights(serve, models, ranks, change):
    server = serve(ranks)
    path, other = models("diffusion_models", "tiny_flux_dev_bfl.safetensors")
    old, new = picture(server, "changing.safetensors"), picture(server, "other.safetensors")
    assert furthest(old, new) > 5
    assert furthest(picture(server, "changing.safetensors"), old) == 0
    change(path, other)
    assert furthest(picture(server, "changing.safetensors"), new) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_next_prompt_has_the_new_adapter(serve, models, ranks):
    server = serve(ranks)
    path, other = models("loras", "tiny_flux_kohya.safetensors")

    def with_adapter(name):
        prompt = with_lora(1.0, seed=432)
        prompt["lora"]["inputs"]["lora_name"] = name
        return server.pictures(prompt)

    old, new = with_adapter("changing.safetensors"), with_adapter("other.safetensors")
    assert furthest(old, new) > 2
    rewrite(path, other)
    assert furthest(with_adapter("changing.safetensors"), new) == 0


@pytest.mark.parametrize("change", [rewrite, replace])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_change_during_a_prompt_fails_it_on_all_ranks(serve, models, ranks, change):
    server = serve(ranks)
    pids = server.pids()
    path, other = models("diffusion_models", "tiny_flux_dev_bfl.safetensors")
    new = picture(server, "other.safetensors")
    slow = parts("changing.safetensors", seed=431, steps=6)
    insert(slow, "watch", "TestModel", label=f"changing{ranks}-", slow_ms=100, fail="never", fail_rank=0, fail_step=1)
    with server.page() as page:
        page.post(slow)
        page.wait("progress", lambda m: m["data"]["value"] == 2)
        change(path, other)
        outcome = page.finish()
    assert outcome.error["node_id"] == "sample"
    assert path in outcome.error["exception_message"] and "queue the prompt again" in outcome.error["exception_message"]
    assert "WeightFileChangedError" in outcome.error["exception_type"]
    assert furthest(picture(server, "changing.safetensors"), new) == 0
    assert server.pids() == pids


@pytest.mark.parametrize("ranks", [1, 2])
def test_loaders_that_do_not_look_at_their_file_are_run_again_after_the_error(serve, models, ranks):
    """A pack's loader, whose result is kept although its file changed."""
    server = serve(ranks)
    path, other = models("diffusion_models", "tiny_flux_dev_bfl.safetensors")
    prompt = parts("changing.safetensors", seed=431)
    prompt["load"] = node("TestLoader", name="changing.safetensors")
    new = picture(server, "other.safetensors")
    old = server.pictures(prompt)
    rewrite(path, other)
    prompt["sample"]["inputs"]["seed"] = 433
    assert path in server.run(prompt).error["exception_message"]
    prompt["sample"]["inputs"]["seed"] = 431
    assert furthest(server.pictures(prompt), new) == 0 < furthest(old, new)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_cut_short_is_an_error_and_no_crash(serve, models, ranks):
    server = serve(ranks)
    pids = server.pids()
    path, _ = models("vae", "tiny_ae.safetensors")
    prompt = parts("tiny_flux_dev_bfl.safetensors", seed=434)
    prompt["vae"]["inputs"]["vae_name"] = "changing.safetensors"
    server.pictures(prompt)
    os.truncate(path, 5000)
    prompt["sample"]["inputs"]["seed"] = 435
    message = server.run(prompt).error["exception_message"]
    assert path in message and "not a complete safetensors file" in message
    assert server.pids() == pids
