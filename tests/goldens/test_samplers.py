"""Every sampler on a closed-form denoiser against the recorded runs (topic 02)."""

import pytest
import torch

import comfy.samplers
from tests.goldens import golden
from tests.goldens.standins import ClosedFormModel, text

TOPIC = "02 samplers"
TOLERANCE = 5e-5
DATA = golden.load_json("02_samplers/index.json")
RUNS = DATA.get("runs", {})


def run_case(tag, model=None):
    """(final latent, model, callback records) of a recorded run."""
    spec = RUNS[tag]
    tensors = golden.load_tensors("02_samplers/tensors.safetensors")
    model = ClosedFormModel(spec["kind"]) if model is None else model
    patcher = model.patcher()
    noise = tensors["noise"]
    latent = torch.zeros_like(noise) if spec["latent"] == "zeros" else tensors[spec["latent"]]
    mask = tensors["noise_mask"] if spec["noise_mask"] else None
    steps = []
    sampler = comfy.samplers.KSampler(
        patcher, spec["steps"], torch.device("cpu"), spec["sampler"], spec["scheduler"], spec["denoise"],
        model_options=patcher.model_options,
    )  # fmt: skip
    out = sampler.sample(
        noise, [[text(DATA["m_positive"]), {}]], [[text(DATA["m_negative"]), {}]], spec["cfg"], latent_image=latent,
        start_step=spec["start_step"], last_step=spec["last_step"], force_full_denoise=spec["force_full_denoise"],
        denoise_mask=mask, callback=lambda *args: steps.append(args), disable_pbar=True, seed=DATA["seed"],
    )  # fmt: skip
    return out, model, steps


@pytest.mark.parametrize("tag", golden.cases(RUNS))
def test_sampler(tag):
    """The final latent, the sigma of every model call, and what the callback saw."""
    spec = RUNS[tag]
    tensors = golden.load_tensors("02_samplers/tensors.safetensors")
    out, model, steps = run_case(tag)
    golden.check(TOPIC, tag, out, tensors[f"{tag}/out"], TOLERANCE)
    assert model.calls == pytest.approx(spec["model_call_sigmas"], rel=TOLERANCE)
    assert [step[0] for step in steps] == spec["callback_steps"]
    for i, denoised, x, _total in steps:
        for name, tensor in (("x", x), ("denoised", denoised)):
            key = f"{tag}/step{i:02d}_{name}"
            if key in tensors:
                golden.check(TOPIC, tag, tensor, tensors[key], TOLERANCE)


def test_recorded_names_are_all_there():
    """Nothing recorded is missing from the list that nodes offer."""
    golden.require()
    assert {spec["sampler"] for spec in RUNS.values()} == set(comfy.samplers.SAMPLER_NAMES)


def test_functions_added_by_custom_nodes(monkeypatch):
    """A function put into comfy.k_diffusion.sampling is found when it is used."""
    monkeypatch.setattr(comfy.samplers.k_diffusion_sampling, "sample_mine", lambda model, x, sigmas, **_: x, False)
    assert comfy.samplers.sampler_object("mine").sampler_function.__name__ == "<lambda>"
    with pytest.raises(ValueError, match="no sampler 'nothing'"):
        comfy.samplers.sampler_object("nothing")
