"""Transformers inside a UNet: self-attention, attention to the prompt and a gated MLP, on the cells of a picture.

Custom nodes change them through `transformer_options` (ComfyUI's names):

    patches["attn1_patch"], ["attn2_patch"]: `f(n, context, value, extra) -> (n, context, value)` before projections
    patches["attn1_output_patch"], ["attn2_output_patch"]: `f(n, extra) -> n` after an attention
    patches["middle_patch"]: `f(x, extra) -> x` between the two attentions
    patches_replace["attn1"], ["attn2"][(block, number[, transformer])]: `f(q, k, v, extra) -> out` instead of one

`extra` has what is in `transformer_options` besides the patches, and n_heads, dim_head, attn_precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ops
from comfy.ldm.modules import attention
from comfy.missing import missing


class GEGLU(nn.Module):
    """One half of a projection times the GELU of the other (Shazeer 2020)."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        self.proj = operations.Linear(dim_in, 2 * dim_out, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim_in] -> [..., dim_out]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The MLP of a transformer block, gated with `glu`."""

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        glu: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        inner = int(dim * mult)
        into: nn.Module = (
            GEGLU(dim, inner, operations=operations, **place)
            if glu
            else nn.Sequential(operations.Linear(dim, inner, **place), nn.GELU())
        )
        self.net = nn.Sequential(into, nn.Dropout(dropout), operations.Linear(inner, dim_out or dim, **place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] -> [..., dim_out]."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Attention of a picture's cells to a context, or to themselves without one."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        attn_precision: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.dim_head = dim_head
        self.attn_precision = attn_precision
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.to_q = operations.Linear(query_dim, inner, bias=False, **place)
        self.to_k = operations.Linear(context_dim or query_dim, inner, bias=False, **place)
        self.to_v = operations.Linear(context_dim or query_dim, inner, bias=False, **place)
        self.to_out = nn.Sequential(operations.Linear(inner, query_dim, **place), nn.Dropout(dropout))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
    ) -> torch.Tensor:
        """x [B, L, query_dim], context and value [B, S, context_dim] -> [B, L, query_dim].

        mask: [L, S] or [B, L, S], boolean (True = attend) or added to the scores.
        """
        context = x if context is None else context
        q, k = self.to_q(x), self.to_k(context)
        v = self.to_v(context if value is None else value)
        function = attention.optimized_attention if mask is None else attention.optimized_attention_masked
        options = {} if mask is None else {"mask": mask}
        out = function(
            q, k, v, self.heads, attn_precision=self.attn_precision, transformer_options=transformer_options, **options
        )
        return self.to_out(out)


class BasicTransformerBlock(nn.Module):
    """x + self-attention, + attention to the prompt, + MLP, each on a layer norm of its input."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = False,
        ff_in: bool = False,
        inner_dim: int | None = None,
        disable_self_attn: bool = False,
        disable_temporal_crossattention: bool = False,
        switch_temporal_ca_to_sa: bool = False,
        attn_precision: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        if ff_in or inner_dim not in (None, dim) or disable_temporal_crossattention or switch_temporal_ca_to_sa:
            missing("the time axis of Stable Video Diffusion's UNet")
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        common: dict[str, Any] = {"dropout": dropout, "operations": operations, **place}
        heads: dict[str, Any] = {"heads": n_heads, "dim_head": d_head, "attn_precision": attn_precision, **common}
        self.disable_self_attn = disable_self_attn
        self.n_heads = n_heads
        self.d_head = d_head
        self.attn_precision = attn_precision
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, **heads)
        self.ff = FeedForward(dim, glu=gated_ff, **common)
        self.attn2 = CrossAttention(dim, context_dim, **heads)
        self.norm1, self.norm2, self.norm3 = (operations.LayerNorm(dim, **place) for _ in range(3))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
    ) -> torch.Tensor:
        """x [B, L, dim], context [B, S, context_dim] -> [B, L, dim]."""
        patches = transformer_options.get("patches", {})
        extra = self._extra(transformer_options)
        own = context if self.disable_self_attn else None
        x = x + self._attend("attn1", self.norm1(x), own, transformer_options, extra)
        for patch in patches.get("middle_patch", ()):
            x = patch(x, extra)
        x = x + self._attend("attn2", self.norm2(x), context, transformer_options, extra)
        return x + self.ff(self.norm3(x))

    def _extra(self, options: dict[str, Any]) -> dict[str, Any]:
        """What patches are told."""
        if not options.get("patches") and not options.get("patches_replace"):
            return {}
        told = {name: value for name, value in options.items() if name not in ("patches", "patches_replace")}
        return {**told, "n_heads": self.n_heads, "dim_head": self.d_head, "attn_precision": self.attn_precision}

    def _attend(
        self, kind: str, n: torch.Tensor, context: torch.Tensor | None, options: dict[str, Any], extra: dict[str, Any]
    ) -> torch.Tensor:
        """One attention (`attn1` or `attn2`) of the normed cells, with patches before, instead and after."""
        layer: CrossAttention = getattr(self, kind)
        patches = options.get("patches", {})
        value = None
        if patches.get(f"{kind}_patch"):
            context = n if context is None else context
            value = context
            for patch in patches[f"{kind}_patch"]:
                n, context, value = patch(n, context, value, extra)
        replacement = _replacement(kind, options)
        if replacement is None:
            n = layer(n, context=context, value=value, transformer_options=options)
        else:
            context = n if context is None else context
            value = context if value is None else value
            n = layer.to_out(replacement(layer.to_q(n), layer.to_k(context), layer.to_v(value), extra))
        for patch in patches.get(f"{kind}_output_patch", ()):
            n = patch(n, extra)
        return n


def _replacement(kind: str, options: dict[str, Any]) -> Any:
    """The function in place of the running block's attention, or None: that of one transformer goes first."""
    replacements = options.get("patches_replace", {}).get(kind)
    block = options.get("block")
    if not replacements or block is None:
        return None
    one = (block[0], block[1], options.get("block_index", 0))
    return replacements.get(one, replacements.get(block))


class SpatialTransformer(nn.Module):
    """A picture's cells as tokens: norm, projection, transformer blocks, projection, plus the input."""

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | list[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = False,
        attn_precision: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
    ) -> None:
        super().__init__()
        contexts = context_dim if isinstance(context_dim, list) else [context_dim] * depth
        inner = n_heads * d_head
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = operations.GroupNorm(32, in_channels, eps=1e-6, **place)

        def projection(width_in: int, width_out: int) -> nn.Module:
            if use_linear:
                return operations.Linear(width_in, width_out, **place)
            return operations.Conv2d(width_in, width_out, 1, **place)

        self.proj_in = projection(in_channels, inner)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner, n_heads, d_head, dropout=dropout, context_dim=width, disable_self_attn=disable_self_attn,
                attn_precision=attn_precision, operations=operations, **place,
            )
            for width in contexts
        )  # fmt: skip
        self.proj_out = projection(inner, in_channels)

    def forward(
        self,
        x: torch.Tensor,
        context: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
    ) -> torch.Tensor:
        """x [B, C, h, w], context [B, S, context_dim] or a list with one for each block -> [B, C, h, w]."""
        contexts = context if isinstance(context, list) else [context] * len(self.transformer_blocks)
        height, width = x.shape[-2:]
        transformer_options["activations_shape"] = list(x.shape)
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()
        if self.use_linear:
            h = self.proj_in(h)
        for i, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = i
            h = block(h, context=contexts[i], transformer_options=transformer_options)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width)).contiguous()
        if not self.use_linear:
            h = self.proj_out(h)
        return h + x
