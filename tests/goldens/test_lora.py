"""Goldens 09: adapter files of every kind, their targets, the weights they give, and the network's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import comfy.lora
import comfy.lora_convert
import comfy.model_management
from comfy import sdxl_clip
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders import flux, sd3_clip

from . import golden
from .models import INDEX as MODELS
from .models import arguments, model, parameters

TOPIC = "09 adapters"
INDEX = golden.load_json("09_lora/index.json")
CASES = {name: name.split("/")[0] for name in INDEX.get("cases", {})}
NETWORKS = {name: name for name in INDEX.get("key_maps", {}) if not name.endswith("_te")}


def adapter(file: str) -> dict[str, torch.Tensor]:
    """An adapter file as `LoraLoader` reads it."""
    recorded = golden.load_tensors(f"09_lora/{file}")
    return comfy.lora_convert.convert_lora({key: recorded[key] for key in recorded})


def _files(name: str, case: dict[str, Any]) -> list[tuple[str, float]]:
    if "stack" not in name:
        return [(case["file"], float(name.rpartition("strength")[2]))]
    words = case["file"].replace(" then ", " ").replace(" at ", " ").split()
    return [(f"lora_{CASES[name]}_{kind}.safetensors", float(s)) for kind, s in zip(words[::2], words[1::2])]


def patched(name: str) -> tuple[ModelPatcher, dict[str, torch.Tensor]]:
    """A patcher with the case's adapters, and the weights before."""
    built = model(CASES[name])
    patcher = ModelPatcher(built, torch.device("cpu"), torch.device("cpu"))
    before = {key: value.clone() for key, value in built.state_dict().items()}
    key_map = comfy.lora.model_lora_keys_unet(built, {})
    for file, strength in _files(name, INDEX["cases"][name]):
        patcher.add_patches(comfy.lora.load_lora(adapter(file), key_map, log_missing=False), strength)
    return patcher, before


@pytest.mark.parametrize("name", parameters(CASES))
def test_patches_and_weights(name: str) -> None:
    case = INDEX["cases"][name]
    recorded = golden.load_tensors("09_lora/tensors.safetensors")
    patcher, before = patched(name)
    assert sorted(patcher.patches) == sorted(case["patches"])
    for key, wanted in case["patches"].items():
        got = [(p[0], p[2], None if p[3] is None else list(p[3]), p[4] is not None) for p in patcher.patches[key]]
        assert sorted(got, key=str) == sorted(
            [(w["strength"], w["strength_model"], w["offset"], w["has_transform"]) for w in wanted], key=str
        )
    comfy.model_management.load_models_gpu([patcher])
    weights = patcher.model.state_dict()
    changed = {key for key in before if before[key].shape != weights[key].shape or not before[key].equal(weights[key])}
    assert changed == set(case["changed"])
    for key, facts in case["changed"].items():
        samples = weights[key].flatten()[:: facts["samples_every"]]
        golden.check(TOPIC, f"{name} weights", samples, recorded[facts["samples"]], 1e-5)
    _, family, forward = case["forward_case"].split(" ")[0].split("/")
    values = arguments(MODELS["families"][family]["cases"][forward])
    values.pop("sigma", None)
    if "in_x" in case["forward_case"]:
        values["x"] = recorded[case["forward_case"].split("= ")[1]]
    with torch.no_grad():
        out = patcher.model.diffusion_model(values.pop("x"), values.pop("t"), **values)
    golden.check(TOPIC, name, out, recorded[case["forward_out"]], 1e-4)
    patcher.detach()
    after = patcher.model.state_dict()
    assert all(before[key].equal(after[key]) for key in before), "unloading must restore every weight exactly"


@pytest.mark.parametrize("family", parameters(NETWORKS))
def test_every_adapter_key_is_understood(family: str) -> None:
    got = comfy.lora.model_lora_keys_unet(model(family), {})
    for key, target in INDEX["key_maps"][family].items():
        mine = got[key]
        if isinstance(target, str):
            assert mine == target, key
        else:
            assert mine[0] == target[0], key
            assert (None if mine[1] is None else list(mine[1])) == target[1], key
            assert (len(mine) > 2) == (len(target) > 2), key


def _text_encoders(name: str) -> torch.nn.Module:
    """The text encoders whose adapter keys were recorded, on the meta device."""
    kinds = {"sd3_te": sd3_clip.sd3_clip(), "sdxl_te": sdxl_clip.SDXLClipModel, "flux_te": flux.FluxClipModel}
    recorded = golden.load_json("05_text_encoders/index.json")["models"]
    configs = {**recorded["combined_flux"]["configs"], **recorded["combined_sdxl"]["configs"]}
    options = {f"{encoder}_model_config": config for encoder, config in configs.items()}
    return kinds[name](device="meta", dtype=torch.float32, model_options=options)


@pytest.mark.parametrize("name", golden.cases({n: None for n in INDEX.get("key_maps", {}) if n.endswith("_te")}))
def test_every_adapter_key_of_text_encoders_is_understood(name: str) -> None:
    got = comfy.lora.model_lora_keys_clip(_text_encoders(name), {})
    for key, target in INDEX["key_maps"][name].items():
        assert got.get(key) == target, key


@pytest.mark.skipif(not INDEX, reason="recorded figures not found: set TACO_GOLDENS")
def test_weights_stay_shared_until_patched() -> None:
    """Loading on the CPU must not copy weights that no patch changes: they are pages of a file."""
    patcher, _ = patched("flux_dev/kohya/strength1")
    unpatched = patcher.model.diffusion_model.txt_in.weight
    place = unpatched.data_ptr()
    comfy.model_management.load_models_gpu([patcher])
    assert patcher.model.diffusion_model.txt_in.weight.data_ptr() == place
