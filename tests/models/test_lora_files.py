"""Adapter files: which weights their keys are for, in spellings of which no figures are recorded."""

import logging

import pytest
import torch

import comfy.lora
import comfy.lora_convert
from comfy.text_encoders.flux import FluxClipModel
from tests.text import tiny
from tests.tiny_families import TINY


def patches(sd, key_map):
    """{target: value} of a file as loader nodes read it."""
    return comfy.lora.load_lora(comfy.lora_convert.convert_lora(sd), key_map)


def pair(stem, rows, columns, down=".lora_down.weight", up=".lora_up.weight"):
    return {f"{stem}{down}": torch.ones(2, columns), f"{stem}{up}": torch.ones(rows, 2)}


@pytest.mark.parametrize("name", TINY)
def test_every_family_in_every_spelling(name, caplog):
    """kohya's, ComfyUI's own, PEFT's suffixes, and diffusers' names for the families that have other ones."""
    model = TINY[name].model()
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    name_of, module = TINY[name].linears()[0]
    rows, columns = module.out_features, module.in_features
    target = f"diffusion_model.{name_of}.weight"
    with caplog.at_level(logging.WARNING):
        for sd in (
            pair(f"lora_unet_{name_of.replace('.', '_')}", rows, columns),
            pair(f"diffusion_model.{name_of}", rows, columns),
            pair(f"diffusion_model.{name_of}", rows, columns, ".lora_A.weight", ".lora_B.weight"),
        ):
            assert list(patches(sd, key_map)) == [target]
        targets = TINY[name].targets or {}
        theirs = next((key for key, ours in targets.items() if ours == f"{name_of}.weight"), None)
        if theirs is not None:
            stem = theirs.removesuffix(".weight")
            assert list(patches(pair(f"transformer.{stem}", rows, columns), key_map)) == [target]
    assert caplog.records == []


def test_flux_processors(caplog):
    """USO's and XLabs' files: numbers of streams, and in single blocks the rows of the attention only."""
    model = TINY["flux"].model()
    sd = {}
    for stem, rows, columns in (
        ("double_blocks.0.processor.qkv_lora1", 216, 72), ("double_blocks.0.processor.proj_lora1", 72, 72),
        ("double_blocks.0.processor.qkv_lora2", 216, 72), ("double_blocks.0.processor.proj_lora2", 72, 72),
        ("single_blocks.1.processor.qkv_lora", 216, 72), ("single_blocks.1.processor.proj_lora", 72, 360),
    ):  # fmt: skip
        sd |= pair(stem, rows, columns, ".down.weight", ".up.weight")
    with caplog.at_level(logging.WARNING):
        found = patches(sd, comfy.lora.model_lora_keys_unet(model, {}))
    double, single = "diffusion_model.double_blocks.0.", "diffusion_model.single_blocks.1."
    assert set(found) == {
        f"{double}img_attn.qkv.weight", f"{double}img_attn.proj.weight", f"{double}txt_attn.qkv.weight",
        f"{double}txt_attn.proj.weight", f"{single}linear2.weight", (f"{single}linear1.weight", (0, 0, 216)),
    }  # fmt: skip
    assert caplog.records == []
    weight = torch.zeros(504, 72)
    adapter = found[f"{single}linear1.weight", (0, 0, 216)]
    got = comfy.lora.calculate_weight([(0.5, adapter, 1.0, (0, 0, 216), None)], weight, "linear1")
    assert got[:216].eq(1).all() and got[216:].eq(0).all()


def test_t5_of_flux_files():
    """Trainers number it second, as it is, or third, as in SD3."""
    configs = {"t5xxl": tiny.t5(), "clip_l": tiny.clip_l()}
    from comfy.text_encoders.configs import encoder_config

    options = {f"{name}_model_config": encoder_config(sd) for name, sd in configs.items()}
    key_map = comfy.lora.model_lora_keys_clip(FluxClipModel(device="meta", model_options=options), {})
    for stem in ("lora_te2_", "lora_te3_"):
        sd = pair(f"{stem}encoder_block_1_layer_0_SelfAttention_q", 64, 64)
        assert list(patches(sd, key_map)) == ["t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.weight"]
