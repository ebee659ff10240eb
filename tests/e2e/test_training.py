"""Training in a prompt: the adapter is the same however many ranks there are, and every rank uses it."""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file

from tests.e2e.compare import furthest
from tests.e2e.workflows import Prompt, flux, node


def trained(seed: int) -> Prompt:
    """Train on an encoded picture, then make one with the trained model. Adam would turn rounding into whole steps."""
    prompt = flux(seed=seed, cfg=2.0)
    prompt["start"] = node("EmptyImage", width=72, height=104, batch_size=1, color=0x4080C0)
    prompt["encoded"] = node("VAEEncode", pixels=["start", 0], vae=["load", 2])
    prompt["train"] = node(
        "TrainLoraNode", model=["load", 0], latents=["encoded", 0], positive=["positive", 0], batch_size=1,
        grad_accumulation_steps=1, steps=4, learning_rate=1.0, rank=4, optimizer="SGD", loss_function="MSE",
        seed=seed, training_dtype="fp32", lora_dtype="fp32", algorithm="LoRA", gradient_checkpointing=True,
        existing_lora="[None]",
    )  # fmt: skip
    prompt["sample"]["inputs"]["model"] = ["train", 0]
    prompt["keep"] = node("SaveLoRANode", lora=["train", 1], prefix=f"loras/e2e_{seed}", steps=["train", 3])
    prompt["graph"] = node("LossGraphNode", loss=["train", 2], filename_prefix=f"graph_{seed}")
    return prompt


def test_one_rank_and_two_train_the_same_adapter(serve):
    plain = serve(1).pictures(flux(seed=601, cfg=2.0))
    pictures, adapters = [], []
    for ranks in (1, 2):
        server = serve(ranks)
        outcome = server.run(trained(601))
        assert outcome.error is None
        pictures.append(server.pictures(flux_again(trained(601))))
        folder = os.path.join(server.record_folder, "output", "loras")
        (file,) = [name for name in os.listdir(folder) if name.startswith("e2e_601_4_steps_")]
        adapters.append(load_file(os.path.join(folder, file)))
    one, two = adapters
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-3)
    assert furthest(*pictures) <= 1
    assert furthest(plain, pictures[0]) > 5


def flux_again(prompt: Prompt) -> Prompt:
    """The same without what else it saves; its training comes from the cache."""
    return {name: entry for name, entry in prompt.items() if name not in ("keep", "graph")}
