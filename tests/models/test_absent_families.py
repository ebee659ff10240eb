"""A file of a family that is known and not here is named with its family, by its keys; families that are here are not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import comfy.families
from comfy import absent_families, model_detection, sd
from tests.tiny_families import TINY
from tests.tiny_models import write_flux


def file_of(family, prefix=""):
    """Weights with a family's keys, the first of the right number of rows."""
    rows = [family.rows or 4, *[4] * (len(family.keys) - 1)]
    return {prefix + key: torch.zeros(count, 2) for key, count in zip(family.keys, rows, strict=True)}


def absent():
    here = {name for family in comfy.families.records() for name in family.configurations}
    return [family for family in absent_families._FAMILIES if family.configuration not in here]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_each_is_named(prefix):
    for family in absent():
        padding = {f"{prefix}more.{i}.weight": torch.zeros(1) for i in range(6)}
        assert model_detection.name_absent_family(file_of(family, prefix) | padding) == family.name


def test_loaders_name_it(tmp_path):
    (family,) = [family for family in absent() if family.configuration == "Krea2"] or absent()[:1]
    path = str(tmp_path / "file.safetensors")
    save_file(file_of(family), path)
    for load in (sd.load_diffusion_model, sd.load_checkpoint_guess_config):
        with pytest.raises(RuntimeError, match=f"is a model of {family.name}, which is not in this version; this version runs"):
            load(path)


def test_a_lora_in_the_wrong_place_is_told(tmp_path):
    path = str(tmp_path / "lora.safetensors")
    save_file({"blocks.0.lora_A.weight": torch.zeros(2, 2), "blocks.0.lora_B.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(RuntimeError, match="looks like a LoRA; load it with Load LoRA"):
        sd.load_diffusion_model(path)


def test_families_that_are_here_are_not_absent():
    for name, tiny in TINY.items():
        for prefix in ("", "model.diffusion_model."):
            weights = {prefix + key: torch.empty(shape, device="meta") for key, shape in tiny.shapes().items()}
            assert model_detection.name_absent_family(weights) is None, name


def test_the_header_of_a_file_is_enough_to_know_its_family(tmp_path):
    write_flux(str(tmp_path))
    path = str(tmp_path / "checkpoints" / "tiny_flux_dev.safetensors")
    weights, _ = model_detection.shapes_of_file(path)
    assert all(weight.is_meta for weight in weights.values())
    prefix = model_detection.unet_prefix_from_state_dict(weights)
    assert type(model_detection.detected(weights, prefix)).__name__ == "Flux"
    (tmp_path / "not.safetensors").write_bytes(b"12345678" * 4)
    with pytest.raises(ValueError, match="safetensors"):
        model_detection.shapes_of_file(str(tmp_path / "not.safetensors"))
