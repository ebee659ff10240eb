"""Rounding to fp8 without bias."""

from __future__ import annotations

import torch


def stochastic_rounding(value: torch.Tensor, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Round to `dtype`; fp8 values are rounded up or down at random, in proportion to their distance.

    The generator lives on the value's device and is seeded with `seed`, so ranks that round the same tensor agree.
    """
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return value.to(dtype)
    mantissa_bits, min_exponent = (3, -6) if dtype == torch.float8_e4m3fn else (2, -14)
    limits = torch.finfo(dtype)
    generator = torch.Generator(device=value.device)
    generator.manual_seed(seed)
    exact = value.to(torch.float32)
    _, exponent = torch.frexp(exact)
    # frexp's mantissa lies in [0.5, 1): the leading bit has the value 2^(exponent - 1).
    ulp = torch.exp2((exponent - 1).clamp(min=min_exponent).to(torch.float32) - mantissa_bits)
    dither = torch.rand(exact.shape, dtype=torch.float32, device=value.device, generator=generator)
    rounded = torch.floor(exact / ulp + dither) * ulp
    return rounded.clamp(min=limits.min, max=limits.max).to(dtype)
