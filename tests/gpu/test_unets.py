"""UNets on a GPU: captured calls, and half precision."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captured_equals_plain(dtype: torch.dtype) -> None:
    """A captured call of a UNet is its plain call, and that is fp32's up to rounding, at even and odd sizes."""
    from comfy.model_patcher import ModelPatcher
    from comfy.taco_dit.fast.captured_calls import CapturedCalls
    from tests.parallel.tiny import tiny_unet

    device = torch.device("cuda")
    model = torch.nn.Module()
    model.diffusion_model = tiny_unet().to(dtype)
    ModelPatcher(model, device, torch.device("cpu")).patch_model(device)
    reference = tiny_unet().cuda()
    calls = CapturedCalls(compile_stages=False, cuda_graph=True)
    calls.begin_run()
    with torch.inference_mode():
        for height, width, seed in ((16, 16, 1), (16, 16, 2), (16, 16, 3), (9, 13, 4), (9, 13, 5), (9, 13, 6)):
            generator = torch.Generator().manual_seed(seed)
            x, context, y = (
                torch.randn(shape, generator=generator).cuda().to(dtype)
                for shape in ((2, 4, height, width), (2, 7, 24), (2, 48))
            )
            times = torch.tensor([900.0, 20.0], device=device)
            plain = model.diffusion_model(x, times, context=context, y=y).float()
            exact = reference(x.float(), times, context=context.float(), y=y.float())
            fast = calls.bound(model, None)(x, times, context=context, y=y).float()
            scale = exact.abs().max()
            assert (plain - exact).abs().max() / scale < 0.05
            assert (fast - exact).abs().max() / scale <= 1.5 * (plain - exact).abs().max() / scale + 2e-3
    assert calls.status()["captured_calls"] == 2
