"""Parts that packs reach under ComfyUI's names, and that the program itself uses in another form or not at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import comfy.model_management as management
import comfy.utils

CPU = torch.device("cpu")


def test_steps_of_dpm_solver() -> None:
    """Each step is exact enough for x' = -x / sigma-like denoisers, and known slopes are not evaluated again."""
    from comfy.k_diffusion.sampling import DPMSolver, PIDStepSizeController, sample_dpm_fast

    calls, told = [], []

    def model(x: torch.Tensor, sigma: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        calls.append(sigma[0].item())
        return x * scale / (1 + sigma[0] ** 2)  # the denoiser of a unit Gaussian

    x, solver = torch.full((1, 1, 2, 2), 3.0), DPMSolver(model, {"scale": 1.0}, eps_callback=lambda: told.append(1))
    sigma = torch.tensor([4.0, 2.0])
    t, t_next = solver.t(sigma)
    torch.testing.assert_close(solver.sigma(solver.t(sigma)), sigma)
    exact = x * ((1 + 2.0**2) / (1 + 4.0**2)) ** 0.5
    errors = []
    slopes: dict[str, torch.Tensor] = {}
    for order, expected in ((1, 1), (2, 1), (3, 2)):
        before = len(calls)
        step = getattr(solver, f"dpm_solver_{order}_step")
        made, slopes = step(x, t, t_next, eps_cache={"eps": slopes["eps"]} if slopes else None)
        errors.append((made - exact).abs().max().item())
        assert len(calls) - before == expected
    assert errors[0] > errors[1] > errors[2] and len(told) == len(calls) and set(slopes) == {"eps", "eps_r1", "eps_r2"}
    made, _ = solver.dpm_solver_3_step(x, t, t_next)
    again, _ = solver.dpm_solver_3_step(x, t, t_next, eps_cache=slopes)
    assert torch.equal(made, again)
    fast = solver.dpm_solver_fast(x, t, t_next, 5)
    torch.testing.assert_close(fast, sample_dpm_fast(model, x, 2.0, 4.0, 5, disable=True))
    adaptive, info = solver.dpm_solver_adaptive(x, t, t_next, rtol=1e-3)
    torch.testing.assert_close(adaptive, exact, atol=1e-2, rtol=0)
    assert info["n_accept"] > 0
    control = PIDStepSizeController(0.1, 0.0, 1.0, 0.0, order=2)
    assert not control.propose_step(100.0) and control.h < 0.1
    assert control.propose_step(0.01) and control.limiter(1.0) == 1.0


def test_configurations_of_unets() -> None:
    import comfy.model_detection as detection
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    old = {
        "channel_mult": [1, 2, 4],
        "num_res_blocks": 2,
        "attention_resolutions": [2, 4],
        "transformer_depth": 1,
        "a": 3,
    }
    new = detection.convert_config(old)
    assert new == {
        "channel_mult": [1, 2, 4], "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 1, 1, 1, 1],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "transformer_depth_middle": 1, "a": 3,
    } and old["num_res_blocks"] == 2  # fmt: skip
    sizes = {
        "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attention_resolutions": [1, 2, 4],
        "transformer_depth": 1,
    }
    config = {**detection.convert_config(sizes), "model_channels": 320, "context_dim": 768, "num_heads": 8}
    network = UNetModel(in_channels=4, out_channels=4, device="meta", **config)
    weights = network.state_dict()
    theirs = {a: weights[b] for a, b in comfy.utils.unet_to_diffusers(config).items() if b in weights}
    found = detection.unet_config_from_diffusers_unet(theirs, torch.float16)
    assert found is not None and found["dtype"] == torch.float16 and found["context_dim"] == 768
    assert {name: found[name] for name in config if name != "num_heads"} == {
        k: v for k, v in config.items() if k != "num_heads"
    }
    assert type(detection.model_config_from_diffusers_unet(theirs)).__name__ == "SD15"
    for nothing in (detection.unet_config_from_diffusers_unet, detection.model_config_from_diffusers_unet):
        assert nothing({"x": torch.zeros(1)}) is None


def test_signatures_under_comfyuis_name() -> None:
    import asyncio

    import nodes
    from comfy_execution.caching import CacheKeySetInputSignature, include_unique_id_in_input
    from comfy_execution.graph import DynamicPrompt

    class Asking:
        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}, "hidden": {"id": "UNIQUE_ID"}}

    size = {"width": 8, "height": 8, "batch_size": 1, "color": 0}
    prompt = {key: {"class_type": "EmptyImage", "inputs": dict(size)} for key in ("1", "2")}
    prompt["3"] = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    prompt["4"] = {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}}
    prompt["5"] = {"class_type": "EmptyImage", "inputs": {**size, "color": 1}}

    async def unchanged(node_id: str) -> bool:
        return False

    keys = CacheKeySetInputSignature(DynamicPrompt(prompt), prompt.keys(), SimpleNamespace(get=unchanged))
    asyncio.run(keys.add_keys([*prompt, "nowhere"]))
    made = {node_id: keys.get_data_key(node_id) for node_id in prompt}
    assert made["1"] == made["2"] != made["5"] and made["3"] == made["4"] != made["1"]
    assert keys.all_node_ids() == set(prompt) and keys.get_data_key("nowhere") is None
    nodes.NODE_CLASS_MAPPINGS["Asking"] = Asking
    try:
        assert include_unique_id_in_input("Asking") and not include_unique_id_in_input("EmptyImage")
    finally:
        del nodes.NODE_CLASS_MAPPINGS["Asking"]


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    from comfy.k_diffusion.utils import FolderOfImages

    (tmp_path / "b").mkdir()
    for name, colour in (("b/x.PNG", 10), ("a.jpg", 200)):
        Image.new("L", (2, 3), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    found = FolderOfImages(tmp_path, transform=lambda picture: (picture.mode, picture.size))
    assert len(found) == 2 and found[0] == (("RGB", (2, 3)),) and ".webp" in FolderOfImages.IMG_EXTENSIONS


def test_encoders_with_more_positions() -> None:
    from comfy.text_encoders.long_clipl import model_options_long_clip

    layer, table = "text_model.encoder.layers.10.mlp.fc1.weight", "text_model.embeddings.position_embedding.weight"
    usual, long = ({layer: torch.zeros(1), table: torch.zeros(count, 4)} for count in (77, 248))
    assert model_options_long_clip(usual, {}, {"a": 1}) == ({}, {"a": 1})
    data, options = model_options_long_clip(long, {"b": 2}, {"clip_l_model_config": {"hidden_act": "gelu"}})
    assert data == {"b": 2, "clip_l_max_length": 248}
    assert options == {"clip_l_model_config": {"hidden_act": "gelu", "max_position_embeddings": 248}}
    data, _ = model_options_long_clip({f"clip_g.{table}": torch.zeros(200, 4)}, {}, {})
    assert data == {"clip_g_max_length": 200}


def test_flags_and_limits_that_packs_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors
    from safetensors.torch import save_file

    path = str(tmp_path / "a.safetensors")
    save_file({"x": torch.arange(3.0)}, path)
    assert comfy.utils.DISABLE_MMAP is False and not comfy.utils.MMAP_TORCH_FILES
    opened = []
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True, raising=False)
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *a, real=safetensors.safe_open, **k: opened.append(a) or real(*a, **k)
    )
    assert comfy.utils.load_torch_file(path)["x"].tolist() == [0, 1, 2] and len(opened) == 1
    monkeypatch.setattr(management, "EXTRA_RESERVED_VRAM", 3 * 2**30)
    assert management.extra_reserved_memory() == 3 * 2**30 <= management.minimum_inference_memory()
    management.raise_non_oom(torch.OutOfMemoryError())
    with pytest.raises(KeyError):
        management.raise_non_oom(KeyError())
    assert management.current_stream(CPU) is None and not management.pin_memory(torch.ones(1))
    assert management.intermediate_dtype() == torch.float32 and not management.in_training


def test_attention_of_vaes() -> None:
    from comfy.ldm.modules.diffusionmodules.model import AttnBlock, vae_attention

    q, k, v = (torch.randn(1, 4, 2, 3) for _ in range(3))
    scores = (q.flatten(2).transpose(1, 2) @ k.flatten(2) / 2).softmax(-1)
    want = (scores @ v.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(v.shape)
    torch.testing.assert_close(vae_attention()(q, k, v), want)
    block = AttnBlock(32)
    block.optimized_attention = lambda q, k, v: torch.zeros_like(v)  # as packs replace it
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 32, 2, 2)
    assert torch.equal(block(x), x)
