"""HunyuanDiT's control network against its blocks called one by one."""

import types

import pytest
import torch
import torch.nn.functional as F

import comfy.latent_formats
from comfy.control.loading import load_controlnet_state_dict
from tests import tiny_adapters
from tests.models.test_sd3_control import Vae


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("old", [False, True])
def test_residuals(old):
    """The hint goes through the latent's embedder; each block's tokens are projected. 1.1 is also told sizes and style."""
    sd = tiny_adapters.control_hunyuan(old)
    control = load_controlnet_state_dict(dict(sd)).copy()
    picture = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(2))
    vae = Vae()
    encode, vae.encode = vae.encode, lambda pictures: encode(pictures)[:, :4]
    control.set_cond_hint(picture, 0.5, vae=vae)
    sampling = types.SimpleNamespace(timestep=lambda sigma: sigma * 1000, calculate_input=lambda sigma, x: x)
    control.pre_run(types.SimpleNamespace(model_sampling=sampling), lambda percent: 1.0 - percent)
    cond = {
        "c_crossattn": draw(2, 77, 40), "encoder_hidden_states_t5": draw(2, 16, 24, seed=3),
        "text_embedding_mask": (torch.arange(77) < 9)[None], "text_embedding_mask_t5": (torch.arange(16) < 9)[None],
        "style": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    x, sigma = draw(2, 4, 6, 8, seed=4), torch.full((2,), 0.5)
    network = control.control_model
    with torch.no_grad():
        got = control.get_control(x, sigma, cond, 2, {})["output"]
        text = network._text(
            cond["c_crossattn"], cond["text_embedding_mask"], cond["encoder_hidden_states_t5"],
            cond["text_embedding_mask_t5"],
        )  # fmt: skip
        sizes = torch.tensor([[48, 64, 48, 64, 0, 0]]).expand(2, -1)
        state = network.embed(x, sigma * 1000, text, cond["encoder_hidden_states_t5"], sizes, cond["style"])
        hint = comfy.latent_formats.SDXL().process_in(vae.encode(picture.movedim(1, -1)))
        img = state.streams["img"] + network.before_proj(network.x_embedder(hint))
        assert len(got) == 2
        for i, block in enumerate(network.blocks):
            img = block(img, state.sample["vec"], text, state.value("pe"))
            want = F.linear(img, sd[f"after_proj_list.{i}.weight"], sd[f"after_proj_list.{i}.bias"])
            torch.testing.assert_close(got[i], want * 0.5, rtol=1e-4, atol=1e-4)


def test_bad_input():
    network = load_controlnet_state_dict(tiny_adapters.control_hunyuan()).control_model
    with pytest.raises(ValueError, match="needs mT5's features"):
        network(draw(1, 4, 6, 8), draw(1, 4, 6, 8), torch.ones(1), draw(1, 77, 40))
    torn = {key: value for key, value in tiny_adapters.control_hunyuan().items() if not key.startswith("mlp_t5")}
    with pytest.raises(ValueError, match="but not its blocks"):
        load_controlnet_state_dict(torn)
