"""Tiny autoencoders against the recorded figures (topic 07)."""

import pytest

from comfy.taesd.taesd import TAESD
from tests.goldens import golden

DATA = golden.load_json("07_vae/index.json")
MODELS = {name: spec for name, spec in DATA.get("models", {}).items() if name.startswith("taesd")}


@pytest.mark.parametrize("name", golden.cases(MODELS))
def test_taesd(name):
    """Encoding and decoding."""
    spec = MODELS[name]
    tensors = golden.load_tensors("07_vae/tensors.safetensors")
    network = TAESD(latent_channels=spec["latent_channels"])
    weights = golden.make_weights(spec["recipe"], DATA["set_seed"])
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert set(missing) <= {"vae_scale", "vae_shift"} and not unexpected
    for direction in ("encode", "decode"):
        case = spec["cases"][direction]
        out = getattr(network, direction)(tensors[case["in"]])
        golden.check("07 VAE", f"{name} {direction}", out, tensors[case["out"]], 1e-4)
