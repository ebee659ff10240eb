"""Every family on a GPU, in bf16 with fused kernels and captured calls: `./run_tests.sh gpu`; skipped without GPUs."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_families import TINY
from tests.tiny_models import random_weights


def _loaded(name: str, dtype: torch.dtype):
    """(model, arguments of its network without latents and times) on the GPU."""
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

    tiny, device = TINY[name], torch.device("cuda")
    weights = {key: value.to(dtype) for key, value in random_weights(tiny.shapes(), 1).items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": dtype}, tiny.metadata).model
    ModelPatcher(model, device, torch.device("cpu")).patch_model(device)
    text, fields = tiny.conditioning(1)[0]
    conds = model.extra_conds(cross_attn=text, noise=tiny.latent(1, 9, 13), device=device, **fields)
    values = {key: value.cond for key, value in conds.items()}
    values["context"] = values.pop("c_crossattn")

    def moved(value):
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.to(device, dtype if value.is_floating_point() else None) if torch.is_tensor(value) else value

    guidance = values.pop("guidance", None)  # stays in fp32: networks multiply it by 1000, which bf16 would round
    kept = {} if guidance is None else {"guidance": guidance.to(device)}
    return model, {**{key: moved(value) for key, value in values.items()}, **kept}


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_bf16_and_captured_calls(name: str) -> None:
    """bf16 is near fp32, and a captured call, replayed with other latents and times, is the plain call."""
    from comfy.taco_dit.fast.captured_calls import CapturedCalls

    exact, exact_values = _loaded(name, torch.float32)
    model, values = _loaded(name, torch.bfloat16)
    known = exact_values.pop("c_concat", None), values.pop("c_concat", None)
    calls = CapturedCalls(compile_stages=False, cuda_graph=True)
    calls.begin_run()
    with torch.inference_mode():
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(TINY[name].latent(1, 9, 13).shape, generator=generator).cuda()
            t = torch.tensor([0.2 + 0.2 * seed], device="cuda")
            half = x.bfloat16()
            if known[0] is not None:
                x, half = (torch.cat((latent, image), dim=1) for latent, image in zip((x, half), known))
            want = exact.diffusion_model(x, t, **exact_values)
            plain = model.diffusion_model(half, t, **values).float()
            fast = calls.bound(model, None)(half, t, **values).float()
            scale = want.abs().max()
            assert (plain - want).abs().max() / scale < 0.1
            assert (fast - want).abs().max() / scale <= 1.5 * (plain - want).abs().max() / scale + 2e-3
    assert calls.status()["captured_calls"] == 1
