"""Products in eight bits, the kernels that write them, and captured calls with them and with a step cache, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comfy.ldm.modules import eight_bit
from comfy.ldm.modules.eight_bit import FORMATS, Format

pytestmark = pytest.mark.gpu

SAME = 0.01  # captured and plain launches may sum in another order, which tips single roundings over
SHAPES = [(1, 4608, 3072), (2, 77, 256), (3, 1, 1536), (1, 513, 15360)]


def draw(*shape: int) -> torch.Tensor:
    """Random bf16 numbers on the GPU, rows of different size."""
    rows = torch.logspace(-2, 2, shape[-2], device="cuda").unsqueeze(-1)
    return (torch.randn(shape, device="cuda") * rows).to(torch.bfloat16)


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, Frobenius, of rows of equal weight."""
    norm = exact.float().norm(dim=-1, keepdim=True).clamp(min=1e-9)
    return (((value.float() - exact.float()) / norm).norm() / norm.numel() ** 0.5).item()


def alike(rows: eight_bit.Rows, other: eight_bit.Rows) -> None:
    """The same but for numbers on the edge between two steps."""
    torch.testing.assert_close(rows.scale, other.scale, rtol=1e-4, atol=0)
    same = (rows.values.float() - other.values.float()).abs() == 0
    assert same.float().mean() > 0.995
    assert error(rows.values.float() * rows.scale, other.values.float() * other.scale) < 0.01


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_write_what_torch_operations_write(form: Format, shape: tuple[int, ...]) -> None:
    from comfy.ldm.modules import modulate

    x, second = draw(*shape), draw(*shape[:-1], 2 * shape[-1])[..., :512]
    scale, shift, gate = torch.randn(shape[0], 1, 3 * shape[-1], device="cuda", dtype=torch.bfloat16).chunk(3, dim=-1)
    with torch.inference_mode():
        for made, plain in (
            (eight_bit.quantise(x, form), eight_bit.quantise(x.cpu(), form)),
            (eight_bit.quantise(x, form, gelu=True), eight_bit.quantise(x.cpu(), form, gelu=True)),
            (
                eight_bit.quantise(x, form, second, gelu=True),
                eight_bit.quantise(x.cpu(), form, second.cpu(), gelu=True),
            ),
        ):
            alike(made, on_gpu(plain))
        if shape[-1] > 8192:
            return
        normed = modulate.norm_modulate_rows(x, scale, shift, form)
        exact = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale.float()) + shift.float()
        alike(normed, on_gpu(eight_bit.quantise(exact.cpu(), form)))
        summed, rows = modulate.add_gated_norm_modulate_rows(x, x, gate, scale, shift, form)
        plain_sum, plain_norm = modulate.add_gated_norm_modulate(x, x, gate, scale, shift)
        assert torch.equal(summed, plain_sum)
        assert error(rows.values.float() * rows.scale, plain_norm) < 0.04


def on_gpu(rows: eight_bit.Rows) -> eight_bit.Rows:
    """The same on the GPU."""
    return rows._replace(values=rows.values.cuda(), scale=rows.scale.cuda())


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("rows", [1, 16, 77, 4608])
@pytest.mark.parametrize("biased", [False, True])
def test_products(form: Format, rows: int, biased: bool) -> None:
    x, weight = draw(1, rows, 3072), draw(1024, 3072)
    bias = torch.randn(1024, device="cuda", dtype=torch.bfloat16) if biased else None
    values, scale = eight_bit.quantise_weight(weight, form)
    with torch.inference_mode():
        made = eight_bit.quantise(x, form)
        out = eight_bit.product(made, values, scale, bias)
        exact = (made.values.float() * made.scale) @ (values.float() * scale.unsqueeze(1)).t()
        exact = exact if bias is None else exact + bias.float()
    assert out.dtype == torch.bfloat16 and out.shape == (1, rows, 1024)
    assert error(out, exact) < 5e-3
    part = eight_bit.product(made, values[:512], scale[:512], None if bias is None else bias[:512])
    assert error(part, exact[..., :512]) < 5e-3


def flux(linear: str, **optimization: Any) -> Any:
    """(engine, patcher) of a small Flux in bf16."""
    from comfy.supported_models import Flux
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import OptimizationConfig, TacoConfig
    from comfy.taco_dit.core.model_wrapper import TACODiTModelPatcher
    from tests.parallel.tiny import CONFIG

    device = torch.device("cuda", 0)
    runtime.activate(
        runtime.single(TacoConfig(optimization=OptimizationConfig(linear_precision=linear, **optimization)))
    )
    sizes = {**CONFIG, "hidden_size": 256, "num_heads": 4, "axes_dim": [16, 24, 24]}
    family = Flux({"image_model": "flux", **sizes})
    family.set_inference_dtype(torch.bfloat16, None)
    model = family.get_model({}, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.05
        parameter.data.normal_(0, size, generator=generator)
    patcher = TACODiTModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
    patcher.patch_model(device)
    return runtime.current().engine, patcher


def sampled(engine: Any, patcher: Any, steps: int = 12) -> torch.Tensor:
    """A run of Euler's method."""
    from comfy.denoiser_batch import DenoiserBatch

    generator = torch.Generator().manual_seed(1)
    sigmas = torch.cat([torch.linspace(1, 0.1, steps), torch.zeros(1)])
    conditioning = {
        "c_crossattn": torch.randn(1, 33, 40, generator=generator).to("cuda", torch.bfloat16),
        "y": torch.randn(1, 24, generator=generator).to("cuda", torch.bfloat16),
        "guidance": torch.full((1,), 3.5, device="cuda"),
        "transformer_options": {"sample_sigmas": sigmas},
    }
    x = torch.randn(1, 16, 34, 46, generator=generator).cuda()
    engine.begin_run()
    with torch.inference_mode():
        for now, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
            batch = DenoiserBatch(x, torch.full((1,), now, device="cuda"), conditioning, [0], 1)
            denoised = patcher.evaluate_batches(patcher.model, [batch], {"transformer_options": {}})[0]
            x = x + (x - denoised) / now * (following - now)
    engine.end_run()
    engine.runner.end_run()
    if engine.step_cache is not None:
        engine.step_cache.end_run()
    return x.float()


@pytest.fixture(autouse=True)
def _no_runtime_stays() -> Any:
    from comfy.taco_dit import runtime

    yield
    runtime.activate(None)


@pytest.mark.parametrize("linear", ["fp8", "int8"])
def test_captured_calls_see_a_lora_that_comes_and_goes(linear: str) -> None:
    exact = sampled(*flux("bf16"))
    engine, patcher = flux(linear)
    plain = sampled(engine, patcher)
    assert 1e-4 < error(plain, exact) < 0.5
    captured = engine.runner.status()["captured_calls"]
    assert captured == 1 and error(sampled(engine, patcher), plain) < SAME
    key = "diffusion_model.single_blocks.1.linear1.weight"
    lora = patcher.clone()
    lora.add_patches({key: ("diff", (torch.full(patcher.model.state_dict()[key].shape, 0.1),))}, 1.0)
    lora.patch_model(patcher.load_device)
    patched = sampled(engine, lora)
    assert error(patched, plain) > 5 * SAME
    patcher.patch_model(patcher.load_device)
    assert error(sampled(engine, patcher), plain) < SAME
    assert engine.runner.status()["captured_calls"] == captured, "nothing was captured again"


@pytest.mark.parametrize("mode", ["first_block", "interval"])
def test_captured_calls_with_a_step_cache_are_the_plain_ones(mode: str) -> None:
    cache = {
        "use_cache": True,
        "cache_mode": mode,
        "cache_threshold": 0.95,
        "cache_interval": 2,
        "cache_warm_up_steps": 3,
    }
    plain_engine, patcher = flux("bf16", use_cuda_graph=False, **cache)
    plain = sampled(plain_engine, patcher)
    engine, patcher = flux("bf16", **cache)
    for _ in range(2):
        fast = sampled(engine, patcher)
        assert engine.step_cache.steps == plain_engine.step_cache.steps and any(engine.step_cache.steps)
        assert error(fast, plain) < 1e-3
    assert engine.runner.status()["captured_calls"] >= 1
    zero, patcher = flux("bf16", use_cache=True, cache_threshold=0.0)
    without, other = flux("bf16")
    assert error(sampled(zero, patcher), sampled(without, other)) < 1e-3


def test_attention_kernels_are_measured(tmp_path: Any) -> None:
    from comfy.ldm.modules import attention_choice, kernels

    device = torch.device("cuda", 0)
    chosen, why = attention_choice.choose(device, "auto", str(tmp_path / "attention.json"))
    assert set(chosen) == {64, 128} and "measured" in why
    q = torch.randn(1, 6, 517, 64, device="cuda", dtype=torch.bfloat16)
    want = torch.nn.functional.scaled_dot_product_attention(q.float(), q.float(), q.float())
    kernels.use_kernels(chosen, why)
    try:
        assert error(kernels.run(q, q, q)[0], want) < 0.01
    finally:
        kernels.use_kernels({})
