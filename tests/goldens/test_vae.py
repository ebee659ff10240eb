"""Goldens 07: the image VAE."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.vae import VAE

from . import golden

TOPIC = "07 VAE"


def check(case: str, got: torch.Tensor, want: torch.Tensor) -> None:
    golden.check(TOPIC, case, got, want, 1e-4)


@pytest.fixture(scope="module")
def recorded():
    """(index, tensors) of the topic."""
    return golden.load_json("07_vae/index.json"), golden.load_tensors("07_vae/tensors.safetensors")


@pytest.fixture(scope="module")
def quantised(recorded):
    """The VAE with quantisation convolutions, as a workflow has it."""
    index, _ = recorded
    model = index["models"]["image_vae_quant"]
    return VAE(sd=golden.make_weights(model["recipe"], index["set_seed"]))


@pytest.mark.parametrize("case", ["exact", "cropped"])
def test_encode_and_back(recorded, quantised, case):
    index, tensors = recorded
    names = index["models"]["image_vae_quant"]["cases"][case]
    latent = quantised.encode(tensors[names["pixels_bhwc"]])
    check(f"{case} encode", latent, tensors[names["encode"]])
    check(f"{case} decode", quantised.decode(latent), tensors[names["decode_of_encode_bhwc"]])


def test_decode_whole_and_in_tiles(recorded, quantised):
    index, tensors = recorded
    names = index["models"]["image_vae_quant"]["cases"]["latent"]
    latent = tensors[names["latent"]]
    check("decode", quantised.decode(latent), tensors[names["decode_bhwc"]])
    tiled = names["tiled"]
    got = quantised.decode_tiled(latent, tile_x=tiled["tile_x"], tile_y=tiled["tile_y"], overlap=tiled["overlap"])
    check("decode tiled", got, tensors[tiled["decode_tiled_bhwc"]])
    tiled = names["tiled_encode"]
    pixels = tensors[tiled["pixels"]]
    got = quantised.encode_tiled(pixels, tile_x=tiled["tile_x"], tile_y=tiled["tile_y"], overlap=tiled["overlap"])
    check("encode tiled", got, tensors[tiled["encode_tiled"]])


def test_sixteen_channel_network(recorded):
    index, tensors = recorded
    model = index["models"]["image_vae_16ch"]
    network = AutoencoderKL(model["ddconfig"])
    network.load_state_dict(golden.make_weights(model["recipe"], index["set_seed"]))
    with torch.no_grad():
        check(
            "16 channels encode",
            network.encode(tensors[model["cases"]["encode"]["in"]]),
            tensors[model["cases"]["encode"]["out"]],
        )
        check(
            "16 channels decode",
            network.decode(tensors[model["cases"]["decode"]["in"]]),
            tensors[model["cases"]["decode"]["out"]],
        )
