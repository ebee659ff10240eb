"""The seven nodes that change a UNet from inside, on a tiny one."""

from __future__ import annotations

import pytest
import torch

import comfy.supported_models
from comfy.taco_dit import TACODiTModelPatcher
from comfy_extras import nodes_freelunch, nodes_hypertile, nodes_sag, nodes_tomesd
from tests.nodes.helpers import run
from tests.parallel.tiny import UNET, tiny_unet


@pytest.fixture(scope="module")
def model():
    changes = {"num_classes": None, "adm_in_channels": None, "transformer_depth": [1, 2]}
    config = comfy.supported_models.SD15({**UNET, **changes})
    config.unet_config |= {"num_heads": -1, "num_head_channels": 32}
    config.set_inference_dtype(torch.float32, None)
    built = config.get_model({}, device=torch.device("cpu"))
    built.diffusion_model.load_state_dict(tiny_unet(**changes).state_dict())
    return TACODiTModelPatcher(built.eval(), torch.device("cpu"), torch.device("cpu"))


def sampled(all_nodes, model, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    prompts = [[[torch.randn(1, 7, 24, generator=generator), {}]] for _ in range(2)]
    return run(
        all_nodes, "KSampler", model=model, seed=3, steps=3, cfg=3.0, sampler_name="euler", scheduler="normal",
        positive=prompts[0], negative=prompts[1], latent_image={"samples": torch.zeros(1, 4, height, width)}, denoise=1.0,
    )[0]["samples"]  # fmt: skip


NODES = {
    "FreeU": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "FreeU_V2": {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2},
    "HyperTile": {"tile_size": 1, "swap_size": 1, "max_depth": 0, "scale_depth": False},
    "PatchModelAddDownscale": {
        "block_number": 1, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.5,
        "downscale_after_skip": True, "downscale_method": "bicubic", "upscale_method": "bicubic",
    },
    "PerturbedAttentionGuidance": {"scale": 3.0},
    "SelfAttentionGuidance": {"scale": 0.5, "blur_sigma": 2.0},
    "TomePatchModel": {"ratio": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_each_changes_the_result_of_its_clone_only(all_nodes, model, name):
    before = sampled(all_nodes, model)
    patched = run(all_nodes, name, model=model, **NODES[name])[0]
    changed = sampled(all_nodes, patched)
    assert torch.isfinite(changed).all() and (changed - before).abs().max() > 1e-3
    torch.testing.assert_close(sampled(all_nodes, patched), changed)
    torch.testing.assert_close(sampled(all_nodes, model), before)


def test_strengths_that_change_nothing(all_nodes, model):
    before = sampled(all_nodes, model, 9, 13)
    for name, values in {
        "FreeU": {"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0},
        "FreeU_V2": {"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0},
        "PerturbedAttentionGuidance": {"scale": 0.0},
        "SelfAttentionGuidance": {"scale": 0.0, "blur_sigma": 2.0},
        "TomePatchModel": {"ratio": 0.0},
        "HyperTile": NODES["HyperTile"],  # no tile of 4 cells divides 9 or 13
    }.items():
        after = sampled(all_nodes, run(all_nodes, name, model=model, **values)[0], 9, 13)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3, msg=name)


def test_free_u_scales_low_frequencies():
    constant = torch.full((1, 2, 7, 6), 3.0)
    torch.testing.assert_close(nodes_freelunch.scale_low_frequencies(constant, 1, 0.2), constant * 0.2)
    fine = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8).contiguous()
    torch.testing.assert_close(nodes_freelunch.scale_low_frequencies(fine, 1, 0.2), fine)


def test_tiles_come_back_in_order():
    tiles = nodes_hypertile._Tiles(32, 1, 0, False)
    q = torch.randn(2, 64, 5)
    cut, k, v = tiles.cut(q, q, q, {"original_shape": [2, 4, 8, 8]})
    assert cut.shape == k.shape == v.shape == (2 * 4, 16, 5)
    torch.testing.assert_close(cut[0, :5], q[0, [0, 1, 2, 3, 8]])
    torch.testing.assert_close(tiles.join(cut, {}), q)


def test_merged_tokens_come_back_as_means():
    torch.manual_seed(0)
    x = torch.randn(2, 9 * 6, 16)
    merging = nodes_tomesd.Merging(x, 9, 6, 20)
    assert merging.apply(x).shape == (2, 34, 16)
    back = merging.undo(merging.apply(x))
    same = (back == x).all(dim=-1)
    assert back.shape == x.shape and same.sum(dim=1).min() > 10
    equal = torch.ones(1, 16, 3)
    torch.testing.assert_close((lambda m: m.undo(m.apply(equal)))(nodes_tomesd.Merging(equal, 4, 4, 8)), equal)


def test_blur_where_others_look():
    x = torch.randn(1, 4, 12, 8)
    nobody = torch.zeros(1, 2, 24, 24)
    torch.testing.assert_close(nodes_sag.create_blur_map(x, nobody, 2.0), x)
    everywhere = torch.full((1, 2, 24, 24), 1.0)
    blurred = nodes_sag.create_blur_map(x, everywhere, 2.0)
    torch.testing.assert_close(blurred, nodes_sag.gaussian_blur_2d(x, 9, 2.0))
    assert blurred.std() < 0.6 * x.std()
    assert nodes_sag.grid_of(24, 12, 8) == (6, 4) and nodes_sag.grid_of(7, 1, 1) == (1, 7)
