"""Tiny files of every family: with diffusers' names, in other dtypes, whole, and their text encoders."""

from __future__ import annotations

import pytest
import torch

import comfy.model_detection
import comfy.sd
import comfy.utils
from comfy.families import auraflow, chroma, pixart, sd3
from comfy.text_encoders.loader import CLIPType, load_text_encoder_state_dicts
from tests import tiny_models
from tests.tiny_families import TINY, checkpoint, files

TARGETED = [name for name, tiny in TINY.items() if tiny.targets is not None]
WHOLE = ["sd3", "pixart_alpha", "chroma"]


@pytest.mark.parametrize("name", TARGETED)
def test_files_with_diffusers_names(name):
    """They become the weights that our names would have given, and are of the same family."""
    weights = files(name)[f"diffusion_models/tiny_{name}.safetensors"]()
    theirs = files(name)[f"diffusion_models/tiny_{name}_diffusers.safetensors"]()
    assert not weights.keys() & theirs.keys() - {"register_tokens", "context_embedder.weight", "context_embedder.bias"}
    model = comfy.sd.load_diffusion_model_state_dict(theirs).model
    assert type(model.model_config).__name__ == TINY[name].configuration
    for key, value in model.diffusion_model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_pixart_files_without_what_only_training_needs():
    theirs = files("pixart_sigma")["diffusion_models/tiny_pixart_sigma_diffusers.safetensors"]()
    del theirs["caption_projection.y_embedding"]
    model = comfy.sd.load_diffusion_model_state_dict(theirs).model
    assert model.diffusion_model.y_embedder.y_embedding.shape == (300, tiny_models.T5_WIDTH)


def test_chroma_with_diffusers_names():
    """Its small network has names of its own; Flux, whose blocks it has, does not take it."""
    from comfy.ldm.flux.keys import diffusers_key_map

    weights = tiny_models.random_weights(TINY["chroma"].shapes(), 3)
    config = {"hidden_size": 72, "depth": 1, "depth_single_blocks": 2, "mlp_ratio": 4.0}
    theirs = tiny_models.renamed(weights, diffusers_key_map(config))
    names = (("in_layer", "linear_1"), ("out_layer", "linear_2"), (".scale", ".weight"))
    for key, value in weights.items():
        if key.startswith("distilled_guidance_layer."):
            for ours, other in names:
                key = key.replace(ours, other)
            theirs[key] = value
    assert comfy.model_detection.convert_diffusers_mmdit(dict(theirs)).keys() == weights.keys()
    assert chroma.from_diffusers({"x_embedder.weight": torch.zeros(1)}) is None


def test_a_diffusers_file_that_lacks_a_part_is_said():
    theirs = files("sd3")["diffusion_models/tiny_sd3_diffusers.safetensors"]()
    del theirs["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(ValueError, match=r"x_block.attn.qkv.weight is made of 3 tensors .* has 2; it is incomplete"):
        sd3.from_diffusers(theirs)


def test_names_as_utilities():
    assert comfy.utils.mmdit_to_diffusers({"depth": 2}, "x.") == {
        key: f"x.{target}" if isinstance(target, str) else (f"x.{target[0]}", *target[1:])
        for key, target in sd3.diffusers_targets(2).items()
    }
    assert len(comfy.utils.mmdit_to_diffusers({"depth": 24, "num_blocks": 1})) < 100
    assert len(comfy.utils.pixart_to_diffusers({"depth": 2})) == len(pixart.diffusers_targets(2, 1152))
    told = {"n_double_layers": 1, "n_layers": 3}
    assert comfy.utils.auraflow_to_diffusers(told) == auraflow.diffusers_targets(1, 3)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_checkpoints(name):
    """Model, text encoders and VAE; the prompt's features have the width that the network wants."""
    model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(checkpoint(name))
    assert type(model.model.model_config).__name__ == TINY[name].configuration
    assert vae.latent_channels == TINY[name].channels
    out = clip.encode_from_tokens_scheduled(clip.tokenize("a red fox"))
    assert out[0][0].shape[2] == TINY[name].text[1]
    if name == "sd3":
        assert out[0][1]["pooled_output"].shape == (1, 2 * tiny_models.CLIP_WIDTH)
    else:
        assert out[0][0].shape[1] < 20, "these prompts are not padded"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", TINY)
def test_files_in_other_dtypes(name, dtype):
    """They load, and give about what fp32 gives."""
    tiny = TINY[name]
    weights = tiny_models.random_weights(tiny.shapes(), 1)
    stored = {key: value.to(dtype) for key, value in weights.items()}
    x = torch.randn(tiny.latent(1, 9, 13).shape, generator=torch.Generator().manual_seed(2))
    outs = []
    for sd in (weights, stored):
        model = comfy.sd.load_diffusion_model_state_dict(sd, metadata=tiny.metadata).model
        text, fields = tiny.conditioning(1)[0]
        conds = model.extra_conds(cross_attn=text, noise=x, device=x.device, **fields)
        values = {key: cond.cond for key, cond in conds.items()}
        with torch.inference_mode():
            outs.append(model.apply_model(x, torch.tensor([0.7]), **values))
    error = (outs[1] - outs[0]).abs().mean() / outs[0].abs().mean()
    assert error < (0.3 if dtype == torch.float8_e4m3fn else 0.05), error


def test_encoders_of_sd3_from_files():
    """Any of the three may lack; CLIP-G keeps its place behind a CLIP-L that is not there."""
    parts = {name: make for name, make in files("sd3").items() if name.startswith("text_encoders/")}
    clip_l, clip_g = (parts[f"text_encoders/tiny_{name}.safetensors"]() for name in ("clip_l", "clip_g"))
    both = load_text_encoder_state_dicts([dict(clip_l), dict(clip_g)], clip_type=CLIPType.SD3)
    alone = load_text_encoder_state_dicts([dict(clip_g)], clip_type=CLIPType.SD3)
    assert both.cond_stage_model.t5xxl is None and alone.cond_stage_model.clip_l is None
    hidden = alone.encode_from_tokens(alone.tokenize("a red fox"))
    assert hidden.shape == (1, 77, 4096) and not hidden[..., :768].any() and hidden[..., 768:832].any()
    assert both.encode_from_tokens(both.tokenize("a red fox"))[..., :128].abs().min() > 0
