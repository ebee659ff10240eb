"""Initial noise, ancestral noise and Brownian noise (topics 02 and 03)."""

import pytest
import torch

import comfy.sample
from comfy.k_diffusion import sampling
from tests.goldens import golden

CASES = {case["name"]: case for case in golden.load_json("03_noise/index.json").get("cases", [])}
SAMPLERS = golden.load_json("02_samplers/index.json")


@pytest.mark.parametrize("name", golden.cases(CASES))
def test_initial_noise(name):
    """Bit-identical, and the global generator is left where the reference leaves it."""
    case = CASES[name]
    tensors = golden.load_tensors("03_noise/tensors.safetensors")
    noise = comfy.sample.prepare_noise(torch.zeros(case["shape"]), int(case["seed"]), case["batch_inds"])
    assert torch.rand(1).item() == case["global_rng_next_float"]
    golden.check("03 noise", name, noise, tensors[name], 0.0)


def test_step_noise():
    """The default noise sampler repeats the initial noise in its first draw."""
    tensors = golden.load_tensors("02_samplers/tensors.safetensors")
    draws = sorted(name for name in tensors if name.startswith("default_noise_sampler/"))
    draw = sampling.default_noise_sampler(torch.zeros(SAMPLERS["shape"]), seed=SAMPLERS["seed"])
    assert draws
    for name in draws:
        golden.check("03 noise", name, draw(1.0, 0.5), tensors[name], 0.0)


def test_brownian_noise():
    """Increments of the tree, over pairs of sigmas."""
    tensors = golden.load_tensors("02_samplers/tensors.safetensors")
    facts = SAMPLERS["noise_facts"]["brownian"]
    tree = sampling.BrownianTreeNoiseSampler(
        torch.zeros(SAMPLERS["shape"]), facts["sigma_min"], facts["sigma_max"], seed=facts["seed"], cpu=True
    )
    for i, pair in enumerate(facts["pairs"]):
        golden.check("03 noise", f"brownian/draw{i}", tree(*map(torch.tensor, pair)), tensors[f"brownian/draw{i}"], 0.0)
