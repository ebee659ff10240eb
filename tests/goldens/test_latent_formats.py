"""Latent formats against the recorded numbers (topic 07)."""

import pytest
import torch

import comfy.latent_formats
from tests.goldens import golden

FORMATS = golden.load_json("07_vae/latent_formats.json")


@pytest.mark.parametrize("name", golden.cases(FORMATS))
def test_latent_format(name):
    """All numbers exactly, and both directions on an example."""
    spec = FORMATS[name]
    tensors = golden.load_tensors("07_vae/tensors.safetensors")
    latent_format = getattr(comfy.latent_formats, name)()
    for field in ("latent_channels", "latent_dimensions", "scale_factor", "shift_factor", "taesd_decoder_name",
                  "latent_rgb_factors", "latent_rgb_factors_bias"):  # fmt: skip
        assert getattr(latent_format, field) == spec[field], field
    for field in ("latents_mean", "latents_std"):
        if field in spec:
            assert torch.equal(getattr(latent_format, field).flatten(), torch.tensor(spec[field]))
    example = tensors[spec["in"]]
    golden.check("07 latent formats", f"{name} in", latent_format.process_in(example), tensors[spec["process_in"]], 0)
    golden.check(
        "07 latent formats", f"{name} out", latent_format.process_out(example), tensors[spec["process_out"]], 0
    )
