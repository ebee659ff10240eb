"""Goldens 07: the video VAEs."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm.hunyuan_video import vae as hunyuan
from comfy.ldm.wan import vae as wan
from comfy.vae import VAE

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


@pytest.mark.parametrize(("name", "time", "cell"), [("video_vae_wan21", 4, 8), ("video_vae_hunyuan", 4, 8)])
def test_vae_object(name: str, time: int, cell: int) -> None:
    """Files are recognised; frames are a batch; odd sizes are cut; tiles of space and time give the whole."""
    _, _, weights = recorded(name)
    vae = VAE(sd=weights)
    assert vae.latent_channels == 16 and vae.latent_dim == 3 and not vae.not_video
    assert vae.temporal_compression_decode() == time and vae.spacial_compression_decode() == cell
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand((10, 5 * cell + 3, 4 * cell, 3), generator=generator)
    latent = vae.encode(frames)
    assert latent.shape == (1, 16, 3, 5, 4)
    assert torch.equal(latent, vae.encode(frames[:9, 1:-2]))
    video = vae.decode(latent)
    assert video.shape == (1, 9, 5 * cell, 4 * cell, 3) and video.min() >= 0 and video.max() <= 1
    one = vae.decode_tiled(latent, tile_x=4, tile_y=5, overlap=2, tile_t=3, overlap_t=1)
    golden.check(TOPIC, f"{name} one tile", one, video, 1e-5)
    tiled = vae.decode_tiled(latent, tile_x=4, tile_y=4, overlap=2, tile_t=2, overlap_t=1)
    assert tiled.shape == video.shape and tiled.min() >= 0 and tiled.max() <= 1
    # the first frames of the first tile are seen by no other tile
    golden.check(
        TOPIC, f"{name} frames", tiled[:, :1, : 2 * cell], vae.decode(latent[:, :, :2, :4])[:, :1, : 2 * cell], 1e-4
    )
    assert vae.encode_tiled(frames, tile_x=32, tile_y=32, overlap=8, tile_t=5, overlap_t=1).shape == latent.shape
    with pytest.raises(ValueError, match="videos with 16 channels"):
        vae.decode(latent[:, :4])


def test_wan22_vae_takes_and_gives_videos() -> None:
    network = wan.WanVAE(dim=8, decoder_dim=12, z_dim=6, residual=True, temperal_downsample=(False, True, True))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5
    pixels = torch.rand((1, 3, 9, 48, 32), generator=generator) * 2 - 1
    with torch.no_grad():
        latent = network.encode(pixels)
        assert latent.shape == (1, 6, 3, 3, 2)
        assert network.decode(latent).shape == pixels.shape
        # what comes later changes nothing before it
        golden.check(TOPIC, "wan22 causal", network.encode(pixels[:, :, :5]), latent[:, :, :2], 1e-4)
        golden.check(TOPIC, "wan22 causal", network.decode(latent[:, :, :2]), network.decode(latent)[:, :, :5], 1e-4)
    found = wan.config_from_state_dict(network.state_dict())
    assert found == {
        "dim": 8, "decoder_dim": 12, "z_dim": 6, "image_channels": 3, "conv_out_channels": 3, "residual": True,
    }  # fmt: skip
