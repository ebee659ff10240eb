"""Kernels of our own against the same in fp32 torch operations, with odd sizes and strides."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

SHAPES = [(1, 4608, 3072), (2, 77, 256), (3, 1, 1536), (1, 4097, 1000)]


def close(value: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within what rounding once to bf16 explains."""
    return bool((value.float() - exact).norm() / exact.norm() < 3e-3)


def draw(*shape: int) -> torch.Tensor:
    """Random bf16 numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_modulated_norms_and_gated_residuals(shape: tuple[int, int, int], per_token: bool) -> None:
    from comfy.ldm.modules.modulate import add_gated, add_gated_norm_modulate, norm_modulate

    batch, tokens, width = shape
    x, y = draw(*shape), draw(batch, 2 * tokens, width)[:, ::2]
    shift, scale, gate = draw(batch, tokens if per_token else 1, 3 * width).chunk(3, dim=-1)
    with torch.inference_mode():
        summed, normed = add_gated_norm_modulate(x, y, gate, scale, shift)
        alone = add_gated(x, y, gate)
        plain = norm_modulate(x, scale, shift)
    exact = x.float() + gate.float() * y.float()

    def norm(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(value, (width,), eps=1e-6) * (1 + scale.float()) + shift.float()

    assert close(summed, exact)
    assert torch.equal(summed, alone)
    assert close(normed, norm(summed.float()))
    assert close(plain, norm(x.float()))


@pytest.mark.parametrize("layout", ["heads", "tokens", "short runs"])
def test_copies_by_runs(layout: str) -> None:
    from comfy.ldm.modules.copy_runs import copy_runs

    if layout == "heads":
        source = draw(2, 77, 3, 24, 128)[:, :, 1].unflatten(2, (2, 12)).movedim(2, 0)
        target = torch.full((2, 2, 77, 2, 12, 128), 7.0, device="cuda", dtype=torch.bfloat16)[:, :, :, 1]
    elif layout == "tokens":
        source, target = draw(3, 50, 128), torch.zeros(3, 128, 128, device="cuda", dtype=torch.bfloat16)[:, 7:57]
    else:
        source, target = draw(9, 5, 3)[:, :, ::2], torch.zeros(9, 5, 2, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        copy_runs(source, target)
    assert torch.equal(source, target)


def test_exchange_layouts() -> None:
    """Packing and unpacking of heads on the GPU equal those on the CPU, bit by bit."""
    from comfy.taco_dit.parallel.exchange import pack_heads, unpack_heads

    qkv = draw(1, 50, 3, 24, 128).permute(2, 0, 3, 1, 4)
    for heads in (((0, 12), (12, 24)), ((0, 8), (8, 16), (16, 24)), ((0, 7), (7, 24))):
        with torch.inference_mode():
            packed = pack_heads(tuple(qkv), heads)
            assert torch.equal(packed.cpu(), pack_heads(tuple(qkv.cpu()), heads))
            counts = [b - a for a, b in heads]
            flat = draw(50 * 24 * 128)
            assert torch.equal(
                unpack_heads(flat, counts, 50, 1, 128).cpu(), unpack_heads(flat.cpu(), counts, 50, 1, 128)
            )


def test_rotated_norms() -> None:
    from comfy.ldm.flux.math import apply_rope
    from comfy.ldm.modules.norm_rope import norm_and_rotate

    qkv = draw(2, 77, 3, 24, 128).permute(2, 0, 3, 1, 4)
    table = torch.randn(1, 1, 77, 64, 2, 2, device="cuda")
    weights = draw(128), draw(128)
    with torch.inference_mode():
        rotated = norm_and_rotate(qkv[0], qkv[1], *weights, table)
        assert rotated is not None
        normed = [
            torch.nn.functional.rms_norm(part.float(), (128,), weight.float(), 1e-6)
            for part, weight in zip(qkv[:2], weights)
        ]
        exact = apply_rope(*normed, table)
    assert all(close(value, wanted) for value, wanted in zip(rotated, exact))


def test_norms_over_heads_that_other_ranks_have_too() -> None:
    """Some heads with the mean squares of all give what all heads together give for them."""
    from comfy.ldm.modules.norm_rope import norm_together_and_rotate

    x, scale = draw(2, 77, 24 * 128), draw(24 * 128)
    table = torch.randn(1, 1, 77, 64, 2, 2, device="cuda")
    means = x.float().square().mean(dim=-1, keepdim=True)
    with torch.inference_mode():
        whole = norm_together_and_rotate(x, scale, table, 128)
        for first, last in ((0, 7), (7, 24)):
            part = slice(first * 128, last * 128)
            mine = norm_together_and_rotate(x[..., part].contiguous(), scale[part], table, 128, means=means)
            assert close(mine, whole[:, first:last].float())
