"""Goldens 08: whole sampling runs through the sampler nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nodes
from comfy.taco_dit import TACODiTModelPatcher
from comfy_extras import nodes_custom_sampler, nodes_model_advanced
from comfy_nodes.sampler_choice import KSamplerSelect

from . import golden
from .models import model, parameters

TOPIC = "08 sampler node"
INDEX = golden.load_json("08_ksampler/index.json")
RUNS = INDEX.get("runs", {})
NODE_RUNS = {name: run["family"] for name, run in RUNS.items() if "scheduler" in run}
GUIDER_RUNS = {name: run["family"] for name, run in RUNS.items() if "sigmas" in run}


def recorded(name: str) -> torch.Tensor:
    """A tensor of the topic."""
    return tensors()[name]


def tensors() -> golden.Tensors:
    """All tensors of the topic."""
    return golden.load_tensors("08_ksampler/tensors.safetensors")


def conditioning(family: str, sign: str, pooled: str | None = None, **fields: Any) -> list[Any]:
    """[[context, {"pooled_output": vector}]] of the family, without the vector where it has none."""
    vector = f"{family}/{pooled or sign}_pooled"
    told = {"pooled_output": recorded(vector)} if vector in tensors() else {}
    return [[recorded(f"{family}/{sign}_context"), {**told, **fields}]]


def patcher(family: str) -> TACODiTModelPatcher:
    """The family's model as loaders give it."""
    return TACODiTModelPatcher(model(family), torch.device("cpu"), torch.device("cpu"))


def latent_of(run: dict[str, Any]) -> dict[str, Any]:
    """The LATENT that a run starts from."""
    family = run["family"]
    shape = list(INDEX["families"][family]["shape"])
    if run["latent"] == "latent":
        out: dict[str, Any] = {"samples": recorded(f"{family}/latent")}
    else:
        if "4 channels" in run["latent"]:
            shape[1] = 4
        out = {"samples": torch.zeros(shape)}
    if "noise_mask" in run:
        out["noise_mask"] = recorded(f"{family}/noise_mask")
    if "batch_index" in run:
        out["batch_index"] = run["batch_index"]
    return out


def through_node(name: str, run: dict[str, Any], used: TACODiTModelPatcher) -> Any:
    """The model after the node that the run's name tells."""
    nodes_of = nodes_model_advanced
    if "small_shift" in name:
        height, width = (8 * size for size in INDEX["families"][run["family"]]["shape"][2:])
        return nodes_of.ModelSamplingFlux().patch(used, 1.15, 0.5, width, height)[0]
    if "node_shift" in name:
        return nodes_of.ModelSamplingSD3().patch(used, float(name.rpartition("shift")[2]))[0]
    if "v_prediction_zsnr" in name:
        return nodes_of.ModelSamplingDiscrete().patch(used, "v_prediction", True)[0]
    if "rescale_cfg" in name:
        return nodes_of.RescaleCFG().patch(used, 0.7)[0]
    return used


@pytest.mark.parametrize("name", parameters(NODE_RUNS))
def test_sampler_node(name: str) -> None:
    run, family = RUNS[name], NODE_RUNS[name]
    fields = dict(run.get("positive_size_fields", {}))
    if "guidance_" in name:
        fields["guidance"] = float(name.rpartition("_")[2])
    if "reference" in name:
        fields["reference_latents"] = [recorded(f"{family}/reference_latent_input")]
    used = through_node(name, run, patcher(family))
    with torch.inference_mode():
        (out,) = nodes.common_ksampler(
            used, INDEX["seed"], run["steps"], run["cfg"], run["sampler"], run["scheduler"],
            conditioning(family, "pos", **fields), conditioning(family, "neg"), latent_of(run),
            denoise=run.get("denoise", 1.0), disable_noise=run.get("disable_noise", False),
            start_step=run.get("start_step"), last_step=run.get("last_step"),
            force_full_denoise=run.get("force_full_denoise", False),
        )  # fmt: skip
    golden.check(TOPIC, name, out["samples"], recorded(run["out"]), 2e-3 if "zsnr" in name else 3e-4)


@pytest.mark.parametrize("name", parameters(GUIDER_RUNS))
def test_custom_sampling(name: str) -> None:
    run, family, kind = RUNS[name], GUIDER_RUNS[name], name.partition("/")[2]
    used, positive, negative = patcher(family), conditioning(family, "pos"), conditioning(family, "neg")
    if kind == "custom_basic_guider":
        (guider,) = nodes_custom_sampler.BasicGuider().get_guider(used, positive)
    elif kind == "custom_cfg_guider":
        (guider,) = nodes_custom_sampler.CFGGuider().get_guider(used, positive, negative, run["cfg"])
    else:
        (guider,) = nodes_custom_sampler.DualCFGGuider().get_guider(
            used, positive, conditioning(family, "mid", "pos"), negative, run["cfg_conds"], run["cfg_cond2_negative"],
            kind.removeprefix("dual_cfg_"),
        )  # fmt: skip
    (noise,) = nodes_custom_sampler.RandomNoise().get_noise(INDEX["seed"])
    (sampler,) = KSamplerSelect().get_sampler(run.get("sampler", "euler"))
    with torch.inference_mode():
        out, denoised = nodes_custom_sampler.SamplerCustomAdvanced().sample(
            noise, guider, sampler, torch.tensor(run["sigmas"]), latent_of(run)
        )
    golden.check(TOPIC, name, out["samples"], recorded(name), 3e-4)
    if f"{name}_denoised" in tensors():
        golden.check(TOPIC, name + " denoised", denoised["samples"], recorded(f"{name}_denoised"), 3e-4)


@pytest.mark.parametrize("name", parameters({n: f for n, f in GUIDER_RUNS.items() if n.endswith("basic_guider")}))
def test_noise_adding_node(name: str) -> None:
    family = GUIDER_RUNS[name]
    (noise,) = nodes_custom_sampler.RandomNoise().get_noise(INDEX["seed"])
    (out,) = nodes_custom_sampler.AddNoise().add_noise(
        patcher(family), noise, torch.tensor(RUNS[name]["sigmas"]), {"samples": recorded(f"{family}/latent")}
    )
    golden.check(TOPIC, f"{family}/add_noise_node", out["samples"], recorded(f"{family}/add_noise_node"), 3e-4)
