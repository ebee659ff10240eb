"""LTX-Video 0.9: a diffusion transformer over strongly compressed video tokens (HaCohen et al. 2024).

Shapes: B videos, L tokens in the order (frame, row, column), C channels, H heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.patcher_extension
from comfy.ldm import dit
from comfy.ldm.common_dit import rms_norm
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.lightricks.symmetric_patchifier import latent_to_pixel_coords
from comfy.ldm.modules.attention import AttentionSpec, attention, joined_heads, meet
from comfy.ldm.modules.linear_cut import mean_squares, of_outputs
from comfy.ldm.modules.mlp import FeedForward, TimestepEmbedding
from comfy.ldm.modules.modulate import add_gated, norm_modulate
from comfy.ldm.modules.norm_rope import norm_together_and_rotate
from comfy.missing import missing_names

_EPS = 1e-6
_QK_EPS = 1e-5
_ARGUMENTS = dit.BlockArguments(
    tokens={"img": ("img",)},
    values={"txt": "txt", "attention_mask": "mask", "vec": "vec", "pe": "pe"},
    optional=frozenset({"attention_mask"}),
    first="img",
    renamed={"txt": "context", "vec": "timestep"},
)


def _angles(places: torch.Tensor, dim: int, theta: float, max_pos: Sequence[float]) -> torch.Tensor:
    """Positions [B, axes, L] -> [B, L, D/2] fp32: one angle for each pair of all heads' channels.

    Positions are fractions of `max_pos` in -1..1, frequencies from pi/2 to pi/2 * theta. Neighbouring pairs belong to
    the axes in turn at one frequency; those that are left over come first and are not turned.
    """
    axes = places.shape[1]
    count = dim // (2 * axes)
    exponents = torch.linspace(0.0, 1.0, count, dtype=torch.float32, device=places.device)
    frequencies = theta**exponents * (math.pi / 2)
    # Numbers, not tensors: a copy from the host would break the capture of the call in a CUDA graph.
    fractions = torch.stack([places[:, axis].float() / limit * 2 - 1 for axis, limit in enumerate(max_pos)], dim=-1)
    angles = (frequencies[:, None] * fractions.unsqueeze(-2)).flatten(2)
    return nn.functional.pad(angles, (dim // 2 - angles.shape[-1], 0))


def rotary_table(places: torch.Tensor, dim: int, heads: int, theta: float, max_pos: Sequence[float]) -> torch.Tensor:
    """Positions [B, axes, L] -> [B, H, L, D/2, 2, 2] fp32, a rotation for each pair (see `_angles`)."""
    angles = _angles(places, dim, theta, max_pos)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return table.unflatten(2, (heads, -1)).transpose(1, 2)


def precompute_freqs_cis(
    indices_grid: torch.Tensor,
    dim: int,
    out_dtype: torch.dtype,
    theta: float = 10000.0,
    max_pos: Sequence[float] = (20, 2048, 2048),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [B, axes, L] -> cosines and sines [B, L, dim], each twice; for packs, which hand them to blocks as `pe`."""
    angles = _angles(indices_grid, dim, theta, max_pos).repeat_interleave(2, dim=-1)
    return angles.cos().to(out_dtype), angles.sin().to(out_dtype)


def apply_rotary_emb(input_tensor: torch.Tensor, freqs_cis: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [B, L, D] with neighbouring channels turned by what `precompute_freqs_cis` gives; for packs."""
    cos, sin = freqs_cis
    first, second = input_tensor.unflatten(-1, (-1, 2)).unbind(dim=-1)
    return input_tensor * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


class Attention(nn.Module):
    """An attention's weights; queries and keys are normed over all heads together."""

    def __init__(
        self, dim: int, context_dim: int, heads: int, dim_head: int, place: dict[str, Any], operations: Any
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads, self.dim_head = heads, dim_head
        for name in ("q_norm", "k_norm"):
            setattr(self, name, operations.RMSNorm(inner, eps=_QK_EPS, **place))
        self.to_q = operations.Linear(dim, inner, **place)
        self.to_k = operations.Linear(context_dim, inner, **place)
        self.to_v = operations.Linear(context_dim, inner, **place)
        self.to_out = nn.ModuleList([operations.Linear(inner, dim, **place), nn.Identity()])

    def normed(self, x: torch.Tensor, names: str, table: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Queries ("q"), keys ("k") or both ("qk") of x [B, L, C], normed and rotated by `table`: [B, H, L, D] each."""
        linears = [getattr(self, f"to_{name}") for name in names]
        outputs, out = [linear(x) for linear in linears], []
        table = None if table is None else of_outputs(linears[0], table, dim=1)
        for name, linear, output, mean in zip(names, linears, outputs, mean_squares(linears[0], outputs)):
            weight = comfy.ops.cast_to_input(getattr(self, f"{name}_norm").weight, output, copy=False)
            scale = of_outputs(linear, weight)
            out.append(norm_together_and_rotate(output, scale, table, self.dim_head, _QK_EPS, mean))
        return out

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, C] -> [B, H, L, D]."""
        out = self.to_v(x)
        return out.unflatten(-1, (out.shape[-1] // self.dim_head, self.dim_head)).transpose(1, 2)


@dit.own_block
class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to text, MLP; the first and the last modulated by the time."""

    def __init__(
        self, dim: int, n_heads: int, d_head: int, context_dim: int, dtype: Any = None, device: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.attn1 = Attention(dim, dim, n_heads, d_head, place, operations)
        self.ff = FeedForward(dim, 4, place, operations)
        self.attn2 = Attention(dim, context_dim, n_heads, d_head, place, operations)
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim, **place), requires_grad=False)

    @dit.stage
    def _into_attention(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        normed = rms_norm(x, eps=_EPS) * (1 + scale) + shift
        return (*self.attn1.normed(normed, "qk", table), self.attn1.values(normed))

    @dit.stage
    def _after_attention(
        self, x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x with the self-attention's output, and the queries of the attention to text."""
        x = add_gated(x, self.attn1.to_out[0](out), gate)
        (q,) = self.attn2.normed(x, "q")
        return x, q

    @dit.stage
    def _mlp(
        self, x: torch.Tensor, out: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.attn2.to_out[0](out)
        return add_gated(x, self.ff(rms_norm(x, eps=_EPS) * (1 + scale) + shift), gate)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on the stream `img`."""
        x, txt = state.streams["img"], state.sample["txt"]
        vec = by_token(state, "vec").unflatten(-1, (6, -1))
        table = comfy.ops.cast_to_input(self.scale_shift_table, x, copy=False)
        shift, scale, gate, *mlp = (table + vec).unbind(dim=2)
        image = state.tokens("img")
        q, k, v = self._into_attention(x, shift, scale, state.local("pe"))
        meeting = meet(AttentionSpec(q.shape[1], image, layer=call.layer), call)
        meeting.send(q, k, v)
        (k,), v = self.attn2.normed(txt, "k"), self.attn2.values(txt)  # while tokens are exchanged
        meeting.attend()
        meeting.send_back()
        x, q = self._after_attention(x, joined_heads(meeting.result()), gate)
        spec = AttentionSpec(q.shape[1], image, dit.Tokens((txt.shape[1],)), mask=state.sample["mask"])
        return state.with_stream("img", self._mlp(x, attention(q, k, v, spec, call), *mlp))

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        pe: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole x [B, L, C], context [B, m, C], timestep [B, 1 or L, 6 C], pe [B, H, L, D/2, 2, 2] -> [B, L, C]."""
        assert timestep is not None and pe is not None
        call = dit.call_of(transformer_options)
        state = _state(x, pe, {"vec": timestep}, {"txt": context, "mask": attention_mask})
        return self.forward_state(state.shard(call.plan), call).whole("img")


def _state(x: torch.Tensor, pe: torch.Tensor, times: dict[str, torch.Tensor], sample: dict[str, Any]) -> dit.DiTState:
    """A whole state; `times` [B, n, ..] have one row for all tokens or one for each."""
    tokenwise = {"pe": dit.TokenAxis(pe, ("img",), 2, inside=True)}
    for name, value in times.items():
        if value.shape[1] > 1:
            tokenwise[name] = dit.TokenAxis(value, ("img",), 1)
        else:
            sample = {**sample, name: value}
    return dit.DiTState({"img": x}, tokenwise, sample)


def by_token(state: dit.DiTState, name: str) -> torch.Tensor:
    """A tensor [B, n, ..] of the time, for this rank's tokens or for all."""
    return state.local(name) if name in state.tokenwise else state.sample[name]


class _Embedder(nn.Module):
    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim, place, operations)


class AdaLayerNormSingle(nn.Module):
    """Times [B, n] -> modulation of all blocks [B, n, 6 C], and the times' vectors [B, n, C]."""

    def __init__(self, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.emb = _Embedder(dim, place, operations)
        self.linear = operations.Linear(dim, 6 * dim, **place)

    def forward(self, t: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        vec = self.emb.timestep_embedder(timestep_embedding(t, 256, time_factor=1.0).to(dtype))
        return self.linear(nn.functional.silu(vec)), vec


class _TextProjection(nn.Module):
    def __init__(self, in_dim: int, dim: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(in_dim, dim, **place)
        self.linear_2 = operations.Linear(dim, dim, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(x), approximate="tanh"))


class LTXVModel(nn.Module):
    """The diffusion transformer of LTX-Video 0.9, 2B and 13B."""

    def __init__(
        self, in_channels: int = 128, cross_attention_dim: int = 2048, attention_head_dim: int = 64,
        num_attention_heads: int = 32, caption_channels: int = 4096, num_layers: int = 28,
        positional_embedding_theta: float = 10000.0, positional_embedding_max_pos: Sequence[float] = (20, 2048, 2048),
        causal_temporal_positioning: bool = False, vae_scale_factors: Sequence[int] = (8, 32, 32),
        image_model: str | None = None, dtype: Any = None, device: Any = None, operations: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        self.dtype, self.patch_size = dtype, 1
        self.in_channels = self.out_channels = in_channels
        self.hidden_size = self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.num_heads = num_attention_heads
        self.theta, self.max_pos = positional_embedding_theta, tuple(positional_embedding_max_pos)
        self.causal_temporal_positioning = causal_temporal_positioning
        self.vae_scale_factors = tuple(vae_scale_factors)
        self.patchify_proj = operations.Linear(in_channels, dim, **place)
        self.adaln_single = AdaLayerNormSingle(dim, place, operations)
        self.caption_projection = _TextProjection(caption_channels, dim, place, operations)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim, num_attention_heads, attention_head_dim, cross_attention_dim, operations=operations, **place
            )
            for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim, **place), requires_grad=False)
        self.norm_out = operations.LayerNorm(dim, elementwise_affine=False, eps=_EPS, **place)
        self.proj_out = operations.Linear(dim, self.out_channels, **place)

    # --- the contract: embed, blocks, head ---------------------------------------------------------------------

    def places(self, sizes: Sequence[int], device: Any) -> torch.Tensor:
        """Where latents of F x h x w cells begin, in pixels and frames of the video: [1, 3, L]."""
        axes = [torch.arange(size, device=device) for size in sizes]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).unsqueeze(0)
        return latent_to_pixel_coords(cells, self.vae_scale_factors, self.causal_temporal_positioning)

    def embed(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None,
        frame_rate: float,
        keyframe_idxs: torch.Tensor | None,
    ) -> dit.DiTState:
        """Latents [B, C, F, h, w] and what `forward` takes -> whole state with the stream `img`."""
        places = self.places(x.shape[2:], x.device).expand(x.shape[0], -1, -1)
        if keyframe_idxs is not None:
            given = keyframe_idxs.to(places).expand(x.shape[0], -1, -1)
            places = torch.cat((places[:, :, : places.shape[2] - given.shape[2]], given), dim=2)
        places = torch.cat((places[:, :1].float() / frame_rate, places[:, 1:].float()), dim=1)  # seconds, pixels
        pe = rotary_table(places, self.inner_dim, self.num_heads, self.theta, self.max_pos)
        tokens = self.patchify_proj(x.flatten(2).transpose(1, 2))
        vec, time = self.adaln_single(timestep.reshape(x.shape[0], -1) * 1000.0, tokens.dtype)
        mask = attention_mask
        if mask is not None and not mask.is_floating_point():
            mask = (mask - 1).to(tokens.dtype) * torch.finfo(tokens.dtype).max
        if mask is not None:
            mask = mask.reshape(mask.shape[0], 1, -1, mask.shape[-1])
        sample = {"txt": self.caption_projection(context), "mask": mask}
        return _state(tokens, pe, {"vec": vec, "time": time}, sample)

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        return tuple(
            dit.Block(f"transformer_blocks.{i}", block, _ARGUMENTS, i, replace_key=("double_block", i))
            for i, block in enumerate(self.transformer_blocks)
        )

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Video tokens of the state -> [B, L, out_channels], whole."""
        x = state.streams["img"]
        table = comfy.ops.cast_to_input(self.scale_shift_table, x, copy=False)
        shift, scale = (table + by_token(state, "time").unsqueeze(2)).unbind(dim=2)
        return state.with_stream("img", self.proj_out(norm_modulate(x, scale, shift, _EPS))).whole("img")

    # --- ComfyUI's entrance ------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frame_rate: float = 25,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature, which custom nodes inspect)
        keyframe_idxs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, C, F, h, w] at sigmas [B], or [B, L, 1] by token -> [B, C, F, h, w].

        context: text [B, m, caption_channels] with its mask [B, m]. keyframe_idxs [B, 3, n]: places (frame, row, column
        in pixels) of the last n tokens, which are pictures that the video follows.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timestep, context, attention_mask, frame_rate, transformer_options, keyframe_idxs, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        frame_rate: float = 25,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        keyframe_idxs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if x.ndim != 5:
            raise ValueError(f"LTX-Video works on latents [B, C, frames, height, width], got {tuple(x.shape)}")
        call = dit.call_of(transformer_options)
        state = self.embed(x, timestep, context, attention_mask, frame_rate, keyframe_idxs)
        out = self.head(dit.run_blocks(self, state, call))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class LTXRopeType(str, Enum):  # noqa: UP042 - as ComfyUI has it: packs compare with str() and with names in configurations
    """Which channels of LTX-Video's rotary embedding form pairs: neighbours, or both halves of a head (newer models)."""

    INTERLEAVED = "interleaved"
    SPLIT = "split"

    @classmethod
    def from_dict(cls, kwargs: dict[str, Any], default: LTXRopeType | None = None) -> LTXRopeType:
        """What a configuration says under `rope_type`. Raises ValueError for an unknown one."""
        return cls(kwargs.get("rope_type", default or cls.INTERLEAVED))


class LTXFrequenciesPrecision(str, Enum):  # noqa: UP042 - as above
    """In which precision newer models want the frequencies of their rotary embedding computed."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"

    @classmethod
    def from_dict(
        cls, kwargs: dict[str, Any], default: LTXFrequenciesPrecision | None = None
    ) -> LTXFrequenciesPrecision:
        """What a configuration says under `frequencies_precision`. Raises ValueError for an unknown one."""
        return cls(kwargs.get("frequencies_precision", default or cls.FLOAT32))


_PARTS = (
    "CrossAttention", "GuideAttentionMask", "Timesteps", "_attention_with_guide_mask", "generate_freq_grid_np",
    "interleaved_freqs_cis", "split_freqs_cis",
)  # fmt: skip
__getattr__ = missing_names(__name__, dict.fromkeys(_PARTS, "ComfyUI's part of LTX-Video"))
