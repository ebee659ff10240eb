"""Stable Diffusion 1 as a whole: a checkpoint in the real layout, sampled and decoded, the same on any number of ranks."""

from __future__ import annotations

import os

import pytest

from tests import tiny_models
from tests.e2e.compare import furthest
from tests.e2e.workflows import changed, flux, insert, node, with_areas

SD15 = "tiny_sd15.safetensors"
SIZE = {"checkpoint": SD15, "width": 72, "height": 104, "steps": 2, "cfg": 4.5}


@pytest.fixture(scope="module", autouse=True)
def files(base):
    tiny_models.write_family("sd15", os.path.join(base, "models"))


def everything():
    """A rectangle of an uploaded picture, painted with a LoRA; the halves have prompts of their own."""
    prompt = with_areas(**{**SIZE, "denoise": 0.9})
    insert(prompt, "lora", "LoraLoaderModelOnly", lora_name="tiny_sd15_kohya.safetensors", strength_model=1.0)
    prompt["image"] = node("LoadImage", image="start.png")
    prompt["latent"] = node("VAEEncode", pixels=["image", 0], vae=["load", 2])
    prompt["mask"] = node("SolidMask", value=0.0, width=72, height=104)
    prompt["hole"] = node("SolidMask", value=1.0, width=48, height=72)
    prompt["part"] = node("MaskComposite", destination=["mask", 0], source=["hole", 0], x=16, y=24, operation="add")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["part", 0])
    return changed(prompt, "sample", latent_image=["masked", 0])


CASES = {
    "two at once": flux(**SIZE, batch=2),
    "lora, areas, noise mask": everything(),
    "merged tokens": insert(flux(**SIZE), "merged", "TomePatchModel", ratio=0.6),
}


def test_two_ranks_give_the_picture_of_one(serve):
    pictures, plans = [], []
    for name, prompt in CASES.items():
        pictures.append(serve(1).pictures(prompt))
        assert pictures[-1].std() > 5, f"{name}: a flat picture proves nothing"
        assert furthest(serve(2).pictures(prompt), pictures[-1]) <= 1, name
        plans.append(serve(2).json("/taco_dit/status")["last_run"]["plan"])
    assert "cfg 2" in plans[0] and "cfg 2" in plans[1] and "cfg" not in plans[2], plans
    assert furthest(pictures[0][:1], pictures[2]) > 10, "merged tokens changed nothing"
