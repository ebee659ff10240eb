"""Weights in other types and under other names: they load, and ranks add no error of their own to that of the type."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.compare import furthest, rms
from tests.e2e.server import Server
from tests.e2e.workflows import parts

FP32 = "tiny_flux_dev_bfl.safetensors"
FP8 = torch.float8_e4m3fn


def is_linear(key, weight):
    return key.endswith(".weight") and weight.ndim == 2


def scaled_fp8(weights):
    """As ComfyUI's scaled files: fp8 linears with `scale_weight`, the rest in bf16, and a marker."""
    out = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for key, weight in weights.items():
        if is_linear(key, weight):
            scale = weight.abs().max() / torch.finfo(FP8).max
            out[key] = (weight / scale).to(FP8)
            out[key.removesuffix("weight") + "scale_weight"] = scale.reshape(())
        else:
            out[key] = weight.to(torch.bfloat16)
    return out


CONVERSIONS = {
    "bf16": lambda weights: {k: v.to(torch.bfloat16) for k, v in weights.items()},
    "fp16": lambda weights: {k: v.to(torch.float16) for k, v in weights.items()},
    "fp8": lambda weights: {k: v.to(FP8) if is_linear(k, v) else v.to(torch.bfloat16) for k, v in weights.items()},
    "scaled": scaled_fp8,
}


@pytest.fixture(scope="session")
def typed(base):
    """`typed(kind)`: file name of the tiny diffusion model in another type."""

    def make(kind):
        name = f"tiny_{kind}.safetensors"
        path = os.path.join(base, "models/diffusion_models", name)
        if not os.path.isfile(path):
            save_file(CONVERSIONS[kind](load_file(os.path.join(base, "models/diffusion_models", FP32))), path)
        return name

    return make


def prompt(name, **more):
    return parts(name, **{"seed": 601, "batch": 2, "steps": 2, "cfg": 2.0, **more})


def check_no_further(several, one, exact):
    """`several` ranks are no further from the fp32 picture than one rank is; roundings fall elsewhere, hence 15 %."""
    own = rms(one, exact)
    assert rms(several, exact) <= 1.15 * own + 0.05, f"{rms(several, exact)} against {own}"
    assert rms(several, one) <= 1.6 * own + 0.05


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_types_of_files(serve, typed, kind):
    exact = serve(1).pictures(prompt(FP32))
    one = serve(1).pictures(prompt(typed(kind)))
    assert 0 < rms(one, exact) < (40 if kind in ("fp8", "scaled") else 8), "the type should be seen, but not ruin it"
    for ranks in (2, 3):
        check_no_further(serve(ranks).pictures(prompt(typed(kind))), one, exact)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_types_chosen_in_the_loader(serve, weight_dtype):
    exact = serve(1).pictures(prompt(FP32))
    wanted = prompt(FP32, weight_dtype=weight_dtype)
    one = serve(1).pictures(wanted)
    assert rms(one, exact) > 0
    check_no_further(serve(3).pictures(wanted), one, exact)


@pytest.mark.parametrize("flag", ["--bf16-unet", "--fp16-unet"])
def test_computing_in_half_precision(serve, base, flag):
    """The network itself computes in 16 bits, and so do the exchanges."""
    exact = serve(1).pictures(prompt(FP32))
    cases = [prompt(FP32), prompt(FP32, cfg=1.0, batch=1, width=112, height=80)]
    exact_small = serve(1).pictures(cases[1])
    found = {}
    for ranks in (1, 3):
        with Server(base, ranks, [flag]) as server:
            found[ranks] = [server.pictures(case) for case in cases]
    assert rms(found[1][0], exact) > 0, "the flag had no effect"
    check_no_further(found[3][0], found[1][0], exact)
    check_no_further(found[3][1], found[1][1], exact_small)


def test_names_of_diffusers(serve):
    """The same weights under diffusers' keys."""
    theirs = "tiny_flux_dev_diffusers.safetensors"
    exact = serve(1).pictures(prompt(FP32))
    for ranks in (1, 3):
        assert furthest(serve(ranks).pictures(prompt(theirs)), exact) <= 1
