"""The recipe runs, goes on where it was stopped, and writes files the ordinary loaders take."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from demo import networks
from demo.run import Recipe, Run
from demo.train import export, train
from tests.parallel.ranks import run_ranks

TINY = Recipe(
    scenes=40, text_batch=4, text_steps=3, vae_batch=4, vae_steps=4, batch=3, steps=3, lora_steps=2, muon_iterations=1
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp("demo")
    run = Run(TINY, torch.device("cpu"), str(work / "work"), 1)
    train(run)
    export(run, str(work / "out"))
    return work


def test_files_load_through_the_ordinary_loaders(trained):
    import comfy.sd
    import comfy.utils

    path = str(trained / "out" / networks.CHECKPOINT)
    assert os.path.getsize(path) < 25e6
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(path)[:3]
    assert type(model.model).__name__ == "Flux"
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    assert positive[0][0].shape == (1, networks.T5_LENGTH, networks.T5_WIDTH)
    assert vae.decode(torch.zeros(1, 16, 6, 8)).shape == (1, 48, 64, 3)
    lora = comfy.utils.load_torch_file(str(trained / "out" / networks.LORA))
    patched, _ = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    assert len(patched.patches) == len([key for key in lora if key.endswith(".alpha")]) == 2 * 8 + 6 * 2


def test_the_program_computes_what_was_trained(trained):
    """Network, text encoders and VAE of the loaded file against the trained modules."""
    import comfy.sd

    run = Run(TINY, torch.device("cpu"), str(trained / "work"), 1)
    half = {key: value.half().float() for key, value in run.averages["model"].items()}
    run.model.load_state_dict(half)
    run.vae.load_state_dict({key: value.half().float() for key, value in run.vae.state_dict().items()})
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(trained / "out" / networks.CHECKPOINT))[:3]
    from demo.data import pad_ids, token_ids

    text = "two blue stars on a white background"
    t5, clip_ids = (torch.tensor([ids]) for ids in pad_ids(*token_ids(text)))
    with torch.no_grad():
        context, pooled = run.model.text(t5, clip_ids)
        (theirs, more), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        torch.testing.assert_close(theirs, context, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(more["pooled_output"], pooled, rtol=1e-4, atol=1e-4)
        latent = torch.randn(1, 16, 14, 20)
        wanted = run.model.dit(latent, torch.tensor([0.6]), context, pooled)
        network = model.model.diffusion_model.float()
        torch.testing.assert_close(network(latent, torch.tensor([0.6]), theirs, more["pooled_output"]), wanted,
                                   rtol=1e-3, atol=1e-3)  # fmt: skip
        pictures = networks.pictures_of(run.vae, latent).clamp(0, 1)
        decoded = vae.decode(model.model.process_latent_out(latent))
        torch.testing.assert_close(decoded.movedim(-1, 1), pictures, rtol=1e-3, atol=2e-3)


def test_standardised_latents(trained):
    run = Run(TINY, torch.device("cpu"), str(trained / "work"), 1)
    from demo.data import make_pool
    from demo.render import render

    pool = make_pool(30, (128, 128), TINY.seed * 1000 + 1, 1)
    with torch.no_grad():
        latent = networks.latent_of(run.vae, render(pool, 128, 128)).transpose(0, 1).flatten(1)
    assert latent.mean(1).abs().max() < 0.1
    assert (latent.std(1) - 1).abs().max() < 0.1


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_weights(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("demo.run._SAVE_SECONDS", 0.0)
    run = Run(TINY, torch.device("cpu"), str(tmp_path / "work"), 1)
    save = run.save

    def save_then_stop(*args):
        save(*args)
        if run.done.get("model") == 2:
            raise Stopped

    monkeypatch.setattr(run, "save", save_then_stop)
    with pytest.raises(Stopped):
        train(run)
    again = Run(TINY, torch.device("cpu"), str(tmp_path / "work"), 1)
    assert again.done["model"] == 2
    train(again)
    export(again, str(tmp_path / "out"))
    for name in (networks.CHECKPOINT, networks.LORA):
        one, other = (load_file(os.path.join(folder, "out", name)) for folder in (trained, tmp_path))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_with_other_settings_is_not_gone_on_with(trained):
    with pytest.raises(SystemExit, match="other settings.*--work"):
        Run(replace(TINY, rate=1.0), torch.device("cpu"), str(trained / "work"), 1)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    run = Run(TINY, torch.device("cpu"), str(tmp_path), 1)
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(SystemExit, match="text: the loss is no number at step 50"):
        run.stage(
            "text", {"w": weight}, 60, 0.1, lambda number, generator: {}, lambda batch: (weight * float("nan")).sum()
        )


def _on_a_rank(manager, work):
    """A weight fitted to one number per rank; then the whole recipe. The weight, and what of the recipe was written."""
    store = f"file://{work}/ranks"
    torch.distributed.init_process_group("gloo", init_method=store, rank=manager.rank, world_size=manager.world_size)
    run = Run(TINY, torch.device("cpu"), os.path.join(work, "work"), 1)
    weight = torch.nn.Parameter(torch.zeros(3))

    def batch_of(number, generator):
        return {"target": torch.full((3,), 1.0 + manager.rank)}

    def loss_of(batch):
        return (weight - batch["target"]).square().sum()

    run.stage("fit", {"w": weight}, 300, 0.1, batch_of, loss_of)
    train(run)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    state = torch.load(run.file, weights_only=True)["averages"]["model"]
    mine = run.averages["model"]
    return weight.detach(), all(torch.equal(value, state[key]) for key, value in mine.items())


def test_ranks_train_one_model_on_all_their_data(tmp_path):
    (one, same), (other, too) = run_ranks(2, _on_a_rank, str(tmp_path))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, torch.full((3,), 1.5), atol=0.02, rtol=0)
    assert same and too, "rank 0 wrote other weights than a rank has"


def test_nothing_to_export_is_said(tmp_path):
    command = [sys.executable, "-m", "demo.train", "--smoke", "--export", "--device", "cpu", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "nothing to write" in done.stderr
