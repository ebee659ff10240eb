"""Encoders of sounds against torch's own layers, and what their files say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from comfy.audio_encoders import networks
from comfy.audio_encoders.audio_encoders import load_audio_encoder_from_sd
from tests.tiny_models import random_weights


def network(kind: str) -> networks.nn.Module:
    if kind == "whisper":
        return networks.WhisperModel(8, 128, 96, 2, 20)
    return networks.Wav2Vec2Model(16, 128, 96, 2, norm_first=kind == "large", conv_bias=kind == "large")


def weights(kind: str) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in network(kind).state_dict().items()}
    return random_weights(shapes, 5)


SOUND = torch.randn((1, 2, 16000), generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("kind", ["large", "base", "whisper"])
def test_files_and_states(kind):
    prefix = "model." if kind == "whisper" else "wav2vec2."
    sd = {prefix + key: value for key, value in weights(kind).items()}
    sd["lm_head.weight"] = torch.zeros(3, 3)
    encoder = load_audio_encoder_from_sd(sd)
    assert type(encoder.model) is type(network(kind))
    out = encoder.encode_audio(SOUND, 16000)
    layers = out["encoded_audio_all_layers"]
    count = 20 if kind == "whisper" else 49
    assert [tuple(layer.shape) for layer in layers] == [(1, count, 128)] * 3 and layers[-1] is out["encoded_audio"]
    assert out["audio_samples"] == 16000
    # channels are mixed, and other rates give as many states
    mono = encoder.encode_audio(SOUND.mean(dim=1, keepdim=True), 16000)["encoded_audio"]
    torch.testing.assert_close(mono, layers[-1], rtol=1e-4, atol=1e-4)
    assert encoder.encode_audio(SOUND.repeat_interleave(3, dim=-1), 48000)["encoded_audio"].shape == mono.shape
    del sd[f"{prefix}encoder.layer_norm.bias"]
    with pytest.raises(ValueError, match="lacks 1 weights, first encoder.layer_norm.bias"):
        load_audio_encoder_from_sd(sd)
    with pytest.raises(ValueError, match="unknown audio encoder; use a file of wav2vec"):
        load_audio_encoder_from_sd({"encoder.weight": torch.zeros(1)})


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_is_that_of_torch(first):
    layer = networks._Layer(128, 96, first)
    layer.load_state_dict(random_weights({key: tuple(v.shape) for key, v in layer.state_dict().items()}, 2))
    theirs = torch.nn.TransformerEncoderLayer(128, 2, 96, 0.0, F.gelu, batch_first=True, norm_first=first).eval()
    own = layer.state_dict()
    parts = {kind: torch.cat([own[f"attention.{name}_proj.{kind}"] for name in "qkv"]) for kind in ("weight", "bias")}
    pairs = {
        "self_attn.out_proj": "attention.out_proj", "linear1": "feed_forward.intermediate_dense",
        "linear2": "feed_forward.output_dense", "norm1": "layer_norm", "norm2": "final_layer_norm",
    }  # fmt: skip
    theirs.load_state_dict(
        {f"self_attn.in_proj_{kind}": value for kind, value in parts.items()}
        | {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in pairs.items() for kind in ("weight", "bias")}
    )
    x = torch.randn((2, 7, 128), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("weight_g", "weight_v"),
                                   ("parametrizations.weight.original0", "parametrizations.weight.original1")])  # fmt: skip
def test_positions_whose_weights_are_a_direction_and_a_length(names):
    whole = weights("large")
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(128, 128, 128, groups=16), dim=2)
    sd = {key: value for key, value in whole.items() if not key.startswith("encoder.pos_conv_embed.")}
    state = conv.state_dict()
    for i, name in enumerate(names):
        sd[f"encoder.pos_conv_embed.conv.{name}"] = state[f"parametrizations.weight.original{i}"]
    sd["encoder.pos_conv_embed.conv.bias"] = conv.bias.detach()
    loaded = load_audio_encoder_from_sd(sd).model.encoder.pos_conv_embed
    torch.testing.assert_close(loaded.conv.weight.detach(), conv.weight.detach())


def test_mel_energies():
    filters = networks.mel_filters(128, 201)
    assert filters.shape == (201, 128) and (filters >= 0).all()
    centres = filters.argmax(dim=0).double() * 40  # Hz
    assert (centres.diff() >= 0).all() and centres[-1] > 7500
    # triangles have area 1 where they are wider than a bin
    area = filters[:, 100:].sum(dim=0) * 40
    assert (area - 1).abs().max() < 0.1
    model = networks.WhisperModel(16, 128, 96, 1, 20)
    time = torch.arange(6400) / 16000
    tone = torch.sin(2 * math.pi * 440 * time)[None]
    mel = model.log_mel(tone)
    assert mel.shape == (1, 16, 40)
    want = networks.mel_filters(16, 201)[11].argmax()  # bin 11 is 440 Hz
    assert (mel[0].mean(dim=1).argmax() == want).item() and (mel.max() - mel.min()).item() <= 2.0 + 1e-5
