"""What the networks of video families promise beyond their recorded figures."""

from __future__ import annotations

import pytest
import torch

from comfy.ldm.modules import norm_rope
from tests.tiny_families import TINY
from tests.tiny_models import random_weights


def network(name, configuration=None, **changes):
    """A family's tiny network with random weights."""
    import dataclasses

    tiny = TINY[name]
    tiny = dataclasses.replace(
        tiny, configuration=configuration or tiny.configuration, config={**tiny.config, **changes}
    )
    net = tiny.network("cpu")
    net.load_state_dict(random_weights({key: tuple(value.shape) for key, value in net.state_dict().items()}, 3))
    return net.eval().requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, T, TEXT = noise(1, 16, 3, 5, 6), torch.tensor([500.0]), noise(1, 4, 4096, seed=1)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_vace_controls_add_up():
    net = network("wan_vace")
    control = noise(1, 1, 96, 3, 5, 6, seed=2)
    one = net(X, T, TEXT, vace_context=control, vace_strength=[0.75])
    two = net(X, T, TEXT, vace_context=control.repeat(1, 2, 1, 1, 1, 1), vace_strength=[0.5, 0.25])
    without = net(X, T, TEXT)
    close(one, two)
    close(without, net(X, T, TEXT, vace_context=control, vace_strength=[0.0]))
    assert (one - without).abs().max() > 1e-2
    with pytest.raises(ValueError, match="VACE control has 36 tokens"):
        net(X, T, TEXT, vace_context=control[:, :, :, :, :, :4].repeat(1, 1, 1, 2, 1, 1))


def test_wan_takes_a_time_for_each_frame():
    net = network("wan_t2v")
    close(net(X, T, TEXT), net(X, T.repeat(1, 3), TEXT))
    assert not torch.allclose(net(X, T, TEXT), net(X, torch.tensor([[0.0, 500.0, 500.0]]), TEXT), atol=1e-3)


def test_wan_references_are_frames_that_are_cut_off():
    net = network("wan_t2v")
    out = net(X, T, TEXT, time_dim_concat=noise(1, 16, 1, 5, 6, seed=4))
    assert out.shape == X.shape and not torch.allclose(out, net(X, T, TEXT), atol=1e-3)
    net = network("wan_t2v", in_dim_ref_conv=16)
    out = net(X, T, TEXT, reference_latent=noise(1, 16, 6, 6, seed=5))
    assert out.shape == X.shape and not torch.allclose(out, net(X, T, TEXT), atol=1e-3)


def test_camera_paths_change_the_video():
    net = network("wan_t2v", "WAN22_Camera", model_type="camera_2.2", in_dim=36)
    x, rays = noise(1, 36, 3, 6, 6), noise(1, 24, 3, 48, 48, seed=6)
    out = net(x, T, TEXT, camera_conditions=rays)
    assert out.shape == (1, 16, 3, 6, 6) and not torch.allclose(out, net(x, T, TEXT), atol=1e-3)


def test_a_guiding_frame_has_its_own_time():
    net = network("hunyuan_video")
    text, pooled = noise(1, 4, 40, seed=1), noise(1, 768, seed=2)
    plain = net(X, T, text, y=pooled)
    close(plain, net(X, T, text, y=pooled, guiding_frame_index=T))
    other = net(X, T, text, y=pooled, guiding_frame_index=torch.tensor([0.0]))
    assert not torch.allclose(plain, other, atol=1e-3)
    beside = net(X, T, text, y=pooled, ref_latent=noise(1, 16, 1, 5, 6, seed=3))
    assert beside.shape == X.shape and not torch.allclose(plain, beside, atol=1e-3)


def test_meanflow_knows_the_next_time():
    net = network("hunyuan_image", meanflow=True)
    x, text = noise(1, 64, 3, 4), noise(1, 4, 40)
    sigmas = torch.tensor([1.0, 0.6, 0.2, 0.0])
    plain = net(x, T, text)
    known = net(x, T, text, transformer_options={"sample_sigmas": sigmas, "sigmas": sigmas[1:2]})
    close(plain, net(x, T, text, transformer_options={"sample_sigmas": sigmas, "sigmas": torch.tensor([0.5])}))
    assert not torch.allclose(plain, known, atol=1e-3)


def test_ltx_takes_a_time_for_each_token():
    net, x, t = network("ltxv"), noise(1, 128, 3, 2, 3), torch.tensor([0.5])
    close(net(x, t, TEXT), net(x, t.repeat(1, 18, 1), TEXT))
    moved = net(x, t, TEXT, keyframe_idxs=torch.tensor([[[40] * 6, [0] * 6, [64] * 6]]))
    assert not torch.allclose(moved, net(x, t, TEXT), atol=1e-3)


@pytest.mark.parametrize("table_heads", [1, 3])
def test_norm_over_all_heads_and_rotation(table_heads):
    x, scale, table = noise(2, 5, 24), noise(24, seed=1), noise(1, table_heads, 5, 4, 2, 2, seed=2)
    got = norm_rope.norm_together_and_rotate(x, scale, table, 3)
    normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    pairs = normed.reshape(2, 5, 3, 4, 2).permute(0, 2, 1, 3, 4)
    close(got, torch.einsum("bhlpij,bhlpj->bhlpi", table.expand(2, 3, 5, 4, 2, 2), pairs).flatten(-2))


def test_prompts_are_cut_out_of_their_templates():
    from comfy.text_encoders.hunyuan_video import prompt_bounds
    from comfy.text_encoders.qwen_image import after_template

    qwen = [(token, 1.0) for token in (151644, 8948, 198, 5, 151645, 198, 151644, 872, 198, 7, 8, 151645)]
    assert after_template(qwen) == 9
    llama = [(token, 1.0) for token in (128000, 128006, 9125, 128007, 271, 5, 128009, 128006, 882, 128007, 271, 6, 128009, 9)]
    assert prompt_bounds(llama) == (11, 13)


def test_a_vocabulary_that_is_not_there_is_named():
    from comfy.text_encoders.qwen_image import QwenImageTokenizer

    with pytest.raises(ValueError, match="Qwen2.5-VL-7B-Instruct does not come with the program"):
        QwenImageTokenizer().tokenize_with_weights("a cat")


def test_a_checkpoint_whose_vae_is_missing_is_loaded_without_it(caplog):
    import comfy.sd
    from comfy.missing import FeatureMissingError
    from comfy.vae import VAE

    vae = {"decoder.conv_in_x_t.weight": torch.zeros(8, 8)}
    with pytest.raises(FeatureMissingError, match="the diffusion decoder of LTX-2.5 is not in this version"):
        VAE(sd=vae)
    weights = {f"model.diffusion_model.{k}": v for k, v in random_weights(TINY["ltxv"].shapes(), 1).items()}
    weights.update({f"vae.{key}": value for key, value in vae.items()})
    model, clip, found, _ = comfy.sd.load_state_dict_guess_config(weights)
    assert type(model.model).__name__ == "LTXV" and clip is None and found is None
    assert "loaded without its VAE" in caplog.text
