"""Goldens 11 for UNets: files of real sizes with diffusers' names become the recorded layouts."""

from __future__ import annotations

import pytest

import comfy.model_detection
import comfy.supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.unet import keys

from . import golden

SIZES = {
    name: facts
    for name, facts in golden.load_json("11_detection/detection.json").get("full_size", {}).items()
    if "model_channels" in facts["config"]
}  # fmt: skip


@pytest.mark.parametrize("name", golden.cases(SIZES))
def test_diffusers_names_of_real_files(name: str) -> None:
    facts = SIZES[name]
    made = getattr(comfy.supported_models, facts["class"])(facts["config"])
    state_dict = UNetModel(**made.unet_config, device="meta").state_dict()
    named = keys.unet_to_diffusers(facts["config"])
    theirs = {their: state_dict[own] for their, own in named.items() if own in state_dict}
    back = comfy.model_detection.convert_diffusers_mmdit(theirs)
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in state_dict.items()}
