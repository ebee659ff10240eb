"""Goldens 08 for Flux: whole sampling runs through the sampler nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nodes
from comfy.taco_dit import TACODiTModelPatcher
from comfy_extras import nodes_custom_sampler, nodes_model_advanced
from comfy_nodes.sampler_choice import KSamplerSelect

from . import golden
from .test_flux import model

TOPIC = "08 sampler node"
INDEX = golden.load_json("08_ksampler/index.json")
RUNS = {name: run for name, run in INDEX.get("runs", {}).items() if run.get("family") == "flux_dev"}
NODE_RUNS = [name for name, run in RUNS.items() if "scheduler" in run]
GUIDER_RUNS = [name for name, run in RUNS.items() if "sigmas" in run]


def recorded(name: str) -> torch.Tensor:
    """A tensor of the topic."""
    return golden.load_tensors("08_ksampler/tensors.safetensors")[name]


def conditioning(sign: str, pooled: str | None = None, **more: Any) -> list[Any]:
    """[[context, {"pooled_output": vector}]] of the family."""
    pooled = pooled or sign
    return [[recorded(f"flux_dev/{sign}_context"), {"pooled_output": recorded(f"flux_dev/{pooled}_pooled"), **more}]]


def patcher() -> TACODiTModelPatcher:
    """The family's model as loaders give it."""
    return TACODiTModelPatcher(model("flux_dev"), torch.device("cpu"), torch.device("cpu"))


def latent_of(run: dict[str, Any]) -> dict[str, Any]:
    """The LATENT that a run starts from."""
    shape = list(INDEX["families"]["flux_dev"]["shape"])
    if run["latent"] == "latent":
        out: dict[str, Any] = {"samples": recorded("flux_dev/latent")}
    else:
        if "4 channels" in run["latent"]:
            shape[1] = 4
        out = {"samples": torch.zeros(shape)}
    if "noise_mask" in run:
        out["noise_mask"] = recorded("flux_dev/noise_mask")
    if "batch_index" in run:
        out["batch_index"] = run["batch_index"]
    return out


@pytest.mark.parametrize("name", NODE_RUNS)
def test_sampler_node(name: str) -> None:
    run = RUNS[name]
    used, positive, negative = patcher(), conditioning("pos"), conditioning("neg")
    if "guidance" in name:
        positive = conditioning("pos", guidance=float(name.rpartition("_")[2]))
    if "reference" in name:
        positive = conditioning("pos", reference_latents=[recorded("flux_dev/reference_latent_input")])
    if "small_shift" in name:
        height, width = (8 * size for size in INDEX["families"]["flux_dev"]["shape"][2:])
        (used,) = nodes_model_advanced.ModelSamplingFlux().patch(used, 1.15, 0.5, width, height)
    with torch.inference_mode():
        (out,) = nodes.common_ksampler(
            used, INDEX["seed"], run["steps"], run["cfg"], run["sampler"], run["scheduler"], positive, negative,
            latent_of(run), denoise=run.get("denoise", 1.0), disable_noise=run.get("disable_noise", False),
            start_step=run.get("start_step"), last_step=run.get("last_step"),
            force_full_denoise=run.get("force_full_denoise", False),
        )  # fmt: skip
    golden.check(TOPIC, name, out["samples"], recorded(run["out"]), 3e-4)


@pytest.mark.parametrize("name", GUIDER_RUNS)
def test_custom_sampling(name: str) -> None:
    run, kind = RUNS[name], name.partition("/")[2]
    used, positive, negative = patcher(), conditioning("pos"), conditioning("neg")
    if kind == "custom_basic_guider":
        (guider,) = nodes_custom_sampler.BasicGuider().get_guider(used, positive)
    elif kind == "custom_cfg_guider":
        (guider,) = nodes_custom_sampler.CFGGuider().get_guider(used, positive, negative, run["cfg"])
    else:
        (guider,) = nodes_custom_sampler.DualCFGGuider().get_guider(
            used, positive, conditioning("mid", "pos"), negative, run["cfg_conds"], run["cfg_cond2_negative"],
            kind.removeprefix("dual_cfg_"),
        )  # fmt: skip
    (noise,) = nodes_custom_sampler.RandomNoise().get_noise(INDEX["seed"])
    (sampler,) = KSamplerSelect().get_sampler(run.get("sampler", "euler"))
    with torch.inference_mode():
        out, denoised = nodes_custom_sampler.SamplerCustomAdvanced().sample(
            noise, guider, sampler, torch.tensor(run["sigmas"]), latent_of(run)
        )
    golden.check(TOPIC, name, out["samples"], recorded(f"flux_dev/{kind}"), 3e-4)
    stored = golden.load_tensors("08_ksampler/tensors.safetensors")
    if f"flux_dev/{kind}_denoised" in stored:
        golden.check(TOPIC, name + " denoised", denoised["samples"], recorded(f"flux_dev/{kind}_denoised"), 3e-4)
