"""Goldens 07: the video VAEs."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm.hunyuan_video import vae as hunyuan
from comfy.ldm.wan import vae as wan

from . import golden

TOPIC = "07 VAE"
INDEX = golden.load_json("07_vae/index.json")


def recorded(name: str):
    """(index entry, tensors, weights) of a recorded VAE."""
    tensors = golden.load_tensors("07_vae/tensors.safetensors")
    facts = INDEX["models"][name]
    return facts, tensors, golden.make_weights(facts["recipe"], INDEX["set_seed"])


@pytest.mark.parametrize("case", ["image", "video", "latent"])
def test_wan21(case: str) -> None:
    facts, tensors, weights = recorded("video_vae_wan21")
    network = wan.WanVAE(**facts["config"])
    network.load_state_dict(weights)
    names = facts["cases"][case]
    with torch.no_grad():
        latent = tensors[names["in"]]
        if "encode" in names:
            latent = network.encode(latent)
            golden.check(TOPIC, f"wan21 {case} encode", latent, tensors[names["encode"]], 1e-4)
        decoded = network.decode(latent)
    golden.check(
        TOPIC, f"wan21 {case} decode", decoded, tensors[names.get("decode") or names["decode_of_encode"]], 1e-4
    )


@pytest.mark.parametrize("case", ["encode", "decode"])
def test_hunyuan_video(case: str) -> None:
    facts, tensors, weights = recorded("video_vae_hunyuan")
    network = hunyuan.HunyuanVideoVAE(facts["ddconfig"], facts["embed_dim"])
    network.load_state_dict(weights)
    names = facts["cases"][case]
    with torch.no_grad():
        got = getattr(network, case)(tensors[names["in"]])
    golden.check(TOPIC, f"hunyuan {case}", got, tensors[names["out"]], 1e-4)
