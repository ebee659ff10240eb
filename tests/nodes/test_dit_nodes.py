"""Nodes of the image transformers' families: what reaches the encoders and the samplers."""

import pytest
import torch

import comfy.sd
from comfy_extras import nodes_hunyuan, nodes_lumina2, nodes_model_advanced, nodes_pixart, nodes_sd3
from comfy_nodes.layer_skip import with_skipped_layers
from tests.tiny_families import TINY, checkpoint


class Clip:
    """Text encoders that answer with what they were given."""

    def __init__(self, *names):
        self.names = names

    def tokenize(self, text):
        return {name: [(name, text)] if text else [] for name in self.names}

    def encode_from_tokens_scheduled(self, tokens, add_dict=None):
        return [[tokens, add_dict or {}]]


def encoded(out):
    return getattr(out, "result", out)[0][0]


def test_hunyuan_dit_reads_a_text_with_each_encoder():
    out = nodes_hunyuan.CLIPTextEncodeHunyuanDiT().encode(Clip("hydit_clip", "mt5xl"), "one", "two")
    assert encoded(out)[0] == {"hydit_clip": [("hydit_clip", "one")], "mt5xl": [("mt5xl", "two")]}


def test_lumina_puts_its_instruction_first():
    out = nodes_lumina2.CLIPTextEncodeLumina2.execute(Clip("gemma2_2b"), "a fox", "alignment")
    ((_, text),) = encoded(out)[0]["gemma2_2b"]
    assert text.startswith("You are an assistant designed to generate high-quality") and text.endswith(
        "textual prompts. <Prompt Start> a fox"
    )


def test_pixart_is_told_the_size():
    out = nodes_pixart.CLIPTextEncodePixArtAlpha.execute(768, 512, "a fox", Clip("t5xxl"))
    assert encoded(out)[1] == {"width": 768, "height": 512}


@pytest.fixture(scope="module")
def whole():
    return comfy.sd.load_state_dict_guess_config(checkpoint("sd3"), output_vae=False)


def test_sd3_pads_the_shorter_prompt(whole):
    """CLIP-L and CLIP-G get as many sections as the longer of the two texts has; an empty text may be left out."""
    clip, long = whole[1], "a very long prompt " * 40
    for first, second in ((long, "short"), ("short", long)):
        out = encoded(nodes_sd3.CLIPTextEncodeSD3.execute(clip, first, second, "", "none"))
        assert out[0].shape[1] > 77 and out[0].shape[1] % 77 == 0
    out = encoded(nodes_sd3.CLIPTextEncodeSD3.execute(clip, "a", "b", "", "none"))
    assert out[0].shape == (1, 77, 4096)


def test_latents_of_sd3():
    out = nodes_sd3.EmptySD3LatentImage.execute(520, 264, 3)
    assert out.result[0]["samples"].shape == (3, 16, 33, 65)


def test_shift_of_auraflow(whole):
    (changed,) = nodes_model_advanced.ModelSamplingAuraFlow().patch_aura(whole[0], 2.5)
    sampling = changed.get_model_object("model_sampling")
    assert sampling.shift == 2.5 and sampling.multiplier == 1.0
    assert whole[0].get_model_object("model_sampling").shift == 3.0


@pytest.mark.parametrize("name", ["sd3", "pixart_sigma", "hunyuan_dit", "auraflow", "chroma", "lumina2"])
def test_layers_can_be_skipped(name):
    """Skip-layer guidance changes every family's picture: each has blocks that can be replaced by name."""
    import comfy.sample
    from tests.tiny_models import random_weights

    tiny = TINY[name]
    plain = comfy.sd.load_diffusion_model_state_dict(random_weights(tiny.shapes(), 1))
    kind = "single_block" if name == "lumina2" else "double_block"
    skipping = with_skipped_layers(plain, {kind: [0]}, 3.0, 0.0, 1.0)
    latent = torch.zeros((1, tiny.channels, 9, 8))

    def draw(model):
        noise = comfy.sample.prepare_noise(latent, 3)
        return comfy.sample.sample(
            model, noise, 2, 3.0, "euler", "simple", tiny.conditioning(1), tiny.conditioning(2), latent,
            disable_pbar=True, seed=3,
        )  # fmt: skip

    with torch.inference_mode():
        a, b = draw(plain), draw(skipping)
    assert torch.isfinite(b).all() and (a - b).abs().max() > 1e-2
