"""MM-DiT, the network of Stable Diffusion 3 and 3.5 (Esser et al. 2024, Scaling Rectified Flow Transformers).

Picture and text tokens have weights of their own and attend to each other in every block. In SD3.5 medium the first
blocks have a second attention, among picture tokens only. Shapes: B pictures, L tokens, C hidden size, H heads of 64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, joined_heads, meet
from comfy.ldm.modules.copy_runs import joined_tokens
from comfy.ldm.modules.embedders import Mlp, PatchEmbed, TimestepEmbedder, heads_of, to_picture, waves_2d
from comfy.ldm.modules.modulate import add_gated, add_gated_norm_modulate, norm_modulate

__all__ = ["DismantledBlock", "JointBlock", "MMDiT", "OpenAISignatureMMDITWrapper", "RMSNorm", "SelfAttention"]

HEAD = 64
_ARGUMENTS = dit.BlockArguments(
    tokens={"txt": ("txt",), "img": ("img",)},
    values={"vec": "vec"},
    renamed={"txt": "context", "img": "x", "vec": "c"},
)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, with a weight unless told otherwise."""

    def __init__(
        self, dim: int, elementwise_affine: bool = True, eps: float = 1e-6, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        empty = torch.empty(dim, device=device, dtype=dtype)
        self.weight = nn.Parameter(empty, requires_grad=False) if elementwise_affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return comfy.ldm.common_dit.rms_norm(x, self.weight, self.eps)


class SelfAttention(nn.Module):
    """The weights of one stream's attention. Queries and keys are normed where the model has `ln_q` and `ln_k`."""

    ln_q: nn.Module
    ln_k: nn.Module

    def __init__(
        self, dim: int, num_heads: int, qk_norm: str | None = None, pre_only: bool = False, dtype: Any = None,
        device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = operations.Linear(dim, 3 * dim, **place)
        if not pre_only:
            self.proj = operations.Linear(dim, dim, **place)
        if qk_norm not in (None, "rms", "ln"):
            raise ValueError(f"qk_norm {qk_norm!r} is not known; use rms, ln or None")
        for name in ("ln_q", "ln_k"):
            norm: nn.Module = nn.Identity()
            if qk_norm == "rms":
                norm = RMSNorm(self.head_dim, **place)
            elif qk_norm == "ln":
                norm = operations.LayerNorm(self.head_dim, eps=1e-6, **place)
            setattr(self, name, norm)

    def pre_attention(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, L, C] -> q, k, v [B, H, L, D]."""
        q, k, v = heads_of(self.qkv(x), 3, self.head_dim)
        return self.ln_q(q).to(v), self.ln_k(k).to(v), v


class DismantledBlock(nn.Module):
    """One stream's half of a block.

    pre_only: its tokens are only attended to (the text of the last block). x_block_self_attn: it has a second attention
    among its own tokens.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, pre_only: bool = False,
        qk_norm: str | None = None, x_block_self_attn: bool = False, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device, "operations": operations}
        self.pre_only, self.x_block_self_attn = pre_only, x_block_self_attn
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm, pre_only, **place)
        if x_block_self_attn:
            self.attn2 = SelfAttention(hidden_size, num_heads, qk_norm, **place)
        if not pre_only:
            self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), **place)
        self.parts = 2 if pre_only else 9 if x_block_self_attn else 6
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), operations.Linear(hidden_size, self.parts * hidden_size, dtype=dtype, device=device)
        )

    def modulation(self, c: torch.Tensor, call: dit.DenoiserCall) -> tuple[torch.Tensor, ...]:
        """c [B, C] -> shift, scale[, gate, MLP's shift, scale, gate[, second attention's]], [B, 1, C] each."""
        ready = call.prepared.get(id(self))
        return (self.adaLN_modulation(c).unsqueeze(1) if ready is None else ready).chunk(self.parts, dim=-1)

    @dit.stage
    def into_attention(self, x: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """x [B, L, C] -> q, k, v [B, H, L, D] of the joint attention."""
        return self.attn.pre_attention(norm_modulate(x, mods[1], mods[0]))

    @dit.stage
    def into_own_attention(self, x: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """x [B, L, C] -> q, k, v [B, H, L, D] of the second attention."""
        return self.attn2.pre_attention(norm_modulate(x, mods[7], mods[6]))

    @dit.stage
    def after_attention(
        self, x: torch.Tensor, out: torch.Tensor, own: torch.Tensor | None, mods: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Add the joint attention's output [B, L, C], the second one's if there is one, and the MLP's to x [B, L, C]."""
        shift, scale, gate = mods[3:6]
        if own is not None:
            x = add_gated(x, self.attn2.proj(own), mods[8])
        x, normed = add_gated_norm_modulate(x, self.attn.proj(out), mods[2], scale, shift)
        return add_gated(x, self.mlp(normed), gate)


@dit.own_block
class JointBlock(nn.Module):
    """Text and picture tokens attending to each other."""

    def __init__(self, hidden_size: int, num_heads: int, pre_only: bool = False, **options: Any) -> None:
        super().__init__()
        own = options.pop("x_block_self_attn", False)
        self.context_block = DismantledBlock(hidden_size, num_heads, pre_only=pre_only, **options)
        self.x_block = DismantledBlock(hidden_size, num_heads, x_block_self_attn=own, **options)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on a state with the streams `txt` and `img`."""
        txt, img, c = state.streams["txt"], state.streams["img"], state.sample["vec"]
        txt_mods, img_mods = self.context_block.modulation(c, call), self.x_block.modulation(c, call)
        parts = zip(self.context_block.into_attention(txt, txt_mods), self.x_block.into_attention(img, img_mods))
        q, k, v = (joined_tokens(*pair) for pair in parts)
        meeting = meet(AttentionSpec(q.shape[1], state.tokens("txt", "img"), layer=call.layer), call)
        meeting.send(q, k, v)
        second = None
        if self.x_block.x_block_self_attn:
            layer = None if call.layer is None else f"{call.layer}.attn2"
            mine = self.x_block.into_own_attention(img, img_mods)
            second = meet(AttentionSpec(mine[0].shape[1], state.tokens("img"), layer=layer), call)
        meeting.attend()
        meeting.send_back()
        own = None
        if second is not None:
            second.send(*mine)
        out = joined_heads(meeting.result())
        if second is not None:
            second.attend()
            second.send_back()
            own = joined_heads(second.result())
        txt_out, img_out = out.split(state.inside("txt", "img"), dim=1)
        img = self.x_block.after_attention(img, img_out, own, img_mods)
        if not self.context_block.pre_only:
            txt = self.context_block.after_attention(txt, txt_out, None, txt_mods)
        return state.replace(streams={"txt": txt, "img": img})

    def forward(
        self,
        context: torch.Tensor,
        x: torch.Tensor,
        c: torch.Tensor,
        transformer_options: dict[str, Any] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Whole text [B, L, C], picture [B, L, C] and vector [B, C] -> text (None after the last block) and picture."""
        call = dit.call_of(transformer_options)
        state = dit.DiTState({"txt": context, "img": x}, {}, {"vec": c})
        state = self.forward_state(state.shard(call.plan), call)
        return (None if self.context_block.pre_only else state.whole("txt")), state.whole("img")


class FinalLayer(nn.Module):
    """Tokens to patches: [B, L, C] -> [B, L, patch^2 * out_channels]."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.linear = operations.Linear(hidden_size, patch_size**2 * out_channels, **place)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(hidden_size, 2 * hidden_size, **place))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(norm_modulate(x, scale, shift))


class VectorEmbedder(nn.Module):
    """Pooled text [B, in] -> [B, C]."""

    def __init__(
        self, width: int, hidden_size: int, dtype: Any = None, device: Any = None, operations: Any = None
    ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        first, second = (
            operations.Linear(width, hidden_size, **place),
            operations.Linear(hidden_size, hidden_size, **place),
        )
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.mlp(y)


class MMDiT(nn.Module):
    """The whole network, with ComfyUI's configuration names.

    Raises ValueError for a picture whose patches do not fit into the table of positions.
    """

    def __init__(
        self, in_channels: int = 16, patch_size: int = 2, out_channels: int | None = None, depth: int = 24,
        input_size: int | None = None, adm_in_channels: int | None = None, mlp_ratio: float = 4.0,
        context_embedder_config: dict[str, Any] | None = None, num_patches: int | None = None,
        pos_embed_max_size: int | None = None, pos_embed_scaling_factor: float | None = None,
        qk_norm: str | None = None, x_block_self_attn_layers: Sequence[int] = (), num_blocks: int | None = None,
        final_layer: bool = True, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any,
    ) -> None:  # fmt: skip
        """num_blocks: how many there are, if not `depth`; without `final_layer` (in ControlNets) the last is as the others."""
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        self.dtype, self.patch_size = dtype, patch_size
        self.hidden_size, self.num_heads = HEAD * depth, depth
        self.out_channels = in_channels if out_channels is None else out_channels
        self.mlp_size = int(self.hidden_size * mlp_ratio)
        self.pos_embed_max_size = pos_embed_max_size
        self.dual_layers = frozenset(x_block_self_attn_layers)
        self.pos_embed: nn.Parameter | None = None
        if num_patches is not None:
            table = torch.empty((1, num_patches, self.hidden_size), **place)
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.x_embedder = PatchEmbed(patch_size, in_channels, self.hidden_size, operations=operations, **place)
        self.t_embedder = TimestepEmbedder(self.hidden_size, operations=operations, **place)
        if adm_in_channels is not None:
            self.y_embedder: nn.Module | None = VectorEmbedder(
                adm_in_channels, self.hidden_size, operations=operations, **place
            )
        else:
            self.y_embedder = None
        self.context_embedder: nn.Module = nn.Identity()
        if context_embedder_config is not None:
            width = context_embedder_config["params"]["in_features"]
            self.context_embedder = operations.Linear(width, self.hidden_size, **place)
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                self.hidden_size, self.num_heads, pre_only=final_layer and i == depth - 1, mlp_ratio=mlp_ratio,
                qk_norm=qk_norm, x_block_self_attn=i in x_block_self_attn_layers, operations=operations, **place,
            )
            for i in range(depth if num_blocks is None else num_blocks)
        )  # fmt: skip
        if final_layer:
            self.final_layer = FinalLayer(
                self.hidden_size, patch_size, self.out_channels, operations=operations, **place
            )

    @staticmethod
    def computed_positions(rows: int, cols: int, like: torch.Tensor) -> torch.Tensor:
        """Places of a grid of patches around 7.5, the shorter side 15 long: [1, rows * cols, C] as tokens `like`."""
        shorter = min(rows, cols)
        reach_y, reach_x = 7.5 * rows / shorter, 7.5 * cols / shorter
        place: dict[str, Any] = {"device": like.device, "dtype": torch.float64}
        down = torch.linspace(7.5 - reach_y, 7.5 + reach_y, rows, **place)
        across = torch.linspace(7.5 - reach_x, 7.5 + reach_x, cols, **place)
        return waves_2d(down, across, like.shape[-1]).unsqueeze(0).to(like)

    def positions(self, rows: int, cols: int, like: torch.Tensor) -> torch.Tensor:
        """The table of a grid of patches [1, rows * cols, C]: the middle of the stored one, else computed."""
        if self.pos_embed is None:
            return self.computed_positions(rows, cols, like)
        size = self.pos_embed_max_size or math.isqrt(self.pos_embed.shape[1])
        if rows > size or cols > size:
            raise ValueError(
                f"a picture of {cols * self.patch_size * 8} x {rows * self.patch_size * 8} pixels is larger than this "
                f"SD3 model knows (at most {size * self.patch_size * 8} each way); choose a smaller size"
            )
        top, left = (size - rows) // 2, (size - cols) // 2
        table = self.pos_embed.unflatten(1, (size, size))[:, top : top + rows, left : left + cols]
        return comfy.ops.cast_to(table.flatten(1, 2), dtype=like.dtype, device=like.device)

    def embed(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor | None
    ) -> dit.DiTState:
        """Padded latents [B, C, H, W], times [B], text [B, L, width], pooled text [B, width] -> whole state."""
        rows, cols = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        img = self.x_embedder(x)
        img = img + self.positions(rows, cols, img)
        vec = self.t_embedder(timesteps, dtype=x.dtype)
        if y is not None and self.y_embedder is not None:
            vec = vec + self.y_embedder(y)
        return dit.DiTState({"txt": self.context_embedder(context), "img": img}, {}, {"vec": vec})

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order; ControlNets of this family give one residual for each of the first of them."""
        return tuple(
            dit.Block(
                f"joint_blocks.{i}", block, _ARGUMENTS, i, replace_key=("double_block", i),
                residual=dit.Residual("img", "output", i), cost=1.25 if i in self.dual_layers else 1.0,
            )
            for i, block in enumerate(self.joint_blocks)
        )  # fmt: skip

    def prepared_layers(self, state: dit.DiTState) -> list[dit.PreparedLayer]:
        """All blocks' modulations, a third of all weights: they need nothing but the vector [B, C]."""
        vec = state.sample["vec"]
        halves = [m for m in self.modules() if type(m) is DismantledBlock]
        return [
            dit.PreparedLayer(m, m.parts * self.hidden_size, functools.partial(m.adaLN_modulation, vec)) for m in halves
        ]

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Picture tokens of the state -> patches [B, L, patch^2 * out_channels], whole."""
        out = self.final_layer(state.streams["img"], state.sample["vec"])
        return state.with_stream("img", out).whole("img")

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, C, H, W] at times [B] (0..1000) given text [B, L, width] and y [B, width]."""
        return comfy.ldm.common_dit.inside_wrappers(
            self, self._forward, transformer_options, x, timesteps, context, y, control, transformer_options, **kwargs
        )

    def _forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: Any, control: Any, options: Any,
        **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        call = dit.call_of(options, control)
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        state = dit.run_blocks(self, self.embed(padded, timesteps, context, y), call)
        out = to_picture(self.head(state), padded.shape[2] // self.patch_size, self.patch_size)
        return out[:, :, : x.shape[2], : x.shape[3]]


class OpenAISignatureMMDITWrapper(MMDiT):
    """The name under which ComfyUI makes the network."""
