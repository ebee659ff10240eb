"""Layers of Flux: embeddings, modulation, double and single stream blocks (Black Forest Labs, 2024).

Shapes: B pictures, L tokens, C hidden size, H heads, D head size. Blocks are written for any set of tokens; joint
attention is the only place where tokens are combined.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, joined_heads, meet
from comfy.ldm.modules.copy_runs import joined_tokens
from comfy.ldm.modules.eight_bit import BeforeGelu, Rows, reads_rows
from comfy.ldm.modules.fused import (
    SecondPart,
    first_linear,
    linear_of_pair,
    linear_of_second,
    mlp_gelu,
    split_linear,
    split_linear_rest,
)
from comfy.ldm.modules.modulate import (
    add_gated,
    add_gated_norm_modulate,
    add_gated_norm_modulate_rows,
    norm_modulate,
    norm_modulate_rows,
    spread_rows,
)
from comfy.ldm.modules.norm_rope import norm_and_rotate

from .math import apply_rope, attention, rope
from .modulation import Modulation, ModulationOut, apply_mod, by_token, modulation_of, modulation_rows

__all__ = [
    "DoubleStreamBlock", "EmbedND", "LastLayer", "MLPEmbedder", "Modulation", "ModulationOut", "QKNorm", "RMSNorm",
    "SelfAttention", "SingleStreamBlock", "apply_mod", "attention", "timestep_embedding",
]  # fmt: skip

_OUR_ATTENTION = attention


class EmbedND(nn.Module):
    """Rotary table from position ids with one column per axis."""

    def __init__(self, dim: int, theta: int, axes_dim: list[int]) -> None:
        super().__init__()
        self.dim = dim
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, L, axes] -> [B, 1, L, D/2, 2, 2] fp32."""
        tables = [rope(ids[..., axis], size, self.theta) for axis, size in enumerate(self.axes_dim)]
        return torch.cat(tables, dim=-3).unsqueeze(1)


def timestep_embedding(
    t: torch.Tensor, dim: int, max_period: float = 10000, time_factor: float = 1000.0
) -> torch.Tensor:
    """Sinusoidal features of times t [B] -> [B, dim], cosines first (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(steps * (-math.log(max_period) / half))
    phases = (t * time_factor).float().unsqueeze(-1) * frequencies
    features = torch.cat((phases.cos(), phases.sin()), dim=-1)
    if dim % 2:
        features = nn.functional.pad(features, (0, 1))
    return features.to(t) if t.is_floating_point() else features


class MLPEmbedder(nn.Module):
    """Two linears with SiLU between: [B, in_dim] -> [B, hidden_dim]."""

    in_layer: nn.Module
    out_layer: nn.Module

    def __init__(
        self, in_dim: int, hidden_dim: int, dtype: Any = None, device: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.silu = nn.SiLU()
        for name, width in (("in_layer", in_dim), ("out_layer", hidden_dim)):
            setattr(self, name, operations.Linear(width, hidden_dim, **place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_layer(self.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """Root-mean-square norm with the weight named `scale`."""

    def __init__(self, dim: int, dtype: Any = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.scale = nn.Parameter(torch.empty((dim,), **place), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return comfy.ldm.common_dit.rms_norm(x, self.scale, 1e-6)


class QKNorm(nn.Module):
    """Norms of queries and keys over the head size."""

    def __init__(self, dim: int, dtype: Any = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim, dtype=dtype, device=device, operations=operations)
        self.key_norm = RMSNorm(dim, dtype=dtype, device=device, operations=operations)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[.., D] each -> normalised q and k in v's dtype."""
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class SelfAttention(nn.Module):
    """The weights of one stream's attention: `qkv`, `norm`, `proj`."""

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, proj_bias: bool = True, dtype: Any = None,
        device: Any = None, operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads = num_heads
        self.qkv = operations.Linear(dim, dim * 3, bias=qkv_bias, dtype=dtype, device=device)
        self.norm = QKNorm(dim // num_heads, dtype=dtype, device=device, operations=operations)
        self.proj = operations.Linear(dim, dim, bias=proj_bias, dtype=dtype, device=device)


def _plain_norm(norm: nn.Module) -> bool:
    """Whether a norm is our LayerNorm without weights, which the fused primitives compute."""
    return (
        isinstance(norm, nn.LayerNorm)
        and norm.weight is None
        and type(norm).forward.__module__.startswith("comfy.")
        and "forward" not in vars(norm)
    )


def _modulated(
    norm: nn.LayerNorm, x: torch.Tensor, mod: ModulationOut, dims: Any, reader: nn.Module
) -> torch.Tensor | Rows:
    """norm(x) * (1 + scale) + shift for x [B, L, C], as the layer `reader` takes it; `dims` as in `apply_mod`."""
    if dims is None and _plain_norm(norm):
        if reads_rows(reader):
            return norm_modulate_rows(x, mod.scale, mod.shift, reader.eight_bit.form, norm.eps)
        return norm_modulate(x, mod.scale, mod.shift, norm.eps)
    return apply_mod(norm(x), 1 + mod.scale, mod.shift, dims)


def _add_gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, dims: Any) -> torch.Tensor:
    """x + gate * y; `dims` as in `apply_mod`."""
    return add_gated(x, y, gate) if dims is None else x + apply_mod(y, gate, None, dims)


def _heads_first(qkv: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, L, 3*H*D] -> q, k, v as [B, H, L, D] views, for heads of D = `size` channels."""
    return qkv.unflatten(-1, (3, qkv.shape[-1] // (3 * size), size)).permute(2, 0, 3, 1, 4).unbind(0)


def _normed(
    norm: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pe: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k [B, H, L, D] through `norm`, then rotated by `pe` if it is given."""
    if pe is not None and type(norm) is QKNorm:
        q_scale, k_scale = (comfy.ops.cast_to(n.scale, device=q.device) for n in (norm.query_norm, norm.key_norm))
        fused = norm_and_rotate(q, k, q_scale, k_scale, pe)
        if fused is not None:
            return fused
    q, k = norm(q, k, v)
    return (q, k) if pe is None else apply_rope(q, k, pe)


@dit.stage
def _joined(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of two streams as one sequence: [B, H, L1, D] and [B, H, L2, D] -> [B, H, L1+L2, D]."""
    return tuple(joined_tokens(*pair) for pair in zip(first, second))


def _clamped(x: torch.Tensor) -> torch.Tensor:
    """x without infinities, which fp16 runs into."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def replaced_attention() -> Any:
    """The function that a custom node has put in the place of this module's `attention`, or None."""
    return None if attention is _OUR_ATTENTION else attention


def _rotary(state: dit.DiTState) -> torch.Tensor | None:
    """This rank's rotary table, for rotating in the pass that norms; None without positions, and where `attention` was
    replaced: a replacement rotates whole queries and keys for itself."""
    return None if replaced_attention() is not None or "pe" not in state.tokenwise else state.local("pe")


def _replacement(state: dit.DiTState, call: dit.DenoiserCall) -> dit.Compute | None:
    """This module's `attention`, if a custom node has replaced it, as a function of all tokens of some heads."""
    function, pe = replaced_attention(), state.value("pe")
    if function is None:
        return None

    def compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        out = function(q, k, v, pe=pe, mask=mask, transformer_options=call.options)
        return out.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)

    return compute


def _meeting(state: dit.DiTState, call: dit.DenoiserCall, heads: int) -> dit.Meeting:
    """Attention among all streams of the state."""
    spec = AttentionSpec(heads, state.tokens(), mask=state.sample.get("attn_mask"), layer=call.layer)
    return meet(spec, call, _replacement(state, call))


def _entrance(
    streams: dict[str, torch.Tensor],
    vec: torch.Tensor,
    pe: torch.Tensor | None,
    mask: torch.Tensor | None,
    options: dict[str, Any] | None,
    dims: Any,
) -> tuple[dit.DiTState, dit.DenoiserCall]:
    """A block's state from whole arguments, sharded as its denoiser call says.

    Modulation by token ranges (`modulation_dims`) is written for whole streams; with it they stay whole.
    """
    call = dit.call_of(options)
    tokenwise = {} if pe is None else {"pe": dit.TokenAxis(pe, tuple(streams), 2, inside=True)}
    state = dit.DiTState(streams, tokenwise, {"vec": vec, "attn_mask": mask})
    return state.shard(call.plan if dims is None else None), call


@dit.own_block
class DoubleStreamBlock(nn.Module):
    """Picture and text tokens with weights of their own, attending to each other."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool = False, flipped_img_txt: bool = False,
        dtype: Any = None, device: Any = None, operations: Any = comfy.ops.manual_cast, modulation: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        mlp_hidden_dim = int(hidden_size * mlp_ratio)
        self.num_heads = num_heads
        self.hidden_size = hidden_size
        self.flipped_img_txt = flipped_img_txt
        place = {"dtype": dtype, "device": device}

        def mlp() -> nn.Sequential:
            return nn.Sequential(
                operations.Linear(hidden_size, mlp_hidden_dim, bias=True, **place),
                nn.GELU(approximate="tanh"),
                operations.Linear(mlp_hidden_dim, hidden_size, bias=True, **place),
            )

        for stream in ("img", "txt"):
            norms = [operations.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6, **place) for _ in range(2)]
            if modulation:
                setattr(self, f"{stream}_mod", Modulation(hidden_size, double=True, operations=operations, **place))
            setattr(self, f"{stream}_norm1", norms[0])
            attn = SelfAttention(hidden_size, num_heads=num_heads, qkv_bias=qkv_bias, operations=operations, **place)
            setattr(self, f"{stream}_attn", attn)
            setattr(self, f"{stream}_norm2", norms[1])
            setattr(self, f"{stream}_mlp", mlp())

    @dit.stage
    def _into_attention(
        self, stream: str, x: torch.Tensor, mod: ModulationOut, dims: Any, pe: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """One stream's x [B, L, C] -> q, k, v [B, H, L, D]; q and k rotated by the stream's part of `pe` if given."""
        attn = getattr(self, f"{stream}_attn")
        normed = _modulated(getattr(self, f"{stream}_norm1"), x, mod, dims, attn.qkv)
        q, k, v = _heads_first(attn.qkv(normed), self.hidden_size // self.num_heads)
        return (*_normed(attn.norm, q, k, v, pe), v)

    @dit.stage
    def _after_attention(self, stream: str, x: torch.Tensor, out: torch.Tensor, mods: Any, dims: Any) -> torch.Tensor:
        """Add the attention's output [B, L, C] and the MLP's to x [B, L, C]."""
        first, second = mods
        out, norm = getattr(self, f"{stream}_attn").proj(out), getattr(self, f"{stream}_norm2")
        mlp = getattr(self, f"{stream}_mlp")
        reader = first_linear(mlp)
        normed: torch.Tensor | Rows
        if dims is None and _plain_norm(norm) and reads_rows(reader):
            x, normed = add_gated_norm_modulate_rows(
                x, out, first.gate, second.scale, second.shift, reader.eight_bit.form, norm.eps
            )
        elif dims is None and _plain_norm(norm):
            x, normed = add_gated_norm_modulate(x, out, first.gate, second.scale, second.shift, norm.eps)
        else:
            x = _add_gated(x, out, first.gate, dims)
            normed = _modulated(norm, x, second, dims, reader)
        return _add_gated(x, mlp_gelu(mlp, normed), second.gate, dims)

    def modulations(self, state: dit.DiTState, call: dit.DenoiserCall) -> dict[str, Any]:
        """Those of attention and of MLP, by stream."""
        return {name: modulation_of(getattr(self, f"{name}_mod"), state.sample["vec"], call) for name in ("img", "txt")}

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall, dims: Any = (None, None)) -> dit.DiTState:
        """The block on a state with the streams `img` and `txt`; `dims`: modulation ranges of img and txt."""
        dims = dict(zip(("img", "txt"), dims))
        sizes, modulations = state.inside(), self.modulations(state, call)
        tokens = [stream.shape[1] for stream in state.streams.values()]
        mods = {
            name: tuple(by_token(mod, rows) for mod in modulations[name])
            for name, rows in zip(state.streams, modulation_rows(state, tokens))
        }
        pe = _rotary(state)
        tables = (None, None) if pe is None else pe.split(sizes, dim=2)
        parts = [
            self._into_attention(name, tokens, mods[name][0], dims[name], table)
            for (name, tokens), table in zip(state.streams.items(), tables)
        ]
        q, k, v = _joined(*parts)
        meeting = _meeting(state, call, q.shape[1])
        meeting.send(q, k, v)
        meeting.attend()
        meeting.send_back()
        outs = joined_heads(meeting.result()).split(sizes, dim=1)
        streams = {
            name: self._after_attention(name, tokens, out, mods[name], dims[name])
            for (name, tokens), out in zip(state.streams.items(), outs)
        }
        return state.replace(streams={**streams, "txt": _clamped(streams["txt"])})

    def forward(
        self,
        img: torch.Tensor,
        txt: torch.Tensor,
        vec: torch.Tensor,
        pe: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        modulation_dims_img: Any = None,
        modulation_dims_txt: Any = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """img [B, L_img, C], txt [B, L_txt, C], vec [B, C], pe [B or 1, 1, L_txt + L_img, D/2, 2, 2] -> img, txt.

        Whole streams, the text first in `pe` and `attn_mask`, the picture first with `flipped_img_txt`.
        """
        dims = modulation_dims_img, modulation_dims_txt
        streams = {"img": img, "txt": txt} if self.flipped_img_txt else {"txt": txt, "img": img}
        ranges = None if dims == (None, None) else dims
        state, call = _entrance(streams, vec, pe, attn_mask, transformer_options, ranges)
        state = self.forward_state(state, call, dims)
        return state.whole("img"), state.whole("txt")


@dit.own_block
class SingleStreamBlock(nn.Module):
    """All tokens with the same weights; attention and MLP side by side in one pair of linears."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, qk_scale: float | None = None,
        dtype: Any = None, device: Any = None, operations: Any = comfy.ops.manual_cast, modulation: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.hidden_dim = hidden_size
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.scale = qk_scale or (hidden_size // num_heads) ** -0.5
        self.mlp_hidden_dim = int(hidden_size * mlp_ratio)
        place = {"dtype": dtype, "device": device}
        self.linear1 = operations.Linear(hidden_size, hidden_size * 3 + self.mlp_hidden_dim, **place)
        self.linear2 = operations.Linear(hidden_size + self.mlp_hidden_dim, hidden_size, **place)
        self.norm = QKNorm(hidden_size // num_heads, operations=operations, **place)
        self.pre_norm = operations.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6, **place)
        self.mlp_act = nn.GELU(approximate="tanh")
        if modulation:
            self.modulation = Modulation(hidden_size, double=False, operations=operations, **place)

    @dit.stage
    def _into_attention(
        self, x: torch.Tensor, mod: ModulationOut, dims: Any, pe: torch.Tensor | None
    ) -> tuple[Any, ...]:
        """x [B, L, C] -> q, k, v [B, H, L, D], q and k rotated by `pe` if given, and what `_middle` begins from."""
        normed = _modulated(self.pre_norm, x, mod, dims, self.linear1)
        qkv, rest = split_linear(self.linear1, self.mlp_act, normed, 3 * self.hidden_size)
        q, k, v = _heads_first(qkv, self.hidden_size // self.num_heads)
        return (*_normed(self.norm, q, k, v, pe), v, rest)

    @dit.stage
    def _middle(self, rest: torch.Tensor | Rows) -> torch.Tensor | BeforeGelu:
        """The MLP's hidden activations [B, L, M], in eight bits before their GELU.

        It is the half of the block that does not depend on attention.
        """
        return split_linear_rest(self.linear1, self.mlp_act, rest, 3 * self.hidden_size)

    @dit.stage
    def _before_result(self, x: torch.Tensor, mlp: torch.Tensor | BeforeGelu) -> torch.Tensor | BeforeGelu | SecondPart:
        """What the output projection adds for the MLP [B, L, M], while the attention's output is on its way."""
        return linear_of_second(self.linear2, x, mlp)

    @dit.stage
    def _after_attention(
        self, x: torch.Tensor, out: torch.Tensor, mlp: torch.Tensor | BeforeGelu | SecondPart, mod: ModulationOut,
        dims: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Add attention [B, L, C] and MLP [B, L, M], projected together, to x [B, L, C]."""
        return _clamped(_add_gated(x, linear_of_pair(self.linear2, out, mlp), mod.gate, dims))

    def modulations(self, state: dit.DiTState, call: dit.DenoiserCall) -> Any:
        """The block's one."""
        return modulation_of(self.modulation, state.sample["vec"], call)[0]

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall, dims: Any = None) -> dit.DiTState:
        """The block on all streams of a state as one sequence; `dims`: modulation ranges."""
        x = state.joint()
        mod = by_token(self.modulations(state, call), modulation_rows(state))
        q, k, v, rest = self._into_attention(x, mod, dims, _rotary(state))
        meeting = _meeting(state, call, q.shape[1])
        meeting.send(q, k, v)
        mlp = self._middle(rest)
        meeting.attend()
        meeting.send_back()
        early = self._before_result(x, mlp)
        return state.with_joint(self._after_attention(x, joined_heads(meeting.result()), early, mod, dims))

    def forward(
        self,
        x: torch.Tensor,
        vec: torch.Tensor,
        pe: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        modulation_dims: Any = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole x [B, L, C] (text first), vec [B, C], pe [B or 1, 1, L, D/2, 2, 2] -> [B, L, C]."""
        state, call = _entrance({"x": x}, vec, pe, attn_mask, transformer_options, modulation_dims)
        return self.forward_state(state, call, modulation_dims).whole("x")


class LastLayer(nn.Module):
    """Tokens to patches: [B, L, C] -> [B, L, patch_size^2 * out_channels]."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, dtype: Any = None, device: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.norm_final = operations.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6, **place)
        self.linear = operations.Linear(hidden_size, patch_size * patch_size * out_channels, bias=True, **place)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(hidden_size, 2 * hidden_size, bias=True, **place)
        )

    def forward(
        self, x: torch.Tensor, vec: torch.Tensor, modulation_dims: Any = None, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`rows` [L]: each token's row of vec [B, n, C]."""
        if vec.ndim == 2:
            vec = vec.unsqueeze(1)
        shift, scale = (spread_rows(part, rows) for part in self.adaLN_modulation(vec).chunk(2, dim=-1))
        return self.linear(apply_mod(self.norm_final(x), 1 + scale, shift, modulation_dims))
