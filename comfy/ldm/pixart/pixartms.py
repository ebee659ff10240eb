"""PixArt-Alpha and PixArt-Sigma (Chen et al. 2023 and 2024): self-attention, cross-attention to T5's features, MLP.

One modulation for all blocks, to which each adds a table of its own (adaLN-single). Shapes: B pictures, L tokens,
C hidden size, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
from comfy.ldm import dit
from comfy.ldm.modules.attention import AttentionSpec, attention, joined_heads, meet
from comfy.ldm.modules.embedders import Mlp, PatchEmbed, TimestepEmbedder, heads_of, to_picture, waves_2d
from comfy.ldm.modules.modulate import add_gated, norm_modulate

BASE = 64  # latent cells of a side of the pictures that the table of positions is made for: 512 pixels
_ARGUMENTS = dit.BlockArguments(
    tokens={"img": ("img",)}, values={"txt": "txt", "vec": "vec"}, renamed={"img": "x", "txt": "y", "vec": "t"}
)


class SelfAttention(nn.Module):
    """The weights of attention among picture tokens."""

    def __init__(self, dim: int, num_heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = operations.Linear(dim, 3 * dim, dtype=dtype, device=device)
        self.proj = operations.Linear(dim, dim, dtype=dtype, device=device)


class CrossAttention(nn.Module):
    """The weights of attention to text tokens."""

    def __init__(self, dim: int, num_heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q_linear = operations.Linear(dim, dim, dtype=dtype, device=device)
        self.kv_linear = operations.Linear(dim, 2 * dim, dtype=dtype, device=device)
        self.proj = operations.Linear(dim, dim, dtype=dtype, device=device)


@dit.own_block
class PixArtMSBlock(nn.Module):
    """Self-attention, cross-attention, MLP; the cross-attention is neither normed nor modulated."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, dtype: Any = None, device: Any = None,
        operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device, "operations": operations}
        self.attn = SelfAttention(hidden_size, num_heads, **place)
        self.cross_attn = CrossAttention(hidden_size, num_heads, **place)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), **place)
        table = torch.empty((6, hidden_size), dtype=dtype, device=device)
        self.scale_shift_table = nn.Parameter(table, requires_grad=False)

    @dit.stage
    def _into_attention(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, L, C] -> q, k, v [B, H, L, D]."""
        return heads_of(self.attn.qkv(norm_modulate(x, scale, shift)), 3, self.attn.head_dim)

    @dit.stage
    def _to_text(self, x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, L, C] with the self-attention's output added, and its queries of the text [B, H, L, D]."""
        x = add_gated(x, self.attn.proj(out), gate)
        (q,) = heads_of(self.cross_attn.q_linear(x), 1, self.cross_attn.head_dim)
        return x, q

    @dit.stage
    def _mlp(self, x: torch.Tensor, out: torch.Tensor, mods: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Add the cross-attention's output and the MLP's to x [B, L, C]."""
        shift, scale, gate = mods
        x = x + self.cross_attn.proj(out)
        return add_gated(x, self.mlp(norm_modulate(x, scale, shift)), gate)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on a state with the stream `img`, the text `txt` [B, L, C] and the modulation `vec` [B, 6 C]."""
        x, txt, vec = state.streams["img"], state.sample["txt"], state.sample["vec"]
        table = comfy.ops.cast_to(self.scale_shift_table, dtype=x.dtype, device=x.device)
        shift, scale, gate, *mods = (table + vec.unflatten(-1, (6, -1))).chunk(6, dim=1)
        image = state.tokens("img")
        q, k, v = self._into_attention(x, shift, scale)
        meeting = meet(AttentionSpec(q.shape[1], image, layer=call.layer), call)
        meeting.send(q, k, v)
        k, v = heads_of(self.cross_attn.kv_linear(txt), 2, self.cross_attn.head_dim)
        meeting.attend()
        meeting.send_back()
        x, q = self._to_text(x, joined_heads(meeting.result()), gate)
        out = attention(q, k, v, AttentionSpec(q.shape[1], image, dit.Tokens((txt.shape[1],))), call)
        return state.with_stream("img", self._mlp(x, out, tuple(mods)))

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, transformer_options: dict[str, Any] | None = None
    ) -> torch.Tensor:
        """Whole picture [B, L, C], text [B, L, C] and modulation [B, 6 C] -> [B, L, C]."""
        call = dit.call_of(transformer_options)
        state = dit.DiTState({"img": x}, {}, {"txt": y, "vec": t})
        return self.forward_state(state.shard(call.plan), call).whole("img")


class SizeEmbedder(TimestepEmbedder):
    """Numbers [B, n] -> [B, n * C]: each by itself."""

    def forward(self, t: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        return super().forward(t.flatten(), dtype).unflatten(0, t.shape).flatten(1)


class CaptionEmbedder(nn.Module):
    """T5's features [B, L, in] -> [B, L, C]. `y_embedding` is what training puts in the place of some prompts."""

    def __init__(
        self, in_channels: int, hidden_size: int, length: int, dtype: Any, device: Any, operations: Any
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.y_proj = Mlp(hidden_size, hidden_size, in_features=in_channels, operations=operations, **place)
        self.y_embedding = nn.Parameter(torch.empty((length, in_channels), **place), requires_grad=False)

    def forward(self, caption: torch.Tensor) -> torch.Tensor:
        return self.y_proj(caption)


class FinalLayer(nn.Module):
    """Tokens to patches: [B, L, C] -> [B, L, patch^2 * out_channels]."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__()
        self.linear = operations.Linear(hidden_size, patch_size**2 * out_channels, dtype=dtype, device=device)
        table = torch.empty((2, hidden_size), dtype=dtype, device=device)
        self.scale_shift_table = nn.Parameter(table, requires_grad=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        table = comfy.ops.cast_to(self.scale_shift_table, dtype=x.dtype, device=x.device)
        shift, scale = (table + t.unsqueeze(1)).chunk(2, dim=1)
        return self.linear(norm_modulate(x, scale, shift))


class PixArtMS(nn.Module):
    """The whole network, with ComfyUI's configuration names.

    micro_condition: it knows the picture's size and its ratio of height to width (Alpha). pe_interpolation: by how
    much the table of positions is stretched; without it the picture's size says so.
    """

    def __init__(
        self, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152, depth: int = 28, num_heads: int = 16,
        mlp_ratio: float = 4.0, caption_channels: int = 4096, model_max_length: int = 120,
        micro_condition: bool = True, pe_interpolation: float | None = None, dtype: Any = None, device: Any = None,
        operations: Any = None, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device, "operations": operations}
        self.dtype, self.patch_size = dtype, patch_size
        self.hidden_size, self.num_heads, self.depth = hidden_size, num_heads, depth
        self.mlp_size = int(hidden_size * mlp_ratio)
        self.in_channels, self.out_channels = in_channels, 2 * in_channels
        self.pe_interpolation = pe_interpolation
        linear = operations.Linear(hidden_size, 6 * hidden_size, dtype=dtype, device=device)
        self.t_block = nn.Sequential(nn.SiLU(), linear)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, **place)
        self.t_embedder = TimestepEmbedder(hidden_size, **place)
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length, **place)
        self.micro_conditioning = micro_condition
        if micro_condition:
            self.csize_embedder = SizeEmbedder(hidden_size // 3, **place)
            self.ar_embedder = SizeEmbedder(hidden_size // 3, **place)
        self.blocks = nn.ModuleList(PixArtMSBlock(hidden_size, num_heads, mlp_ratio, **place) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, **place)

    def positions(self, height: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """The table of a latent's patches [1, L, C]: a grid of so many pictures of 512 pixels as its mean side has."""
        tiles = max(1, round((height + width) / 2 / BASE))
        stretch = tiles if self.pe_interpolation is None else self.pe_interpolation
        reach = tiles * BASE / self.patch_size / stretch
        rows, cols = height // self.patch_size, width // self.patch_size
        place: dict[str, Any] = {"device": like.device, "dtype": torch.float64}
        down, across = (torch.arange(n, **place) * (reach / n) for n in (rows, cols))
        return waves_2d(down, across, self.hidden_size).unsqueeze(0).to(like)

    def embed(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, c_size: torch.Tensor, c_ar: torch.Tensor
    ) -> dit.DiTState:
        """Padded latents [B, C, H, W], times [B], text [B, L, in], sizes [B, 2], ratios [B, 1] -> whole state."""
        img = self.x_embedder(x)
        img = img + self.positions(x.shape[2], x.shape[3], img)
        time = self.t_embedder(timesteps, dtype=x.dtype)
        if self.micro_conditioning:
            sizes = [self.csize_embedder(c_size, dtype=x.dtype), self.ar_embedder(c_ar, dtype=x.dtype)]
            time = time + torch.cat(sizes, dim=1)
        sample = {"txt": self.y_embedder(context), "vec": self.t_block(time), "time": time}
        return dit.DiTState({"img": img}, {}, sample)

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        return tuple(
            dit.Block(
                f"blocks.{i}", block, _ARGUMENTS, i, replace_key=("double_block", i),
                residual=dit.Residual("img", "output", i),
            )
            for i, block in enumerate(self.blocks)
        )  # fmt: skip

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Patches [B, L, patch^2 * out_channels], whole."""
        out = self.final_layer(state.streams["img"], state.sample["time"])
        return state.with_stream("img", out).whole("img")

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        c_size: torch.Tensor | None = None,
        c_ar: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the noise of latents x [B, C, H, W] at times [B] (0..999) given text [B, L, caption_channels].

        c_size: height and width in pixels [B, 2]; c_ar: their ratio [B, 1]; by default those of the latent.
        """
        return comfy.ldm.common_dit.inside_wrappers(
            self, self._forward, transformer_options, x, timesteps, context, c_size, c_ar, control,
            transformer_options, **kwargs,
        )  # fmt: skip

    def _forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, c_size: Any, c_ar: Any, control: Any,
        options: Any, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        call = dit.call_of(options, control)
        batch, _, height, width = x.shape
        if c_size is None:
            c_size = torch.cat([x.new_full((batch, 1), 8 * side) for side in (height, width)], dim=1)
        if c_ar is None:
            c_ar = x.new_full((batch, 1), height / width)
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        state = dit.run_blocks(self, self.embed(padded, timesteps, context, c_size, c_ar), call)
        out = to_picture(self.head(state), padded.shape[2] // self.patch_size, self.patch_size)
        return out[:, : self.in_channels, : x.shape[2], : x.shape[3]]  # the rest is the predicted variance
