"""Tiny files of every family: with diffusers' names, in other dtypes, whole, and their text encoders."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.utils
from comfy.clip_model import CLIPTextModel
from comfy.families import auraflow, chroma, pixart, sd3
from comfy.ldm.wan.vae import WanVAE
from comfy.text_encoders.configs import encoder_config, split_encoders
from comfy.text_encoders.llama import LanguageModel
from comfy.text_encoders.loader import CLIPType, load_text_encoder_state_dicts
from comfy.text_encoders.qwen_vl import QwenVL
from comfy.text_encoders.t5 import T5
from tests import tiny_models
from tests.text.test_sentencepiece import model_bytes
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


FP8 = torch.float8_e4m3fn


def in_dtype(dtype):
    """What makes a file with all weights in `dtype`."""
    return lambda weights, network: {key: value.to(dtype) for key, value in weights.items()}


def scaled(weights, network):
    """As files of fp8 with scales have it: linears in fp8 with a scale beside them, all else in bf16, and a marker."""
    out = {"scaled_fp8": torch.empty(2, dtype=FP8)}
    linears = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    for key, value in weights.items():
        out[key] = value.to(torch.bfloat16)
        if key in linears:
            scale = value.abs().max() / 448
            out[key] = (value / scale).to(FP8)
            out[f"{key.removesuffix('weight')}scale_weight"] = scale.float()
    return out


STORED = {
    "bf16": in_dtype(torch.bfloat16), "fp16": in_dtype(torch.float16), "fp8": in_dtype(FP8), "scaled fp8": scaled,
}  # fmt: skip


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("name", TINY)
def test_files_in_other_dtypes(name, dtype):
    """They load, and give about what fp32 gives."""
    tiny = TINY[name]
    weights = tiny_models.random_weights(tiny.shapes(), 1)
    stored = STORED[dtype](weights, tiny.network())
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
    assert error < (0.3 if dtype.endswith("fp8") else 0.05), error


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


def _t5(kind="t5", vocabulary=64):
    return {
        "model_type": kind, "vocab_size": vocabulary, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 2,
        "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh",
    }  # fmt: skip


def _language(head, gemma=False, bias=False):
    return {
        "transformer_type": "gemma2" if gemma else "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": head,
        "rms_norm_eps": 1e-6, "rms_norm_add": gemma, "rope_theta": 1e4, "mlp_activation": "silu", "qkv_bias": bias,
        "vision": {"width": 80, "layers": 1, "heads": 1, "inner": 24, "patch": 14} if bias else None,
    }  # fmt: skip


def zeros(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def same_bits(a, b):
    """Whether two tensors are equal, also in fp8."""
    return torch.equal(*(t.view(torch.uint8) if t.dtype == FP8 else t for t in (a, b)))


def scaled_encoders(text, encoders):
    """Weights of text encoders with each encoder in scaled fp8."""
    out = {}
    for name, sd in split_encoders(text).items():
        network = getattr(encoders, name).transformer
        out |= {f"{name}.transformer.{key}": value for key, value in scaled(sd, network).items()}
    return out


# sizes of each encoder, as its `model_options` take them
ENCODERS = {
    "clip_l": encoder_config(zeros(tiny_models.clip_l_shapes())),
    "clip_g": encoder_config(zeros(tiny_models.clip_g_shapes())),
    "t5xxl": _t5(), "umt5xxl": _t5("umt5"), "pile_t5xl": _t5("umt5"), "mt5xl": _t5("mt5"), "byt5_small": _t5(),
    "gemma2_2b": _language(256, gemma=True), "llama": _language(128), "qwen25_7b": _language(128, bias=True),
    "hydit_clip": {
        "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 40, "num_hidden_layers": 2, "hidden_act": "gelu",
        "max_position_embeddings": 77, "layer_norm_eps": 1e-12, "type_vocab_size": 2, "vocab_size": 64,
    },
}  # fmt: skip


def encoders_of(kind):
    """Weights of a family's text encoders with full keys, as `CLIP.get_sd` gives them."""
    present = ("clip_l", "clip_g", "t5xxl")
    hints = [f"text_encoders.{name}.transformer.text_model.final_layer_norm.weight" for name in present]
    hints += ["text_encoders.byt5_small.transformer.shared.weight"]
    target = kind({}).clip_target(dict.fromkeys(hints))
    options = {f"{name}_model_config": config for name, config in ENCODERS.items()}
    network = target.clip(device="meta", dtype=torch.float32, model_options=options)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items() if ".transformer." in key}
    return tiny_models.random_weights(shapes, 23), network


def vae_of(tiny):
    """Weights of a VAE of the family's kind; {} for those that are not here."""
    if tiny.frames is None:
        shapes = {4: tiny_models.vae_4_shapes, 16: tiny_models.vae_shapes}.get(tiny.channels)
        return {} if shapes is None else tiny_models.random_weights(shapes(), 22)
    if not tiny.configuration.startswith(("WAN", "Qwen")):
        return {}
    network = WanVAE(dim=8, z_dim=tiny.channels, residual=tiny.channels == 48)
    return tiny_models.random_weights({key: tuple(value.shape) for key, value in network.state_dict().items()}, 22)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_whole_checkpoints_of_every_family(name, eight_bits, caplog):
    """What is saved as one file is found again in it, whole, in fp32 or in scaled fp8."""
    tiny = TINY[name]
    model = tiny.model()
    weights, (text, encoders), vae = tiny_models.random_weights(tiny.shapes(), 21), encoders_of(tiny.kind()), vae_of(tiny)
    stored = dict(weights)
    if eight_bits:
        stored, text = scaled(weights, model.diffusion_model), scaled_encoders(text, encoders)
    config = model.model_config
    vocabulary = torch.frombuffer(bytearray(model_bytes()), dtype=torch.uint8)
    words = {"spiece_model": vocabulary, "mt5xl.spiece_model": vocabulary}
    sd = {
        **config.process_unet_state_dict_for_saving(stored),
        **config.process_clip_state_dict_for_saving({**text, **words}),
        **config.process_vae_state_dict_for_saving(vae),
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        patcher, clip, decoder, _ = comfy.sd.load_state_dict_guess_config(sd, metadata=tiny.metadata)
    assert type(patcher.model.model_config).__name__ == tiny.configuration
    for loaded, given in ((patcher.model.diffusion_model, stored), (clip.cond_stage_model, text)):
        found = loaded.state_dict()
        for key, value in given.items():
            if not key.endswith("scaled_fp8"):
                assert found[key].dtype == value.dtype and same_bits(found[key], value), key
    assert (decoder is not None) == bool(vae)
    assert caplog.records == []


# type of the loader node -> {encoder: name of its token rows}
FROM_PARTS = {
    "FLUX": {"clip_l": "l", "t5xxl": "t5xxl"}, "SD3": {"clip_l": "l", "clip_g": "g"}, "PIXART": {"t5xxl": "t5xxl"},
    "STABLE_DIFFUSION": {"clip_l": "l", "clip_g": "g"}, "CHROMA": {"t5xxl": "t5xxl"}, "LTXV": {"t5xxl": "t5xxl"},
    "LUMINA2": {"gemma2_2b": "gemma2_2b"}, "HUNYUAN_VIDEO": {"clip_l": "l", "llama": "llama"},
    "QWEN_IMAGE": {"qwen25_7b": "qwen25_7b"}, "HUNYUAN_IMAGE": {"qwen25_7b": "qwen25_7b"},
}  # fmt: skip
NETWORKS = {
    "clip_l": CLIPTextModel, "clip_g": CLIPTextModel, "t5xxl": T5, "llama": LanguageModel, "gemma2_2b": LanguageModel,
    "qwen25_7b": QwenVL,
}  # fmt: skip
# Hunyuan takes the third layer from the end; Qwen's file is told by the size of its keys
MORE = {"llama": {"num_hidden_layers": 4}, "qwen25_7b": {"num_hidden_layers": 4, "num_key_value_heads": 4, "num_attention_heads": 4}}


@functools.cache
def encoder_files(clip_type, stored):
    """Files of a family's encoders, all stored in one way."""
    out = []
    for seed, name in enumerate(FROM_PARTS[clip_type]):
        config = {**ENCODERS[name], **MORE.get(name, {})}
        network = NETWORKS[name](config, torch.float32, "meta", comfy.ops.disable_weight_init)
        weights = tiny_models.random_weights({k: tuple(v.shape) for k, v in network.state_dict().items()}, seed)
        if stored != "fp32":
            weights = STORED[stored](weights, network)
        if name == "gemma2_2b":
            weights["spiece_model"] = torch.frombuffer(bytearray(model_bytes()), dtype=torch.uint8)
        out.append(weights)
    return out


@functools.cache
def features(clip_type, stored):
    """What the encoders make of some tokens, from files in any order."""
    parts = [dict(sd) for sd in reversed(encoder_files(clip_type, stored))]
    clip = load_text_encoder_state_dicts(parts, clip_type=CLIPType[clip_type])
    rows = {row: [[(token, 1.0) for token in range(3, 40)]] for row in FROM_PARTS[clip_type].values()}
    with torch.no_grad():
        out = clip.cond_stage_model.encode_token_weights(rows)
    return out[0], out[1]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("clip_type", FROM_PARTS)
def test_encoders_from_parts(clip_type, stored):
    """Files of text encoders alone, in each way of storing."""
    limit = 0.4 if stored.endswith("fp8") else 0.05
    for got, want in zip(features(clip_type, stored), features(clip_type, "fp32")):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.shape == want.shape and (got - want).abs().mean() / want.abs().mean() < limit
