"""Next-DiT of Lumina-Image 2.0 (Qin et al. 2025): text and picture as one sequence, after a few blocks for each alone.

Shapes: B pictures, L tokens, C hidden size, H query heads, KV key heads, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
from comfy.ldm import dit
from comfy.ldm.flux.layers import EmbedND
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import AttentionSpec, joined_heads, meet
from comfy.ldm.modules.embedders import TimestepEmbedder, to_patches, to_picture
from comfy.ldm.modules.linear_cut import outputs_here
from comfy.ldm.modules.modulate import norm_modulate

__all__ = ["FeedForward", "JointAttention", "JointTransformerBlock", "NextDiT"]

LARGEST_MODULATION = 1024  # width of what modulations are made from
_NAMES = {"img": "x", "vec": "adaln_input", "pe": "freqs_cis", "mask": "x_mask"}
_JOINT = dit.BlockArguments(
    {"img": ("txt", "img")}, {"vec": "vec", "pe": "pe", "mask": "mask"}, frozenset({"mask"}), renamed=_NAMES
)
_ALONE = dit.BlockArguments({"img": ("img",)}, {"vec": "vec", "pe": "img_pe"}, renamed=_NAMES)


def _rms(dim: int, eps: float, place: dict[str, Any], operations: Any) -> nn.Module:
    return operations.RMSNorm(dim, eps=eps, elementwise_affine=True, **place)


class JointAttention(nn.Module):
    """The weights of an attention with fewer key heads than query heads."""

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int | None, qk_norm: bool, place: dict[str, Any], operations: Any
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        self.head_dim = dim // n_heads
        self._ends = (self.n_heads, self.n_heads + self.n_kv_heads)  # of queries and of keys, in whole heads
        rows = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = operations.Linear(dim, rows, bias=False, **place)
        self.out = operations.Linear(n_heads * self.head_dim, dim, bias=False, **place)
        for name in ("q_norm", "k_norm"):
            setattr(self, name, _rms(self.head_dim, 1e-6, place, operations) if qk_norm else nn.Identity())

    def pre_attention(self, x: torch.Tensor, pe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, L, C], table [B or 1, 1, L, D/2, 2, 2] -> q [B, H, L, D], k and v [B, KV, L, D]."""
        qkv = self.qkv(x)
        heads = qkv.unflatten(-1, (qkv.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)
        ends = [outputs_here(self.qkv, n * self.head_dim) // self.head_dim for n in self._ends]
        q, k, v = heads.tensor_split(ends, dim=1)
        return apply_rope1(self.q_norm(q).to(v), pe), apply_rope1(self.k_norm(k).to(v), pe), v


class FeedForward(nn.Module):
    """Linear with a SiLU-gated second one, linear (Shazeer 2020, SwiGLU); its width is rounded up to `multiple_of`."""

    def __init__(
        self, dim: int, hidden_dim: int, multiple_of: int, place: dict[str, Any], operations: Any,
        ffn_dim_multiplier: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width = int(hidden_dim * (ffn_dim_multiplier or 1.0))
        width = -(-width // multiple_of) * multiple_of
        self.w1 = operations.Linear(dim, width, bias=False, **place)
        self.w2 = operations.Linear(width, dim, bias=False, **place)
        self.w3 = operations.Linear(dim, width, bias=False, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@dit.own_block
class JointTransformerBlock(nn.Module):
    """Attention and MLP with norms before and after each; scaled and gated by the time unless told otherwise.

    streams: which of a state's streams it works on, as one sequence; pe: the name of their rotary table.
    """

    attention_norm1: nn.Module
    attention_norm2: nn.Module
    ffn_norm1: nn.Module
    ffn_norm2: nn.Module

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int | None, multiple_of: int, norm_eps: float, qk_norm: bool,
        place: dict[str, Any], operations: Any, modulation: bool = True, ffn_dim_multiplier: float | None = None,
        streams: tuple[str, ...] = ("txt", "img"), pe: str = "pe",
    ) -> None:  # fmt: skip
        super().__init__()
        self.streams, self.pe = streams, pe
        self.attention = JointAttention(dim, n_heads, n_kv_heads, qk_norm, place, operations)
        self.feed_forward = FeedForward(dim, 4 * dim, multiple_of, place, operations, ffn_dim_multiplier)
        for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            setattr(self, name, _rms(dim, norm_eps, place, operations))
        self.modulation = modulation
        if modulation:
            width = min(dim, LARGEST_MODULATION)
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 4 * dim, **place))

    def _mods(self, vec: torch.Tensor | None, call: dit.DenoiserCall) -> tuple[Any, ...]:
        """vec [B, n] -> factors and gates of attention and MLP, [B, 1, C] each; ones where there is no modulation."""
        if not self.modulation:
            return 1, 1, 1, 1
        ready = call.prepared.get(id(self))
        out = self.adaLN_modulation(vec).unsqueeze(1) if ready is None else ready
        scale, gate, mlp_scale, mlp_gate = out.chunk(4, dim=-1)
        return 1 + scale, gate.tanh(), 1 + mlp_scale, mlp_gate.tanh()

    @dit.stage
    def _into_attention(self, x: torch.Tensor, scale: Any, pe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.attention.pre_attention(self.attention_norm1(x) * scale, pe)

    @dit.stage
    def _after_attention(self, x: torch.Tensor, out: torch.Tensor, mods: tuple[Any, ...]) -> torch.Tensor:
        """Add the attention's output [B, L, C] and the MLP's to x [B, L, C]."""
        _, gate, scale, mlp_gate = mods
        x = x + gate * self.attention_norm2(self.attention.out(out))
        return x + mlp_gate * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale))

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on its streams of a state."""
        whole = self.streams == tuple(state.streams)
        x = state.joint() if whole else state.streams[self.streams[0]]
        mods = self._mods(state.sample.get("vec"), call)
        mask = state.sample.get("mask") if whole else None
        q, k, v = self._into_attention(x, mods[0], state.local(self.pe))
        spec = AttentionSpec(q.shape[1], state.tokens(*self.streams), mask=mask, kv_heads=k.shape[1], layer=call.layer)
        meeting = meet(spec, call)
        meeting.send(q, k, v)
        meeting.attend()
        meeting.send_back()
        x = self._after_attention(x, joined_heads(meeting.result()), mods)
        return state.with_joint(x) if whole else state.with_stream(self.streams[0], x)

    def forward(
        self,
        x: torch.Tensor,
        x_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole tokens [B, L, C], mask of keys [B, 1, L] or None, rotary table, time's vector [B, n] -> [B, L, C]."""
        call = dit.call_of(transformer_options)
        state = dit.DiTState(
            dict(zip(self.streams, (x, x[:, :0]))),
            {self.pe: dit.TokenAxis(freqs_cis, self.streams, 2, inside=True)},
            {"vec": adaln_input, "mask": x_mask},
        )
        return self.forward_state(state.shard(call.plan), call).whole(*self.streams)


class FinalLayer(nn.Module):
    """Tokens to patches: [B, L, C] -> [B, L, patch^2 * out_channels]."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, place: dict[str, Any], operations: Any
    ) -> None:
        super().__init__()
        self.linear = operations.Linear(hidden_size, patch_size**2 * out_channels, **place)
        width = min(hidden_size, LARGEST_MODULATION)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, hidden_size, **place))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale = self.adaLN_modulation(c).unsqueeze(1)
        return self.linear(norm_modulate(x, scale, torch.zeros_like(scale)))


class NextDiT(nn.Module):
    """The whole network, with ComfyUI's configuration names."""

    def __init__(
        self, patch_size: int = 2, in_channels: int = 4, dim: int = 4096, n_layers: int = 32,
        n_refiner_layers: int = 2, n_heads: int = 32, n_kv_heads: int | None = None, multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None, norm_eps: float = 1e-5, qk_norm: bool = False,
        cap_feat_dim: int = 5120, axes_dims: Any = (16, 56, 56), axes_lens: Any = (1, 512, 512),
        image_model: Any = None, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        if sum(axes_dims) != dim // n_heads:
            raise ValueError(f"axes_dims {list(axes_dims)} must add up to the head size {dim // n_heads}")
        self.dtype, self.patch_size = dtype, patch_size
        self.hidden_size, self.num_heads, self.kv_heads = dim, n_heads, n_kv_heads or n_heads
        self.in_channels = self.out_channels = in_channels
        self.x_embedder = operations.Linear(patch_size**2 * in_channels, dim, **place)

        def blocks(count: int, **options: Any) -> nn.ModuleList:
            return nn.ModuleList(
                JointTransformerBlock(
                    dim, n_heads, n_kv_heads, multiple_of, norm_eps, qk_norm, place, operations,
                    ffn_dim_multiplier=ffn_dim_multiplier, **options,
                )
                for _ in range(count)
            )  # fmt: skip

        self.noise_refiner = blocks(n_refiner_layers, streams=("img",), pe="img_pe")
        self.context_refiner = blocks(n_refiner_layers, streams=("txt",), modulation=False)
        self.t_embedder = TimestepEmbedder(min(dim, LARGEST_MODULATION), operations=operations, **place)
        norm = _rms(cap_feat_dim, norm_eps, place, operations)
        self.cap_embedder = nn.Sequential(norm, operations.Linear(cap_feat_dim, dim, **place))
        self.layers = blocks(n_layers)
        self.norm_final = _rms(dim, norm_eps, place, operations)  # in the files, not used
        self.final_layer = FinalLayer(dim, patch_size, in_channels, place, operations)
        self.rope_embedder = EmbedND(dim // n_heads, 10000, list(axes_dims))

    def _places(self, rows: int, cols: int, lengths: torch.Tensor, text: int) -> torch.Tensor:
        """Places of text and picture [B, text + L, 3]: the picture comes after each row's own text, `lengths` [B]."""
        place: dict[str, Any] = {"device": lengths.device, "dtype": torch.float32}
        batch = lengths.shape[0]
        ids = torch.zeros((batch, text + rows * cols, 3), **place)
        ids[:, :text, 0] = torch.arange(text, **place)
        ids[:, text:, 0] = lengths[:, None].to(torch.float32)
        ids[:, text:, 1] = torch.arange(rows, **place).repeat_interleave(cols)
        ids[:, text:, 2] = torch.arange(cols, **place).repeat(rows)
        return ids

    def embed(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, num_tokens: int | None, mask: Any,
        call: dit.DenoiserCall,
    ) -> dit.DiTState:  # fmt: skip
        """Padded latents [B, C, H, W], times [B], text [B, L, in] and its mask [B, L] -> whole state.

        The text's own blocks are run here: they are few, and their tokens fewer.
        """
        rows, cols = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        batch, text = x.shape[0], context.shape[1]
        allowed = None if mask is None else _key_mask(mask)
        if allowed is None:
            text = text if num_tokens is None else min(num_tokens, text)
            lengths = torch.full((batch,), text, device=x.device)
        else:
            lengths = allowed.sum(dim=1).expand(batch)
        pe = self.rope_embedder(self._places(rows, cols, lengths, text))
        txt = self.cap_embedder(context[:, :text])
        keys = None if allowed is None else allowed.unsqueeze(1)
        alone = dataclasses.replace(call, plan=None)
        refined = dit.DiTState({"txt": txt}, {"pe": dit.TokenAxis(pe[:, :, :text], ("txt",), 2)}, {"mask": keys})
        block: Any
        for block in self.context_refiner:
            refined = block.forward_state(refined, alone)
        img = self.x_embedder(to_patches(x, self.patch_size, channels_first=False))
        if keys is not None:
            keys = torch.cat((keys, keys.new_ones((*keys.shape[:2], rows * cols))), dim=2)
        return dit.DiTState(
            streams={"txt": refined.streams["txt"], "img": img},
            tokenwise={
                "pe": dit.TokenAxis(pe, ("txt", "img"), 2, inside=True),
                "img_pe": dit.TokenAxis(pe[:, :, text:], ("img",), 2, inside=True),
            },
            sample={"vec": self.t_embedder(1.0 - timesteps, dtype=x.dtype), "mask": keys},
        )

    def block_list(self) -> tuple[dit.Block, ...]:
        """The picture's own blocks, then those of text and picture."""
        kinds = (("noise_refiner", self.noise_refiner, _ALONE), ("layers", self.layers, _JOINT))
        names = {"noise_refiner": "noise_refiner", "layers": "single_block"}
        return tuple(
            dit.Block(f"{name}.{i}", block, arguments, i, replace_key=(names[name], i))
            for name, blocks, arguments in kinds
            for i, block in enumerate(blocks)
        )

    def prepared_layers(self, state: dit.DiTState) -> list[dit.PreparedLayer]:
        """All blocks' modulations: they need nothing but the time's vector."""
        vec = state.sample["vec"]
        return [
            dit.PreparedLayer(m, 4 * self.hidden_size, functools.partial(m.adaLN_modulation, vec))
            for m in (*self.noise_refiner, *self.layers)
        ]

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Patches [B, L, patch^2 * channels], whole."""
        out = self.final_layer(state.streams["img"], state.sample["vec"])
        return state.with_stream("img", out).whole("img")

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        num_tokens: int | None = None,
        attention_mask: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, C, H, W] at times [B] in 0..1 given text [B, L, cap_feat_dim].

        num_tokens: how many of the text's tokens count, all by default; attention_mask [B, L]: 1 where there is text.
        """
        return comfy.ldm.common_dit.inside_wrappers(
            self, self._forward, transformer_options, x, timesteps, context, num_tokens, attention_mask, control,
            transformer_options, **kwargs,
        )  # fmt: skip

    def _forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, num_tokens: Any, mask: Any,
        control: Any, options: Any, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        call = dit.call_of(options, control)
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        state = dit.run_blocks(self, self.embed(padded, timesteps, context, num_tokens, mask, call), call)
        out = to_picture(self.head(state), padded.shape[2] // self.patch_size, self.patch_size)
        return -out[:, :, : x.shape[2], : x.shape[3]]


def _key_mask(mask: torch.Tensor) -> torch.Tensor:
    """Which tokens there are, from whole numbers [B, L] (1 for text) or from what is added to scores (0 for text)."""
    return mask >= 0 if mask.is_floating_point() else mask > 0
