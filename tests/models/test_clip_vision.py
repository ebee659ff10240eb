"""Image encoders against torch's own transformer layers, from every layout of file."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import comfy.clip_vision
import comfy.clip_vision_model
from tests import tiny_adapters

TOWERS = {
    "l": (tiny_adapters.vision_l, lambda x: x * torch.sigmoid(1.702 * x)),
    "llava": (tiny_adapters.vision_llava, lambda x: x * torch.sigmoid(1.702 * x)),
    "h": (tiny_adapters.vision_h, F.gelu),
    "g": (tiny_adapters.vision_g, F.gelu),
    "siglip": (tiny_adapters.vision_siglip, lambda x: F.gelu(x, approximate="tanh")),
}


def by_torch(sd, pixels, activation):
    """Hidden states after each layer, with `torch.nn.TransformerEncoderLayer`."""
    embeddings = "vision_model.embeddings."
    patches = sd[f"{embeddings}patch_embedding.weight"]
    x = F.conv2d(pixels, patches, sd.get(f"{embeddings}patch_embedding.bias"), stride=patches.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    width = x.shape[-1]
    first = sd.get(f"{embeddings}class_embedding")
    if first is not None:
        x = torch.cat([first.repeat(len(x), 1, 1), x], dim=1)
    x = x + sd[f"{embeddings}position_embedding.weight"]
    if first is not None:
        x = norm(sd, "vision_model.pre_layrnorm", x)
    states = []
    for i in range(sum(key.endswith("layer_norm1.weight") for key in sd)):
        name = f"vision_model.encoder.layers.{i}"
        layer = torch.nn.TransformerEncoderLayer(
            width, 16, 2 * width, dropout=0.0, activation=activation, batch_first=True, norm_first=True
        )
        weights = {}
        for kind in ("weight", "bias"):
            parts = [sd[f"{name}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            weights[f"self_attn.in_proj_{kind}"] = torch.cat(parts)
            weights[f"self_attn.out_proj.{kind}"] = sd[f"{name}.self_attn.out_proj.{kind}"]
            for number in "12":
                weights[f"linear{number}.{kind}"] = sd[f"{name}.mlp.fc{number}.{kind}"]
                weights[f"norm{number}.{kind}"] = sd[f"{name}.layer_norm{number}.{kind}"]
        layer.load_state_dict(weights)
        x = layer(x)
        states.append(x)
    return states


def norm(sd, name, x):
    return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"])


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name):
    make, activation = TOWERS[name]
    sd = make()
    model = comfy.clip_vision.load_clipvision_from_sd(dict(sd))
    pictures = torch.rand(3, 40, 55, 4, generator=torch.Generator().manual_seed(2))
    out = model.encode_image(pictures)
    size = model.image_size
    assert out.image_sizes == [(3, size, size)] * 3
    pixels = comfy.clip_vision.clip_preprocess(pictures, size, model.image_mean, model.image_std)
    with torch.no_grad():
        states = by_torch(sd, pixels, activation)
        last = norm(sd, "vision_model.post_layernorm", states[-1]) if name == "siglip" else states[-1]
        torch.testing.assert_close(out.last_hidden_state, last, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out["penultimate_hidden_states"], states[-2], rtol=1e-4, atol=1e-4)
        if name == "siglip":
            embeds = last
            torch.testing.assert_close(out.all_hidden_states, torch.stack(states, 1), rtol=1e-4, atol=1e-4)
        else:
            pooled = norm(sd, "vision_model.post_layernorm", states[-1][:, 0])
            embeds = pooled @ sd["visual_projection.weight"].T
        torch.testing.assert_close(out.image_embeds, embeds, rtol=1e-4, atol=1e-4)
        if name == "llava":
            first, second = (f"multi_modal_projector.linear_{n}" for n in (1, 2))
            seen = F.linear(states[-2][:, 1:], sd[f"{first}.weight"], sd[f"{first}.bias"])
            seen = F.linear(F.gelu(seen), sd[f"{second}.weight"], sd[f"{second}.bias"])
            torch.testing.assert_close(out.mm_projected, seen, rtol=1e-4, atol=1e-4)
        else:
            assert out.mm_projected is None


def test_pictures_are_cut_or_stretched():
    """A ramp to the right: cut, the middle part of it is left; stretched, all of it."""
    ramp = torch.linspace(0, 1, 400).expand(1, 100, 400)[..., None].expand(-1, -1, -1, 3)
    cut = comfy.clip_vision.clip_preprocess(ramp, 100, (0, 0, 0), (1, 1, 1))
    stretched = comfy.clip_vision.clip_preprocess(ramp, 100, (0, 0, 0), (1, 1, 1), crop=False)
    assert cut.shape == stretched.shape == (1, 3, 100, 100)
    torch.testing.assert_close(cut[0, 0, 0, [0, -1]], torch.tensor([150 / 399, 249 / 399]), atol=2 / 255, rtol=0)
    torch.testing.assert_close(stretched[0, 0, 0, [0, -1]], torch.tensor([0.0, 1.0]), atol=3 / 255, rtol=0)
    levels = cut * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    default = comfy.clip_vision.clip_preprocess(torch.full((1, 224, 224, 3), 0.5))
    middle = (128 / 255 - 0.48145466) / 0.26862954
    assert math.isclose(default[0, 0, 0, 0].item(), middle, abs_tol=1e-5)


def test_real_sizes():
    """What tells encoders apart: shapes alone."""

    def described(layers, positions, patch, width, siglip=False):
        shapes = tiny_adapters.vision_shapes(layers, 1, patch, width, siglip)
        shapes["vision_model.embeddings.position_embedding.weight"] = (positions, width)
        with torch.device("meta"):
            config = comfy.clip_vision_model.config_from_state_dict({k: torch.empty(v) for k, v in shapes.items()})
        return config.image_size, config.activation, config.siglip

    assert described(24, 257, 14, 1024) == (224, "quick_gelu", False)
    assert described(24, 577, 14, 1024) == (336, "quick_gelu", False)
    assert described(32, 257, 14, 1280) == (224, "gelu", False)
    assert described(48, 257, 14, 1664) == (224, "gelu", False)
    assert described(27, 729, 14, 1152, True) == (384, "gelu_pytorch_tanh", True)
    assert described(27, 1024, 16, 1152, True) == (512, "gelu_pytorch_tanh", True)


def test_open_clip_names(tmp_path):
    """The same features from OpenCLIP's names, as a file of its own and inside a checkpoint."""
    sd = tiny_adapters.vision_h()
    pictures = torch.rand(1, 24, 24, 3)
    want = comfy.clip_vision.load_clipvision_from_sd(dict(sd)).encode_image(pictures)
    save_file(tiny_adapters.to_open_clip(sd), tmp_path / "vision.safetensors")
    for model in (
        comfy.clip_vision.load(str(tmp_path / "vision.safetensors")),
        comfy.clip_vision.load_clipvision_from_sd(
            tiny_adapters.to_open_clip(sd, "embedder.model.visual."), "embedder.model.visual.", True
        ),
        comfy.clip_vision.load_clipvision_from_sd({f"x.{key}": value for key, value in sd.items()}, "x.", True),
    ):
        got = model.encode_image(pictures)
        torch.testing.assert_close(got.image_embeds, want.image_embeds)
        assert sorted(model.get_sd()) == sorted(sd)


def test_files_that_are_none():
    assert comfy.clip_vision.load_clipvision_from_sd({"a": torch.zeros(1)}) is None
    small = tiny_adapters.random_weights(tiny_adapters.vision_shapes(12, 2, 8), 1)
    assert comfy.clip_vision.load_clipvision_from_sd(small) is None
    torn = tiny_adapters.vision_l()
    del torn["vision_model.encoder.layers.3.mlp.fc1.weight"]
    with pytest.raises(ValueError, match="lacks 1 weights, first vision_model.encoder.layers.3.mlp.fc1.weight"):
        comfy.clip_vision.load_clipvision_from_sd(torn)
    model = comfy.clip_vision.load_clipvision_from_sd(tiny_adapters.vision_l())
    with pytest.raises(ValueError, match="positions for 17; use encode_image"):
        model.model(torch.zeros(1, 3, 24, 24))
