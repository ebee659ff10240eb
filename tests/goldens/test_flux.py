"""Goldens 06 and 11 for Flux: the network, the model around it, conditioning fields, and recognition by keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import comfy.model_detection
import comfy.supported_models
from comfy.families.flux import rotary_axes
from comfy.ldm.flux.model import Flux

from . import golden

TOPIC = "06 models"
FAMILIES = ("flux_dev", "flux_schnell", "flux_fill")
INDEX = golden.load_json("06_models/index.json")
CASES = [(family, case) for family in FAMILIES for case in INDEX.get("families", {}).get(family, {}).get("cases", {})]
DETECTION = golden.load_json("11_detection/detection.json")


def tensors() -> golden.Tensors:
    """The recorded tensors of the topic."""
    return golden.load_tensors("06_models/tensors.safetensors")


def network(family: str) -> Flux:
    """A family's recorded network."""
    facts = INDEX["families"][family]
    net = Flux(**facts["config"])
    net.load_state_dict(golden.make_weights(facts["recipe"], INDEX["set_seed"]))
    return net.eval().requires_grad_(False)


def model(family: str) -> Any:
    """A family's recorded network with its sampling type and latent format."""
    facts = INDEX["families"][family]
    config = getattr(comfy.supported_models, facts["model_config_class"])(dict(facts["config"]))
    config.set_inference_dtype(torch.float32, None)
    built = config.get_model({}, device=torch.device("cpu"))
    built.diffusion_model.load_state_dict(golden.make_weights(facts["recipe"], INDEX["set_seed"]))
    return built.eval().requires_grad_(False)


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a recorded call."""
    out = {name: tensors()[key] for name, key in case["inputs"].items()}
    references = [out.pop(name) for name in sorted(out) if name.startswith("ref_latents.")]
    if references:
        out["ref_latents"] = references
    return {**out, **case["literals"]}


@pytest.mark.parametrize("family,name", CASES)
def test_network_and_model(family: str, name: str) -> None:
    case = INDEX["families"][family]["cases"][name]
    values = arguments(case)
    sigma = values.pop("sigma", None)
    x, t = values.pop("x"), values.pop("t")
    with torch.no_grad():
        golden.check(TOPIC, f"{family}/{name}", network(family)(x, t, **values), tensors()[case["raw_out"]], 1e-4)
    if "apply_out" in case and sigma is not None:
        context, control = values.pop("context"), None
        with torch.no_grad():
            got = model(family).apply_model(
                x * case["apply_x_scale"], sigma, c_crossattn=context, control=control, **values
            )
        golden.check(TOPIC, f"{family}/{name}/apply", got, tensors()[case["apply_out"]], 1e-4)


EXTRA = golden.load_json("06_models/extra_conds.json")
EXTRA_CASES = [name for name in EXTRA.get("cases", EXTRA) if name.split("/")[0] in FAMILIES]


@pytest.mark.parametrize("name", EXTRA_CASES)
def test_conditioning_fields(name: str) -> None:
    recorded = golden.load_tensors("06_models/extra_conds.safetensors")
    case = EXTRA.get("cases", EXTRA)[name]
    fields: dict[str, Any] = {}
    for field, value in case["fields"].items():
        if "tensor" in value:
            fields[field] = recorded[value["tensor"]]
        elif "tensors" in value:
            fields[field] = [recorded[key] for key in value["tensors"]]
        else:
            fields[field] = value["value"]
    noise = torch.zeros(case["noise_shape"])
    got = model(name.split("/")[0]).extra_conds(noise=noise, device=torch.device("cpu"), **fields)
    assert sorted(got) == sorted(case["result"])
    for field, want in case["result"].items():
        assert type(got[field]).__name__ == want["kind"]
        keys = want.get("tensors") or [want["tensor"]]
        values = got[field].cond if isinstance(got[field].cond, list) else [got[field].cond]
        for value, key in zip(values, keys, strict=True):
            golden.check(TOPIC, f"extra_conds {name}", value, recorded[key], 1e-5)


SIZES = [name for name in DETECTION.get("full_size", {}) if name.startswith("flux")]


@pytest.mark.parametrize("name", SIZES)
def test_full_size_files_are_recognised(name: str) -> None:
    facts = DETECTION["full_size"][name]
    config = {key: value for key, value in facts["config"].items() if key != "image_model"}
    with torch.device("meta"):
        state_dict = Flux(**config).state_dict()
    assert len(state_dict) == facts["n_keys"]
    assert sum(t.numel() for t in state_dict.values()) == facts["n_numbers"]
    if "layout" in facts:
        assert {key: list(t.shape) for key, t in state_dict.items()} == facts["layout"]
    for prefix in ("", "model.diffusion_model."):
        prefixed = {prefix + key: value for key, value in state_dict.items()}
        assert comfy.model_detection.detect_unet_config(prefixed, prefix) == facts["config"]
        found = comfy.model_detection.model_config_from_unet(prefixed, prefix)
        assert type(found).__name__ == facts["class"]


MINIMAL = [name for name in DETECTION.get("minimal", {}) if name.startswith("flux")]


@pytest.mark.parametrize("name", MINIMAL)
def test_minimal_key_sets(name: str) -> None:
    facts = DETECTION["minimal"][name]
    keys = {key: torch.empty(shape, device="meta") for key, shape in facts["keys"].items()}
    assert comfy.model_detection.detect_unet_config(keys, "") == facts["config"]
    assert type(comfy.model_detection.model_config_from_unet(keys, "")).__name__ == facts["class"]


@pytest.mark.parametrize("name", sorted(DETECTION.get("prefix_choice", {})))
def test_prefix(name: str) -> None:
    facts = DETECTION["prefix_choice"][name]
    assert comfy.model_detection.unet_prefix_from_state_dict(dict.fromkeys(facts["keys"])) == facts["prefix"]


@pytest.mark.parametrize("head,axes", [(128, [16, 56, 56]), (24, [4, 10, 10]), (64, [8, 28, 28]), (16, [4, 6, 6])])
def test_rotary_axes_follow_the_usual_proportion(head: int, axes: list[int]) -> None:
    assert rotary_axes(head) == axes


def test_rotary_axes_of_impossible_head_size() -> None:
    with pytest.raises(ValueError, match="head size of 5"):
        rotary_axes(5)
