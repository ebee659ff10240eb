"""Qwen-Image's picture prompts and control on a GPU equal those on the CPU: `./run_tests.sh gpu`; skipped without GPUs."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_adapters
from tests.tiny_families import TINY
from tests.tiny_models import random_weights

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def _near(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    assert (got.float().cpu() - want).abs().max() / want.abs().max() < limit


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (BF16, 0.05)])
def test_prompts_with_pictures(dtype: torch.dtype, limit: float) -> None:
    """Windows of the vision tower at both edges, and tokens among words; weights in bf16 compute in fp32."""
    from comfy.text_encoders.loader import CLIPType, load_text_encoder_state_dicts
    from tests.text import tiny

    image = torch.rand(1, 140, 196, 3, generator=torch.Generator().manual_seed(5))
    features = []
    for device, stored in ((CPU, torch.float32), (torch.device("cuda"), dtype)):
        clip = load_text_encoder_state_dicts(
            [tiny.qwen_vl(dtype=stored)], clip_type=CLIPType.QWEN_IMAGE,
            model_options={"load_device": device, "offload_device": CPU},
        )  # fmt: skip
        clip.tokenizer.qwen25_7b.tokenizer = tiny.Words()
        features.append(clip.encode_from_tokens(clip.tokenize("a fox", images=[image, image])))
    _near(features[1], features[0], limit)


@pytest.mark.gpu
def test_control() -> None:
    """InstantX's residuals and DiffSynth's patch in bf16 are near fp32 on the CPU."""
    from comfy.control.loading import load_controlnet_state_dict
    from comfy.ldm.qwen_image.control_patch import QwenImageBlockWiseControlNet, sizes_of
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch
    from tests.parallel.control_cases import FrameVae, drawn

    tiny, sd = TINY["qwen_image_edit"], tiny_adapters.diffsynth()
    image = torch.rand(1, 56, 80, 3, generator=torch.Generator().manual_seed(2))
    results = []
    for device, dtype in ((CPU, torch.float32), (torch.device("cuda"), BF16)):

        class Patcher:
            model = QwenImageBlockWiseControlNet(**sizes_of(sd))

        Patcher.model.load_state_dict(sd)
        Patcher.model.to(device, dtype).requires_grad_(False)
        network = tiny.model("cpu").diffusion_model
        network.load_state_dict(random_weights(tiny.shapes(), 1))
        network.to(device, dtype)
        control = load_controlnet_state_dict(tiny_adapters.control_qwen(), model_options={"dtype": dtype}).control_model
        control.to(device)
        call = {
            "x": drawn(2, 16, 1, 7, 10, seed=1).to(device, dtype), "context": drawn(2, 5, 40, seed=3).to(device, dtype),
        }  # fmt: skip
        times, hint = torch.tensor([0.3, 0.7], device=device), drawn(1, 16, 1, 7, 10, seed=4).to(device, dtype)
        reference = drawn(2, 16, 1, 5, 7, seed=5).to(device, dtype)
        patch = DiffSynthCnetPatch(Patcher, FrameVae(), image, 0.8)
        with torch.inference_mode():
            residuals = control(timesteps=times, hint=hint, **call)
            out = network(
                timestep=times, ref_latents=[reference], control=residuals,
                transformer_options={"patches": {"double_block": [patch]}}, **call,
            )  # fmt: skip
        results.append((torch.stack(residuals["input"][::30]), out))
    for got, want in zip(results[1], results[0]):
        _near(got, want.float(), 0.1)
