"""Attention: the only place where tokens meet.

`attention` is what networks call. With a token plan active it exchanges tokens between ranks around the kernel; without
one it is `optimized_attention`, ComfyUI's name for "the best kernel there is". Custom nodes replace
`optimized_attention` (by assignment, or per call through `transformer_options["optimized_attention_override"]`);
both see all tokens of the heads they are given.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from comfy.ldm import dit
from comfy.missing import missing_names

REGISTERED_ATTENTION_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {}


def register_attention_function(name: str, func: Callable[..., torch.Tensor]) -> None:
    """Offer an attention function under a name; a later registration of the same name is ignored."""
    if name in REGISTERED_ATTENTION_FUNCTIONS:
        logging.warning("attention function %s is registered already; the first one stays", name)
        return
    REGISTERED_ATTENTION_FUNCTIONS[name] = func


def get_attention_function(name: str, default: Any = ...) -> Any:
    """A registered attention function; `optimized` is the one in use. Raises KeyError without a default."""
    if name == "optimized":
        return optimized_attention
    if name in REGISTERED_ATTENTION_FUNCTIONS:
        return REGISTERED_ATTENTION_FUNCTIONS[name]
    if default is ...:
        raise KeyError(f"no attention function {name!r}; known: {', '.join(REGISTERED_ATTENTION_FUNCTIONS)}")
    return default


def wrap_attn(func: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let `transformer_options["optimized_attention_override"]` stand in for an attention function.

    The override is called `override(func, *args, **kwargs)`; calls it makes to `func` are not overridden again.
    """

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not kwargs.pop("_inside_attn_wrapper", False):
            options = kwargs.get("transformer_options") or {}
            override = options.get("optimized_attention_override")
            if override is not None:
                return override(functools.partial(wrapper, _inside_attn_wrapper=True), *args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


def _split_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, H*D] -> [B, H, L, D], unless already so."""
    if skip_reshape:
        return q, k, v
    return tuple(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # type: ignore[return-value]


def _join_heads(out: torch.Tensor, skip_output_reshape: bool) -> torch.Tensor:
    """[B, H, L, D] -> [B, L, H*D], unless asked not to."""
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _broadcast_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[L, S] or [B, L, S] -> [B or 1, 1, L, S]."""
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask.unsqueeze(0).unsqueeze(0)
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


_fused = True


def use_fused_attention(enabled: bool) -> None:
    """Whether attention runs on fused kernels; without them scores are written out, for comparing and for old GPUs."""
    global _fused
    _fused = enabled


def describe_backend(device: torch.device) -> str:
    """Which attention kernel is used on `device`, and why; one line for the log."""
    if not _fused:
        return "attention: written out (optimization.use_flash_attention is false)"
    if device.type == "cuda" and _prefers_cudnn(device.index):
        return "attention: cuDNN where it fits (twice as fast on Hopper as torch's flash kernel), else torch's choice"
    return f"attention: torch's fused kernels ({device.type})"


def scaled_dot_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D) + mask) v for [B, H, L, D], on the fastest kernel torch offers.

    cuDNN is asked for by name on Hopper and newer: torch prefers its flash backend, which reaches less than half of
    cuDNN's rate there.
    """
    if not _fused:
        return attention_basic(q, k, v, q.shape[1], mask, skip_reshape=True, skip_output_reshape=True)
    fits = mask is None and q.is_cuda and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0
    fits = fits and all(t.stride(-1) == 1 for t in (q, k, v))
    if fits and q.dtype in (torch.bfloat16, torch.float16) and _prefers_cudnn(q.device.index):
        # The derivative needs the sums of exponentials; without them it is NaN.
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, trains)[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@functools.cache
def _prefers_cudnn(index: int | None) -> bool:
    return (
        torch.version.cuda is not None
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(index)[0] >= 9
    )


@wrap_attn
def attention_pytorch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention on torch's fused kernels.

    q, k, v: [B, L, H*D], or [B, H, L, D] with `skip_reshape`. Returns [B, L, H*D], or [B, H, L, D] with
    `skip_output_reshape`. `mask` is boolean (True = attend) or added to the scores.
    """
    q, k, v = _split_heads(q, k, v, heads, skip_reshape)
    return _join_heads(scaled_dot_product(q, k, v, _broadcast_mask(mask)), skip_output_reshape)


@wrap_attn
def attention_basic(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention written out; scores in fp32 when `attn_precision` asks for it. Shapes as `attention_pytorch`."""
    q, k, v = _split_heads(q, k, v, heads, skip_reshape)
    if attn_precision == torch.float32:
        q, k = q.float(), k.float()
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    mask = _broadcast_mask(mask)
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.finfo(scores.dtype).max) if mask.dtype == torch.bool else scores + mask
        )
    return _join_heads(scores.softmax(-1).to(v.dtype) @ v, skip_output_reshape)


@wrap_attn
def attention_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention a slice of queries at a time, for little memory. Shapes as `attention_pytorch`."""
    q, k, v = _split_heads(q, k, v, heads, skip_reshape)
    mask = _broadcast_mask(mask)
    if attn_precision == torch.float32:
        q, k = q.float(), k.float()
    step = max(1, min(q.shape[2], (1 << 26) // max(1, q.shape[0] * q.shape[1] * k.shape[2])))
    parts = []
    for start in range(0, q.shape[2], step):
        rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start : start + step]
        parts.append(F.scaled_dot_product_attention(q[:, :, start : start + step], k, v.to(q.dtype), attn_mask=rows))
    return _join_heads(torch.cat(parts, dim=2).to(v.dtype), skip_output_reshape)


attention_sub_quad = attention_split
attention_xformers = attention_pytorch

for _name, _function in (
    ("pytorch", attention_pytorch),
    ("basic", attention_basic),
    ("split", attention_split),
    ("sub_quad", attention_sub_quad),
):
    register_attention_function(_name, _function)

optimized_attention: Callable[..., torch.Tensor] = attention_pytorch
optimized_attention_masked: Callable[..., torch.Tensor] = attention_pytorch


def optimized_attention_for_device(
    device: torch.device, mask: bool = False, small_input: bool = False
) -> Callable[..., torch.Tensor]:
    """The attention function to use on `device`."""
    if small_input:
        return attention_pytorch
    return optimized_attention_masked if mask else optimized_attention


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    *,
    replicated_kv: bool = False,
    layout: tuple[int, ...] | None = None,
    transformer_options: dict[str, Any] | None = None,
    beside: Callable[[], Any] | None = None,
) -> Any:
    """Attention between the tokens of all ranks: q, k, v [B, H, L, D] -> [B, L, H*D].

    On shards L counts this rank's tokens. `replicated_kv`: k and v are the same on every rank (cross-attention to a
    prompt), so nothing travels. `layout`: tokens per rank when not all streams take part. `mask` is for the whole
    sequence. With `beside`, returns (attention, beside()).
    """
    plan = dit.active_plan()
    options = transformer_options or {}

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        function = optimized_attention if mask is None else optimized_attention_masked
        return function(
            q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, transformer_options=options
        )

    if plan is None or not plan.sharded or replicated_kv:
        aside = beside() if beside is not None else None
        out = kernel(q, k, v)
    else:
        foreign = optimized_attention is not attention_pytorch or "optimized_attention_override" in options
        in_order = mask is not None or foreign
        out, aside = plan.attend(q, k, v, kernel, layout=layout or plan.layout, in_order=in_order, beside=beside)
    out = out.transpose(1, 2).flatten(2)
    return (out, aside) if beside is not None else out


def default(value: Any, other: Any) -> Any:
    """`value`, or what stands in for None."""
    if value is not None:
        return value
    return other() if callable(other) else other


_UNET_PARTS = (
    "BasicTransformerBlock",
    "CrossAttention",
    "FeedForward",
    "SpatialTransformer",
    "SpatialVideoTransformer",
)
__getattr__ = missing_names(__name__, dict.fromkeys(_UNET_PARTS, "the UNet of SD and SDXL"))
