"""Attention functions agree with each other, with and without fused kernels, masks and overrides."""

from __future__ import annotations

import pytest
import torch

import comfy.ldm.modules.attention as attention
from comfy.ldm.dit import DenoiserCall, Tokens


def draw(*shape: int) -> torch.Tensor:
    """Random values of a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MASKS = {
    "none": None,
    "added": draw(7, 9),
    "boolean": torch.arange(63).reshape(7, 9) % 4 != 1,
    "per picture": draw(2, 7, 9),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("function", ["pytorch", "basic", "split"])
def test_functions_agree(function: str, mask: str) -> None:
    q, k, v = draw(2, 7, 24), draw(2, 9, 24), draw(2, 9, 24)
    heads = [t.unflatten(-1, (3, -1)).transpose(1, 2) for t in (q, k, v)]
    kept = MASKS[mask] if MASKS[mask] is None or MASKS[mask].ndim == 2 else MASKS[mask].unsqueeze(1)
    want = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=kept)
    named = attention.get_attention_function(function)
    torch.testing.assert_close(
        named(q, k, v, 3, mask=MASKS[mask]), want.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5
    )
    shaped = named(*heads, 3, mask=MASKS[mask], skip_reshape=True, skip_output_reshape=True)
    torch.testing.assert_close(shaped, want, rtol=1e-5, atol=1e-5)


def test_written_out_equals_fused() -> None:
    q, k, v = draw(1, 2, 5, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 8)
    fused = attention.scaled_dot_product(q, k, v)
    attention.use_fused_attention(False)
    try:
        assert "written out" in attention.describe_backend(torch.device("cpu"))
        torch.testing.assert_close(attention.scaled_dot_product(q, k, v), fused)
    finally:
        attention.use_fused_attention(True)


def test_override_is_called_once_and_may_call_the_original() -> None:
    q = draw(1, 2, 5, 8)
    seen = []

    def override(original, *args, **kwargs):
        seen.append(args[3])
        return original(*args, **kwargs) * 2

    options = {"optimized_attention_override": override}
    spec = attention.AttentionSpec(2, Tokens((5,)))
    plain = attention.attention(q, q, q, spec, DenoiserCall())
    torch.testing.assert_close(attention.attention(q, q, q, spec, DenoiserCall(options=options)), plain * 2)
    assert seen == [2]


def test_unknown_function_is_named() -> None:
    with pytest.raises(KeyError, match="no attention function 'nothing'"):
        attention.get_attention_function("nothing")
    assert attention.get_attention_function("nothing", None) is None
