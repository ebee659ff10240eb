"""Linears in eight bits: the arithmetic, where weights are and what patches make of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import comfy.ops
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules import eight_bit, fused
from comfy.ldm.modules.eight_bit import FORMATS, FP8, INT8, BeforeGelu, Rows
from comfy.model_patcher import ModelPatcher
from comfy.weights import quantised
from tests.parallel.tiny import CONFIG, inputs, tiny_flux

CPU = torch.device("cpu")
KEY = "diffusion_model.single_blocks.1.linear1.weight"
BOUND = {"fp8": 0.08, "int8": 0.03}  # relative error of a whole network


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers whose rows differ in size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[-2]).unsqueeze(-1)


def patcher(precision: str, network: Any = None) -> ModelPatcher:
    """A tiny Flux whose weights are copied to be used."""
    model = torch.nn.Module()
    model.diffusion_model = tiny_flux() if network is None else network
    made = ModelPatcher(model, CPU, CPU)
    made.weight_store.always_copy = True
    made.weight_store.linear_precision = precision
    return made


def call(made: ModelPatcher, seed: int = 1) -> torch.Tensor:
    """One call of the network."""
    with torch.inference_mode():
        return made.model.diffusion_model(**inputs(9, 13, 11, seed=seed))


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, Frobenius."""
    return ((value.float() - exact.float()).norm() / exact.float().norm()).item()


def with_lora(made: ModelPatcher, strength: float = 0.7) -> ModelPatcher:
    """A clone with a difference of two weights, one of which stays in full precision."""
    other = made.clone()
    mod = "diffusion_model.single_blocks.1.modulation.lin.weight"
    shapes = {key: value.shape for key, value in made.model.state_dict().items()}
    other.add_patches({key: ("diff", (drawn(*shapes[key]) * 1e-3,)) for key in (KEY, mod)}, strength)
    return other


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_products_are_those_of_the_quantised_numbers(form: eight_bit.Format) -> None:
    x, weight, bias = drawn(37, 48), drawn(32, 48, seed=1), drawn(1, 32, seed=2)[0]
    rows = eight_bit.quantise(x, form)
    values, scale = eight_bit.quantise_weight(weight, form)
    out = eight_bit.product(rows, values, scale, bias)
    exact = (rows.values.double() * rows.scale) @ (values.double() * scale.unsqueeze(1)).t() + bias
    torch.testing.assert_close(out, exact.float(), rtol=1e-4, atol=1e-4 * exact.abs().max().item())
    assert error(out - bias, x @ weight.t()) < (0.06 if form is FP8 else 0.02)
    assert rows.values.dtype == values.dtype == form.dtype
    largest = rows.values.float().abs().amax(dim=1)
    assert torch.equal(largest, torch.full_like(largest, form.largest)), "the whole range is used in every row"
    zeros = eight_bit.quantise(torch.zeros(2, 48), form)
    assert torch.equal(eight_bit.product(zeros, values, scale), torch.zeros(2, 32))


def test_fused_forms_are_the_layers_one_after_the_other() -> None:
    x, more = drawn(2, 5, 32), drawn(2, 5, 64, seed=1)
    gelu = torch.nn.functional.gelu(more, approximate="tanh")
    one, two = eight_bit.quantise(x, FP8, more, gelu=True), eight_bit.quantise(torch.cat((x, gelu), -1), FP8)
    assert torch.equal(one.scale, two.scale) and torch.equal(one.values.float(), two.values.float())
    layer = comfy.ops.disable_weight_init.Linear(96, 48)
    layer.weight.data, layer.bias.data = drawn(48, 96, seed=3), torch.zeros(48)
    plain = fused.linear_of_pair(layer, x, gelu)
    torch.testing.assert_close(fused.linear_of_pair(layer, x, BeforeGelu(more)), plain)
    values, scale = eight_bit.quantise_weight(layer.weight, INT8)
    layer.weight = torch.nn.Parameter(values, requires_grad=False)
    layer.eight_bit = eight_bit.EightBit(INT8, scale)
    assert error(fused.linear_of_pair(layer, x, BeforeGelu(more)), plain) < 0.02
    first, rest = fused.split_linear(layer, torch.nn.GELU(approximate="tanh"), torch.cat((x, gelu), -1), 16)
    assert isinstance(rest, Rows)
    after = fused.split_linear_rest(layer, torch.nn.GELU(approximate="tanh"), rest, 16)
    assert isinstance(after, BeforeGelu)
    torch.testing.assert_close(torch.cat((first, after.tokens), -1), layer(torch.cat((x, gelu), -1)))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_network_is_near_the_exact_one_in_half_the_memory(precision: str) -> None:
    exact, made = patcher("bf16", tiny_flux().bfloat16()), patcher(precision, tiny_flux().bfloat16())
    arguments = {name: value.bfloat16() for name, value in inputs(9, 13, 11).items()}
    outs = []
    for each in (exact, made):
        each.patch_model(CPU)
        outs.append(each.model.diffusion_model(**arguments))
    assert 1e-3 < error(outs[1], outs[0]) < BOUND[precision]
    network = made.model.diffusion_model
    assert network.single_blocks[0].linear1.weight.dtype == FORMATS[precision].dtype
    for layer in (network.img_in, network.final_layer.linear, network.single_blocks[0].modulation.lin):
        assert layer.weight.dtype == torch.bfloat16 and layer.eight_bit is None
    assert made.loaded_size() == made.model_size() < 0.75 * exact.loaded_size()
    assert made.partially_load(CPU, 1) == 0, "what is loaded is loaded"


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_lora_comes_and_goes_in_place_and_leaves_the_same_bytes(precision: str) -> None:
    made = patcher(precision)
    made.patch_model(CPU)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    scale = made.model.diffusion_model.single_blocks[1].linear1.eight_bit.scale
    plain, kept, version = call(made), scale.clone(), made.weight_store.layout_version
    lora = with_lora(made)
    lora.patch_model(CPU)
    patched = call(made)
    assert error(patched, plain) > 1e-3
    fresh = with_lora(patcher(precision))
    fresh.patch_model(CPU)
    assert torch.equal(call(fresh), patched)
    made.patch_model(CPU)
    now = made.model.state_dict()
    assert all(torch.equal(now[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)
    assert made.model.diffusion_model.single_blocks[1].linear1.eight_bit.scale is scale and torch.equal(scale, kept)
    assert made.weight_store.layout_version == version, "captured graphs stay valid"
    assert torch.equal(call(made), plain)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_weights_that_wait_in_host_memory_give_the_same(precision: str) -> None:
    whole, part = (with_lora(patcher(precision)) for _ in range(2))
    whole.patch_model(CPU)
    part.patch_model(CPU, lowvram_model_memory=whole.loaded_size() // 2)
    assert part.weight_store.partly_loaded
    torch.testing.assert_close(call(part), call(whole), rtol=1e-5, atol=1e-5)
    part.partially_unload(CPU, part.loaded_size() // 2)
    torch.testing.assert_close(call(part), call(whole), rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_in_full_precision() -> None:
    exact, made = with_lora(patcher("bf16")), with_lora(patcher("int8"))
    for each in (exact, made):
        each.patch_model(CPU)
    assert made.model.state_dict()[KEY].dtype == torch.int8
    made.partially_load(CPU, 1 << 30, force_patch_weights=True)
    for key, value in exact.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[key], value), key
    made.partially_load(CPU, 1 << 30)
    assert made.model.state_dict()[KEY].dtype == torch.int8
    made.unpatch_model(CPU)
    assert torch.equal(call(made), call(patcher("bf16"))), "originals are as they were"


def test_a_copy_of_the_network_has_scales_of_its_own() -> None:
    made = patcher("fp8")
    made.patch_model(CPU)
    other = copy.deepcopy(made.model)
    with torch.inference_mode():
        assert torch.equal(other.diffusion_model(**inputs(9, 13, 11)), call(made))
    mine, its = (m.diffusion_model.single_blocks[0].linear2 for m in (made.model, other))
    assert its.eight_bit is not mine.eight_bit and its.eight_bit.scale is not mine.eight_bit.scale
    record = other.weight_store.weight("diffusion_model.single_blocks.0.linear2.weight")
    assert record.eight_bit is its.eight_bit


def test_a_wrapped_weight_is_real_to_the_wrapper() -> None:
    made = patcher("int8")
    made.patch_model(CPU)
    layer = made.model.diffusion_model.single_blocks[1].linear1
    x, original = drawn(6, 96), made.weight_store.source(KEY)
    seen = []
    layer.weight_function.append(lambda weight: seen.append(weight) or weight * 2)
    assert error(layer(x) - layer.bias, 2 * x @ original.t()) < 0.02
    assert error(seen[0], original) < 0.01 and not eight_bit.reads_rows(layer)


def scaled_network(precision: str) -> Any:
    """A tiny Flux from a scaled-fp8 file: weights are stored times a scale; and the same in fp32."""
    exact = tiny_flux()
    operations = comfy.ops.scaled_fp8_ops(scale_input=True)
    made = Flux(**CONFIG, operations=operations).eval().requires_grad_(False)
    stored = {}
    for name, value in exact.state_dict().items():
        owner = name.rpartition(".")[0]
        if name.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            stored[name], stored[f"{owner}.scale_weight"] = (value / scale).to(torch.float8_e4m3fn), scale
            value.copy_(stored[name].float() * scale)
        else:
            stored[name] = value
    made.load_state_dict(stored, strict=False, assign=True)
    return patcher(precision, made), patcher("bf16", exact)


@pytest.mark.parametrize("precision", ["auto", "fp8", "int8"])
def test_scaled_fp8_files(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    made, exact = scaled_network(precision)
    for each in (made, exact):
        each.patch_model(CPU)
    layer = made.model.diffusion_model.single_blocks[1].linear1
    assert layer.eight_bit.form is (INT8 if precision == "int8" else FP8)
    assert made.model.diffusion_model.img_in.eight_bit is None
    if precision != "int8":
        original = made.weight_store.source(KEY)
        assert torch.equal(layer.weight.view(torch.uint8), original.view(torch.uint8)), "not quantised again"
        assert torch.equal(layer.eight_bit.scale, layer.scale_weight.expand(layer.out_features))
    assert error(call(made), call(exact)) < BOUND["fp8"]
    waiting, _ = scaled_network(precision)
    waiting = with_lora(waiting)
    waiting.patch_model(CPU, lowvram_model_memory=1)
    lora = with_lora(exact)
    lora.patch_model(CPU)
    assert error(call(waiting), call(lora)) < BOUND["fp8"]


def test_auto_leaves_other_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    assert not quantised.formats(patcher("auto").weight_store, CPU)
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: False)
    made, _ = scaled_network("auto")
    made.patch_model(CPU)
    assert made.model.diffusion_model.single_blocks[1].linear1.eight_bit is None
