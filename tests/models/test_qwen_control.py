"""What controls Qwen-Image besides the prompt: InstantX's control networks and DiffSynth's patch networks."""

import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import comfy.latent_formats
import comfy.model_management
import comfy.sample
import comfy.sd
from comfy.control.loading import load_controlnet_state_dict
from comfy_extras import nodes_model_patch
from comfy_extras.nodes_model_patch import DiffSynthCnetPatch, QwenImageDiffsynthControlnet
from comfy_nodes.controlnet import with_control
from tests import tiny_adapters
from tests.tiny_families import TINY
from tests.tiny_models import random_weights


class Vae:
    """Latents of one frame that are the pictures' 8 x 8 means; pictures at once would be frames."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        assert pictures.shape[0] == 1
        return F.avg_pool2d(pictures.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16].unsqueeze(2)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hints(pictures=1, height=56, width=80):
    return torch.rand(pictures, height, width, 3, generator=torch.Generator().manual_seed(2))


def patches(latent):
    """[B, C, 1, h, w] -> [B, L, 4C] by a strided convolution with one-hot kernels."""
    latent = F.pad(latent[:, :, 0], (0, latent.shape[-1] % 2, 0, latent.shape[-2] % 2), mode="circular")
    return F.unfold(latent, 2, stride=2).transpose(1, 2)


def normalised(latent):
    return comfy.latent_formats.Wan21().process_in(latent)


@pytest.mark.parametrize("channels, pictures, masked", [(16, 1, False), (16, 2, False), (17, 1, False), (17, 2, True)])
def test_instantx(channels, pictures, masked):
    """Blocks called one by one; each residual is for thirty of the sixty blocks; no mask keeps the whole picture."""
    sd = tiny_adapters.control_qwen(channels)
    control = load_controlnet_state_dict(dict(sd)).copy()
    assert control.concat_mask is (channels == 17)
    mask = (torch.arange(56 * 80).view(1, 1, 56, 80) % 3 > 0).float()
    control.set_cond_hint(hints(pictures).movedim(-1, 1), 0.5, vae=Vae(), extra_concat=[mask] if masked else None)
    sampling = types.SimpleNamespace(timestep=lambda sigma: sigma, calculate_input=lambda sigma, x: x)
    control.pre_run(types.SimpleNamespace(model_sampling=sampling), lambda percent: 1.0 - percent)
    x, text, times = draw(2, 16, 1, 7, 10), draw(2, 5, 40, seed=5), torch.full((2,), 0.5)
    with torch.no_grad():
        got = control.get_control(x, times, {"c_crossattn": text}, 1, {})["input"]

    network = control.control_model
    latent = normalised(torch.cat([Vae().encode(one[None]) for one in hints(pictures)]))
    keep = F.interpolate(mask, size=(7, 10), mode="nearest-exact") if masked else torch.ones(1, 1, 7, 10)
    latent = torch.cat([latent, keep.unsqueeze(2).expand(pictures, -1, -1, -1, -1)], dim=1)[:, :channels]
    with torch.no_grad():
        ids = network.process_img(x)[1]
        words = torch.arange(2, 7).view(1, 5, 1).expand(1, 5, 3)  # from half of the longer side's five patches
        table = network.pe_embedder(torch.cat([words, ids], dim=1)).movedim(1, 2)
        vec = network.time_text_embed(times, torch.float32)
        img = F.linear(patches(x), sd["img_in.weight"], sd["img_in.bias"])
        img = img + F.linear(patches(latent), sd["controlnet_x_embedder.weight"], sd["controlnet_x_embedder.bias"])
        txt = network.txt_in(network.txt_norm(text))
        want = []
        for i, block in enumerate(network.transformer_blocks):
            txt, img = block(img, txt, temb=vec, image_rotary_emb=table)
            name = f"controlnet_blocks.{i}"
            want.append(0.5 * F.linear(img, sd[f"{name}.weight"], sd[f"{name}.bias"]))
    assert len(got) == 60
    for i in (0, 29, 30, 59):
        torch.testing.assert_close(got[i], want[i // 30], rtol=1e-4, atol=1e-4)


def test_residuals_change_the_picture():
    """Sampled with guidance, with a reference picture behind the tokens that the residuals are for."""
    tiny = TINY["qwen_image_edit"]
    model = comfy.sd.load_diffusion_model_state_dict(random_weights(tiny.shapes(), 1), metadata=tiny.metadata)
    control = load_controlnet_state_dict(tiny_adapters.control_qwen())
    noise = draw(1, 16, 1, 7, 10)
    out = []
    for strength in (0.0, 1.0):
        prompts = [tiny.conditioning(1), tiny.conditioning(2)]
        prompts = with_control(prompts, control, hints(), strength, (0.0, 1.0), vae=Vae())
        out.append(
            comfy.sample.sample(
                model, noise, 2, 3.0, "euler", "simple", *prompts, torch.zeros_like(noise), disable_pbar=True, seed=3
            )
        )
    assert out[1].isfinite().all() and not torch.allclose(*out, atol=1e-2)


@pytest.fixture
def load_patch(tmp_path, monkeypatch):
    """Loads a patch network's weights as the node does."""

    def load(sd):
        save_file(sd, tmp_path / "patch.safetensors")
        monkeypatch.setattr("folder_paths.get_full_path_or_raise", lambda *args: str(tmp_path / "patch.safetensors"))
        return nodes_model_patch.ModelPatchLoader().load_model_patch("patch.safetensors")[0]

    return load


@pytest.mark.parametrize("channels, pictures, masked", [(16, 1, False), (17, 2, False), (17, 1, True)])
def test_diffsynth(load_patch, channels, pictures, masked):
    """After each block: projections of the sum of both norms, on the tokens of the picture only."""
    sd = tiny_adapters.diffsynth(channels)
    patch_network = load_patch(sd)
    tiny = TINY["qwen_image"]
    weights = random_weights(tiny.shapes(), 1)
    model = comfy.sd.load_diffusion_model_state_dict(weights, metadata=tiny.metadata)
    mask = (torch.arange(56 * 80).view(1, 56, 80) % 3 > 0).float() if masked else None
    node = QwenImageDiffsynthControlnet()
    controlled = node.diffsynth_controlnet(model, patch_network, Vae(), hints(pictures), 0.7, mask)[0]
    patch = controlled.model_options["transformer_options"]["patches"]["double_block"][0]
    assert patch.rows_independent is (pictures == 1) and patch.models() == [patch_network]
    comfy.model_management.load_models_gpu([patch_network])

    latent = normalised(torch.cat([Vae().encode(one[None]) for one in hints(pictures)]))
    if channels == 17:
        keep = torch.ones(1, 1, 7, 10)
        if masked:
            keep = F.interpolate(1 - mask[None], size=(7, 10), mode="bilinear")
        latent = torch.cat([latent, keep.unsqueeze(2).expand(pictures, -1, -1, -1, -1)], dim=1)
    hint = F.linear(patches(latent), sd["img_in.weight"], sd["img_in.bias"])

    def rms(x, name):
        return F.rms_norm(x, (48,), sd[f"{name}.weight"], 1e-6)

    img, x = draw(2, 20 + 3, 48), draw(2, 16, 1, 7, 10, seed=4)  # three tokens of a reference at the end
    with torch.inference_mode():
        for index in range(2):
            name = f"controlnet_blocks.{index}"
            inner = rms(img[:, :20], f"{name}.x_rms") + rms(hint, f"{name}.y_rms")
            inner = F.gelu(F.linear(inner, sd[f"{name}.input_proj.weight"], sd[f"{name}.input_proj.bias"]))
            added = F.linear(inner, sd[f"{name}.output_proj.weight"], sd[f"{name}.output_proj.bias"])
            got = patch({"img": img, "txt": None, "x": x, "block_index": index, "transformer_options": {}})["img"]
            torch.testing.assert_close(got[:, :20], img[:, :20] + 0.7 * added, rtol=1e-4, atol=1e-4)
            assert torch.equal(got[:, 20:], img[:, 20:])
        beyond = patch({"img": img, "txt": None, "x": x, "block_index": 2})["img"]
        assert torch.equal(beyond, img)

        call = {"x": draw(2, 16, 1, 5, 9), "timestep": torch.tensor([0.5, 0.5]), "context": draw(2, 7, 40, seed=5)}
        network = model.model.diffusion_model
        plain = network(**call)
        other = network(**call, transformer_options={"patches": {"double_block": [patch]}})  # a size of its own
    assert not torch.allclose(plain, other, atol=1e-2) and len(patch._latents) == 2


def test_wrong_files_and_vaes_are_named(load_patch):
    sd = tiny_adapters.diffsynth()
    patch_network = load_patch(sd)

    class Picture(Vae):
        def encode(self, pictures):
            return super().encode(pictures)[:, :, 0]

    with pytest.raises(ValueError, match="connect Qwen-Image's"):
        DiffSynthCnetPatch(patch_network, Picture(), hints(), 1.0)
    with pytest.raises(ValueError, match="the patch network is SigLIPMultiFeatProjModel; choose one of qwen_image"):
        QwenImageDiffsynthControlnet().diffsynth_controlnet(None, load_patch(tiny_adapters.uso()), Vae(), hints(), 1.0)
    del sd["controlnet_blocks.1.y_rms.weight"]
    with pytest.raises(ValueError, match="is incomplete"):
        load_patch(sd)
    torn = tiny_adapters.control_qwen()
    del torn["img_in.weight"]
    with pytest.raises(ValueError, match="not its blocks; use a complete file"):
        load_controlnet_state_dict(torn)
