"""HunyuanDiT 1.1 and 1.2 (Li et al. 2024): a DiT with skips from its first half to its second.

Picture tokens attend to each other and to BERT's and mT5's features of the prompt, both with rotary places in two
dimensions. Shapes: B pictures, L tokens, C hidden size, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
from comfy.ldm import dit
from comfy.ldm.flux.math import apply_rope, apply_rope1, rope
from comfy.ldm.modules.attention import AttentionSpec, attention, joined_heads, meet
from comfy.ldm.modules.embedders import Mlp, PatchEmbed, TimestepEmbedder, heads_of, timestep_embedding, to_picture
from comfy.ldm.modules.kernels import scaled_dot_product
from comfy.ldm.modules.modulate import norm_modulate

BASE = 32  # patches of a side of the pictures that places are made for: 512 pixels
POOLED = 1024
_POOLER_HEADS = 8
_SIZES = 6  # numbers that say a picture's size: height, width, target height, target width, crop top, crop left
_ARGUMENTS = dit.BlockArguments(
    tokens={"img": ("img",)},
    values={"txt": "txt", "vec": "vec", "pe": "pe"},
    renamed={"img": "x", "txt": "text_states", "vec": "c", "pe": "freq_cis_img"},
    hidden={"skip": dit.SKIP},
    optional=frozenset({"skip"}),
)


def picture_places(rows: int, cols: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of a grid's rows and columns: it is fitted into `BASE` x `BASE` and centred there (HunyuanDiT, 2.2)."""
    longer = max(rows, cols)
    places = []
    for count in (rows, cols):
        fitted = round(BASE / longer * count)
        first = round((BASE - fitted) / 2)
        steps = torch.arange(count, device=device, dtype=torch.float64)
        places.append(first + steps * (fitted / count))
    return places[0], places[1]


def picture_rope(rows: int, cols: int, head: int, device: Any) -> torch.Tensor:
    """Rotary table [1, 1, L, head/2, 2, 2]: a head's first half turns with the column, its second with the row."""
    down, across = picture_places(rows, cols, device)
    first = rope(across, head // 2, 10000).unsqueeze(0).expand(rows, -1, -1, -1, -1)
    second = rope(down, head // 2, 10000).unsqueeze(1).expand(-1, cols, -1, -1, -1)
    return torch.cat((first, second), dim=2).flatten(0, 1)[None, None]


class _Attention(nn.Module):
    """What self- and cross-attention have in common: norms of queries and keys, and the last linear."""

    def __init__(self, dim: int, num_heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q_norm = operations.LayerNorm(self.head_dim, eps=1e-6, **place)
        self.k_norm = operations.LayerNorm(self.head_dim, eps=1e-6, **place)
        self.out_proj = operations.Linear(dim, dim, **place)


class SelfAttention(_Attention):
    """The weights of attention among picture tokens."""

    def __init__(self, dim: int, num_heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(dim, num_heads, dtype, device, operations)
        self.Wqkv = operations.Linear(dim, 3 * dim, dtype=dtype, device=device)


class CrossAttention(_Attention):
    """The weights of attention to text tokens."""

    def __init__(self, dim: int, text: int, num_heads: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__(dim, num_heads, dtype, device, operations)
        self.q_proj = operations.Linear(dim, dim, dtype=dtype, device=device)
        self.kv_proj = operations.Linear(text, 2 * dim, dtype=dtype, device=device)

    def keys_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text [B, L, in] -> k and v [B, H, L, D]."""
        k, v = heads_of(self.kv_proj(text), 2, self.head_dim)
        return self.k_norm(k).to(v), v


@dit.own_block
class HunYuanDiTBlock(nn.Module):
    """Self-attention, cross-attention, MLP. In the second half the tokens of an earlier block are mixed in first."""

    norm1: nn.Module
    norm2: nn.Module
    norm3: nn.Module

    def __init__(
        self, hidden_size: int, c_emb_size: int, num_heads: int, mlp_ratio: float = 4.0, text_states_dim: int = 1024,
        skip: bool = False, dtype: Any = None, device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        for name in ("norm1", "norm2", "norm3"):
            setattr(self, name, operations.LayerNorm(hidden_size, eps=1e-6, **place))
        self.attn1 = SelfAttention(hidden_size, num_heads, operations=operations, **place)
        self.attn2 = CrossAttention(hidden_size, text_states_dim, num_heads, operations=operations, **place)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), operations=operations, **place)
        self.default_modulation = nn.Sequential(nn.SiLU(), operations.Linear(c_emb_size, hidden_size, **place))
        self.skip_linear = None
        if skip:
            self.skip_norm = operations.LayerNorm(2 * hidden_size, eps=1e-6, **place)
            self.skip_linear = operations.Linear(2 * hidden_size, hidden_size, **place)

    @dit.stage
    def _mixed(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """x and an earlier block's tokens, [B, L, C] each -> [B, L, C]."""
        assert self.skip_linear is not None
        return self.skip_linear(self.skip_norm(torch.cat((x, skip), dim=-1)))

    @dit.stage
    def _into_attention(self, x: torch.Tensor, shift: torch.Tensor, pe: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, L, C] -> q, k, v [B, H, L, D], q and k rotated."""
        attn = self.attn1
        q, k, v = heads_of(attn.Wqkv(self.norm1(x) + shift), 3, attn.head_dim)
        return (*apply_rope(attn.q_norm(q).to(v), attn.k_norm(k).to(v), pe), v)

    @dit.stage
    def _to_text(
        self, x: torch.Tensor, out: torch.Tensor, pe: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """x [B, L, C] with the self-attention's output added, and its rotated queries of the text [B, H, L, D]."""
        x = x + self.attn1.out_proj(out)
        (q,) = heads_of(self.attn2.q_proj(self.norm3(x)), 1, self.attn2.head_dim)
        return x, apply_rope1(self.attn2.q_norm(q).to(x), pe)

    @dit.stage
    def _mlp(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add the cross-attention's output and the MLP's to x [B, L, C]."""
        x = x + self.attn2.out_proj(out)
        return x + self.mlp(self.norm2(x))

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on a state with the stream `img`, its table `pe`, the text `txt` [B, L, in] and `vec` [B, C]."""
        x, txt, pe = state.streams["img"], state.sample["txt"], state.local("pe")
        if self.skip_linear is not None:
            x = self._mixed(x, state.local(dit.SKIP))
        image = state.tokens("img")
        shift = self.default_modulation(state.sample["vec"]).unsqueeze(1)
        q, k, v = self._into_attention(x, shift, pe)
        meeting = meet(AttentionSpec(q.shape[1], image, layer=call.layer), call)
        meeting.send(q, k, v)
        k, v = self.attn2.keys_values(txt)
        meeting.attend()
        meeting.send_back()
        x, q = self._to_text(x, joined_heads(meeting.result()), pe)
        out = attention(q, k, v, AttentionSpec(q.shape[1], image, dit.Tokens((txt.shape[1],))), call)
        return state.with_stream("img", self._mlp(x, out))

    def forward(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        text_states: torch.Tensor,
        freq_cis_img: torch.Tensor,
        skip: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole picture [B, L, C], vector [B, C], text [B, L, in], rotary table and skip [B, L, C] -> [B, L, C].

        Raises ValueError when the block needs a skip and has none.
        """
        if self.skip_linear is not None and skip is None:
            raise ValueError("this HunyuanDiT block mixes in the tokens of an earlier block; call it with skip=")
        call = dit.call_of(transformer_options)
        axes = {"pe": dit.TokenAxis(freq_cis_img, ("img",), 2, inside=True)}
        if skip is not None:
            axes[dit.SKIP] = dit.TokenAxis(skip, ("img",), 1)
        state = dit.DiTState({"img": x}, axes, {"txt": text_states, "vec": c})
        return self.forward_state(state.shard(call.plan), call).whole("img")


class AttentionPool(nn.Module):
    """All of mT5's features in one vector: their mean attends to them (Radford et al. 2021, CLIP): -> [B, out]."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, length: int, width: int, output: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        table = torch.empty((length + 1, width), **place)
        self.positional_embedding = nn.Parameter(table, requires_grad=False)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, operations.Linear(width, width, **place))
        self.c_proj = operations.Linear(width, output, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, : self.positional_embedding.shape[0] - 1]
        x = torch.cat((x.mean(dim=1, keepdim=True), x), dim=1)
        x = x + comfy.ops.cast_to(self.positional_embedding, dtype=x.dtype, device=x.device)[: x.shape[1]]
        tokens = (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        q, k, v = (heads_of(t, 1, t.shape[-1] // _POOLER_HEADS)[0] for t in tokens)
        return self.c_proj(joined_heads(scaled_dot_product(q, k, v)).squeeze(1))


class FinalLayer(nn.Module):
    """Tokens to patches: [B, L, C] -> [B, L, patch^2 * out_channels]."""

    def __init__(
        self, hidden_size: int, c_emb_size: int, patch_size: int, out_channels: int, dtype: Any, device: Any,
        operations: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.linear = operations.Linear(hidden_size, patch_size**2 * out_channels, **place)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(c_emb_size, 2 * hidden_size, **place))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(norm_modulate(x, scale, shift))


class HunYuanDiT(nn.Module):
    """The whole network, with ComfyUI's configuration names. size_cond, use_style_cond: what 1.1 is also told."""

    def __init__(
        self, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152, depth: int = 28, num_heads: int = 16,
        mlp_ratio: float = 4.0, text_states_dim: int = 1024, text_states_dim_t5: int = 2048, text_len: int = 77,
        text_len_t5: int = 256, size_cond: bool = False, use_style_cond: bool = False, skips: bool = True,
        dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any,
    ) -> None:  # fmt: skip
        """skips: without them (in ControlNets) all blocks are as the first half's, and there is no last layer."""
        super().__init__()
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        self.dtype, self.patch_size = dtype, patch_size
        self.hidden_size, self.num_heads, self.depth = hidden_size, num_heads, depth
        self.mlp_size = int(hidden_size * mlp_ratio)
        self.in_channels, self.out_channels = in_channels, 2 * in_channels
        self.text_len, self.text_len_t5 = text_len, text_len_t5
        self.size_cond, self.use_style_cond = size_cond, use_style_cond
        self.mlp_t5 = nn.Sequential(
            operations.Linear(text_states_dim_t5, 4 * text_states_dim_t5, **place),
            nn.SiLU(),
            operations.Linear(4 * text_states_dim_t5, text_states_dim, **place),
        )
        padding = torch.empty((text_len + text_len_t5, text_states_dim), **place)
        self.text_embedding_padding = nn.Parameter(padding, requires_grad=False)
        self.pooler = AttentionPool(text_len_t5, text_states_dim_t5, POOLED, operations=operations, **place)
        told = POOLED + (_SIZES * 256 if size_cond else 0) + (hidden_size if use_style_cond else 0)
        if use_style_cond:
            self.style_embedder = operations.Embedding(1, hidden_size, **place)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size, operations=operations, **place)
        self.t_embedder = TimestepEmbedder(hidden_size, operations=operations, **place)
        self.extra_embedder = nn.Sequential(
            operations.Linear(told, 4 * hidden_size, **place),
            nn.SiLU(),
            operations.Linear(4 * hidden_size, hidden_size, **place),
        )
        self.blocks = nn.ModuleList(
            HunYuanDiTBlock(
                hidden_size, hidden_size, num_heads, mlp_ratio, text_states_dim, skip=skips and layer > depth // 2,
                operations=operations, **place,
            )
            for layer in range(depth)
        )  # fmt: skip
        if skips:
            self.final_layer = FinalLayer(
                hidden_size, hidden_size, patch_size, self.out_channels, operations=operations, **place
            )

    def _text(self, bert: torch.Tensor, bert_mask: Any, t5: torch.Tensor, t5_mask: Any) -> torch.Tensor:
        """Both encoders' features [B, L, in], with learned features in the place of padding."""
        padding = comfy.ops.cast_to(self.text_embedding_padding, dtype=bert.dtype, device=bert.device)
        parts = []
        lengths, masks = (self.text_len, self.text_len_t5), (bert_mask, t5_mask)
        for part, mask, fill in zip((bert, self.mlp_t5(t5)), masks, padding.split(lengths)):
            if mask is not None:
                count = min(len(fill), part.shape[1])  # of a longer prompt the last section has padding
                last = torch.where(mask[:, -count:].bool().unsqueeze(2), part[:, -count:], fill[:count])
                part = torch.cat((part[:, :-count], last), dim=1)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _told(self, t5: torch.Tensor, sizes: torch.Tensor, style: torch.Tensor | None) -> torch.Tensor:
        """What is added to the time's features: pooled text, and for 1.1 sizes and style: [B, C]."""
        parts = [self.pooler(t5)]
        if self.size_cond:
            waves = timestep_embedding(sizes.flatten().float(), 256, time_factor=1.0)
            parts.append(waves.to(t5).unflatten(0, (-1, _SIZES)).flatten(1))
        if self.use_style_cond:
            if style is None:
                style = torch.zeros(t5.shape[0], device=t5.device, dtype=torch.int64)
            parts.append(self.style_embedder(style).to(t5))
        return self.extra_embedder(torch.cat(parts, dim=1))

    def embed(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, t5: torch.Tensor, sizes: torch.Tensor, style: Any
    ) -> dit.DiTState:
        """Padded latents [B, C, H, W], times [B], text of both encoders, mT5's features, sizes [B, 6] -> whole state."""
        rows, cols = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        table = picture_rope(rows, cols, self.hidden_size // self.num_heads, x.device)
        vec = self.t_embedder(t, dtype=x.dtype) + self._told(t5, sizes, style)
        axes = {"pe": dit.TokenAxis(table, ("img",), 2, inside=True)}
        return dit.DiTState({"img": self.x_embedder(x)}, axes, {"txt": text, "vec": vec})

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order; those of the second half take skips, to which ControlNets add, the last one first."""
        half = self.depth // 2
        return tuple(
            dit.Block(
                f"blocks.{i}", block, _ARGUMENTS, i, replace_key=("double_block", i),
                takes_skip=dit.Residual("img", "output", half - i) if i > half else None,
                leaves_skip="img" if i < half - 1 else None,
            )
            for i, block in enumerate(self.blocks)
        )  # fmt: skip

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Patches [B, L, patch^2 * out_channels], whole."""
        out = self.final_layer(state.streams["img"], state.sample["vec"])
        return state.with_stream("img", out).whole("img")

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | None = None,
        text_embedding_mask: torch.Tensor | None = None,
        encoder_hidden_states_t5: torch.Tensor | None = None,
        text_embedding_mask_t5: torch.Tensor | None = None,
        image_meta_size: torch.Tensor | None = None,
        style: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the velocity of latents x [B, C, H, W] at times t [B] (0..999).

        context: BERT's features [B, 77 * n, in]; encoder_hidden_states_t5: mT5's [B, L, in]; their masks [B, L], 1 where
        there is text. image_meta_size [B, 6]: by default the latent's. Raises ValueError without mT5's features.
        """
        if context is None or encoder_hidden_states_t5 is None:
            raise ValueError(
                "HunyuanDiT needs BERT's and mT5's features of the prompt; load both text encoders with DualCLIPLoader"
            )
        return comfy.ldm.common_dit.inside_wrappers(
            self, self._forward, transformer_options, x, t, context, text_embedding_mask, encoder_hidden_states_t5,
            text_embedding_mask_t5, image_meta_size, style, control, transformer_options, **kwargs,
        )  # fmt: skip

    def _forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, mask: Any, t5: torch.Tensor, t5_mask: Any,
        sizes: Any, style: Any, control: Any, options: Any, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        call = dit.call_of(options, control)
        height, width = x.shape[2:]
        if sizes is None:
            told = (8 * height, 8 * width, 8 * height, 8 * width, 0, 0)
            sizes = torch.cat([x.new_full((x.shape[0], 1), number) for number in told], dim=1)
        padded = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        state = self.embed(padded, t, self._text(context, mask, t5, t5_mask), t5, sizes, style)
        out = self.head(dit.run_blocks(self, state, call))
        picture = to_picture(out, padded.shape[2] // self.patch_size, self.patch_size)
        return picture[:, : self.in_channels, :height, :width]  # the rest is the predicted variance
