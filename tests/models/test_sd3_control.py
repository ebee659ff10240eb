"""Control networks of SD3 and SD3.5 against blocks called one by one."""

import types

import pytest
import torch
import torch.nn.functional as F

import comfy.latent_formats
import comfy.ops
from comfy.control.loading import load_controlnet_state_dict
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from tests import tiny_adapters
from tests.tiny_adapters import SD3_DEPTH
from tests.tiny_models import T5_WIDTH, random_weights


class Vae:
    """Latents that are the pictures' 8 x 8 means."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        return F.avg_pool2d(pictures.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main_model(depth=SD3_DEPTH, pooled=48):
    """The network that is controlled, with what control networks borrow."""
    text = {"params": {"in_features": T5_WIDTH, "out_features": 64 * depth}}
    network = MMDiT(depth=depth, adm_in_channels=pooled, context_embedder_config=text)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(random_weights(shapes, 3))
    return network


def applied(sd, strength=1.0, main=None):
    """(control for a run, its hint pictures)."""
    control = load_controlnet_state_dict(sd).copy()
    picture = torch.rand(1, 3, 56, 80, generator=torch.Generator().manual_seed(2))
    control.set_cond_hint(picture, strength, vae=Vae())
    sampling = types.SimpleNamespace(timestep=lambda sigma: sigma * 1000, calculate_input=lambda sigma, x: x)
    model = types.SimpleNamespace(model_sampling=sampling, diffusion_model=main or main_model())
    control.pre_run(model, lambda percent: 1.0 - percent)
    return control, picture


def residuals(control, x, y):
    cond = {"c_crossattn": draw(2, 5, T5_WIDTH, seed=5), "y": y}
    with torch.no_grad():
        return control.get_control(x, torch.full((2,), 0.5), cond, 2, {})["output"]


def padded(latent):
    return F.pad(latent, (0, latent.shape[-1] % 2, 0, latent.shape[-2] % 2), mode="circular")


@pytest.mark.parametrize("channels", [16, 17])
def test_diffusers_layout(channels):
    """Zeros for the pooled text, latents that are not shifted, each residual for two blocks and none for the last."""
    sd = tiny_adapters.control_sd3(channels=channels)
    control, picture = applied(dict(sd), 0.5)
    assert control.concat_mask is (channels == 17)
    x = draw(2, 16, 7, 10)
    got = residuals(control, x, draw(2, 48, seed=6))
    network = control.control_model
    hint = Vae().encode(picture.movedim(1, -1)) * comfy.latent_formats.SD3().scale_factor
    hint = torch.cat([hint, torch.ones(1, channels - 16, 7, 10)], dim=1)
    with torch.no_grad():
        img = network.x_embedder(padded(x))
        img = img + network.positions(4, 5, img)
        hinted = F.conv2d(padded(hint), sd["pos_embed_input.proj.weight"], sd["pos_embed_input.proj.bias"], stride=2)
        img = img + hinted.flatten(2).transpose(1, 2)
        txt = network.context_embedder(draw(2, 5, T5_WIDTH, seed=5))
        c = network.t_embedder(torch.full((2,), 500.0)) + network.y_embedder(torch.zeros(2, 48))
        want = []
        for i, block in enumerate(network.joint_blocks):
            txt, img = block(txt, img, c)
            projected = F.linear(img, sd[f"controlnet_blocks.{i}.weight"], sd[f"controlnet_blocks.{i}.bias"])
            want += [projected * 0.5] * 2
    assert len(got) == SD3_DEPTH - 1
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert got[0] is got[1]


@pytest.mark.parametrize("double", [False, True])
def test_stability_layout(double):
    """What is the model's comes from the model; hints are changed as the file says; blocks follow each other, or do not."""
    sd = tiny_adapters.control_sd35(double)
    pooled = 2048 if double else 48  # the real width where the file does not tell it
    main = main_model(pooled=pooled)
    control, picture = applied(dict(sd), main=main)
    x, y = draw(2, 16, 7, 10), draw(2, pooled, seed=6)
    got = residuals(control, x, y)
    network = control.control_model
    hint = comfy.latent_formats.SD3().process_in(Vae().encode(1 - picture.movedim(1, -1)))
    with torch.no_grad():
        if double:
            vector = network.y_embedder(main.y_embedder(y))
            img = network.x_embedder(padded(x))
        else:
            vector = network.y_embedder(y)
            img = main.x_embedder(padded(x))
            img = img + main.positions(4, 5, img)
        img = img + network.pos_embed_input(padded(hint))
        c = network.t_embedder(torch.full((2,), 500.0)) + vector
        want, tokens = [], img
        for i, block in enumerate(network.transformer_blocks):
            q, k, v = block.into_attention(tokens, block.modulation(c, types.SimpleNamespace(prepared={})))
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            after = block.after_attention(tokens, out, None, block.modulation(c, types.SimpleNamespace(prepared={})))
            torch.testing.assert_close(block(tokens, c), after, rtol=1e-4, atol=1e-4)
            tokens = tokens if double else after
            want += [F.linear(after, sd[f"controlnet_blocks.{i}.weight"], sd[f"controlnet_blocks.{i}.bias"])] * 2
    assert len(got) == SD3_DEPTH
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_kinds_of_hints_and_bad_input():
    picture = torch.rand(1, 3, 4, 4)
    changed = {
        kind: load_controlnet_state_dict(tiny_adapters.control_sd35(False, kind)).copy().preprocess_image(picture)
        for kind in (0, 1, 2)
    }
    torch.testing.assert_close(changed[0], picture)
    torch.testing.assert_close(changed[1], picture * 127.5 + 0.5)
    torch.testing.assert_close(changed[2], 1 - picture)
    with pytest.raises(ValueError, match="for SD3.5 of another size than the model"):
        applied(tiny_adapters.control_sd35(True), main=main_model(depth=2))
    torn = tiny_adapters.control_sd3()
    del torn["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(ValueError, match="it is incomplete"):
        load_controlnet_state_dict(torn)
