"""Wan 2.1 and 2.2: a diffusion transformer over video tokens that attends to text by cross-attention (Wan Team 2025).

Shapes: B videos, F frames, L tokens in the order (frame, row, column), C channels, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.patcher_extension
from comfy.ldm import dit
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux.layers import EmbedND, timestep_embedding
from comfy.ldm.modules.attention import AttentionSpec, attention, joined_heads, meet
from comfy.ldm.modules.fused import mlp_gelu
from comfy.ldm.modules.modulate import add_gated, norm_modulate, spread_rows
from comfy.ldm.modules.norm_rope import norm_together_and_rotate

ARGUMENTS = dit.BlockArguments(
    tokens={"img": ("img",)},
    values={"txt": "txt", "vec": "vec", "pe": "pe"},
    optional=frozenset({"context_img_len"}),
    first="img",
    renamed={"txt": "context", "vec": "e", "pe": "freqs"},
    hidden={"context_img_len": "context_img_len"},
)


def heads_of(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, H*D] -> [B, H, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sinusoidal_embedding_1d(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Features [B, dim] of positions [B], cosines first. For custom nodes."""
    return timestep_embedding(position.float(), dim, time_factor=1.0)


def repeat_e(e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Modulation by frame [B, n, C] for the tokens x [B, L, C]: as it is for one row, else [B, L, C]. For custom nodes."""
    return e if e.shape[1] == 1 else spread_rows(e, token_rows(e.shape[1], x.shape[1], x.device))


def token_rows(frames: int, tokens: int, device: torch.device) -> torch.Tensor:
    """The modulation row [L] of each token when `frames` rows are dealt to the tokens in order.

    Where they do not divide evenly each row serves one token more, and the last ones fewer.
    """
    each = tokens // frames + (1 if tokens % frames else 0)
    return torch.arange(tokens, device=device) // each


class WanSelfAttention(nn.Module):
    """Weights of an attention whose queries and keys are normed over all heads together."""

    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    norm_q: nn.Module
    norm_k: nn.Module

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float, place: dict[str, Any], operations: Any):
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        for name in "qkvo":
            setattr(self, name, operations.Linear(dim, dim, **place))
        for name in ("norm_q", "norm_k"):
            setattr(self, name, operations.RMSNorm(dim, eps=eps, **place) if qk_norm else nn.Identity())

    def normed(self, norm: nn.Module, x: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """Queries or keys [B, L, H*D] normed, split into heads [B, H, L, D] and rotated by `table`."""
        weight = getattr(norm, "weight", None)
        if weight is None:
            weight = x.new_ones(x.shape[-1])
        return norm_together_and_rotate(
            x, comfy.ops.cast_to_input(weight, x, copy=False), table, self.num_heads, self.eps
        )


class WanT2VCrossAttention(WanSelfAttention):
    """Attention to text."""

    def keys(self, context: torch.Tensor, img_len: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [B, H, n, D] of each part of `context` [B, n, C] that is attended to by itself."""
        return [(self.normed(self.norm_k, self.k(context)), heads_of(self.v(context), self.num_heads))]


class WanI2VCrossAttention(WanT2VCrossAttention):
    """Attention to text, and by itself to the picture tokens in front of it."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, eps: float, place: dict[str, Any], operations: Any):
        super().__init__(dim, num_heads, qk_norm, eps, place, operations)
        self.k_img = operations.Linear(dim, dim, **place)
        self.v_img = operations.Linear(dim, dim, **place)
        self.norm_k_img = operations.RMSNorm(dim, eps=eps, **place) if qk_norm else nn.Identity()

    def keys(self, context: torch.Tensor, img_len: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # Without picture tokens (None) ComfyUI's slices are all of the text on both sides: it is attended to twice.
        picture, text = context[:, :img_len], context[:, img_len:]
        k = self.normed(self.norm_k_img, self.k_img(picture))
        return [*super().keys(text, None), (k, heads_of(self.v_img(picture), self.num_heads))]


@dit.own_block
class WanAttentionBlock(nn.Module):
    """Self-attention, attention to text, MLP; the first and the last modulated by the time."""

    def __init__(
        self, cross_attn_type: str, dim: int, ffn_dim: int, num_heads: int, qk_norm: bool = True,
        cross_attn_norm: bool = False, eps: float = 1e-6, dtype: Any = None, device: Any = None,
        operations: Any = comfy.ops.manual_cast,
    ) -> None:  # fmt: skip
        super().__init__()
        place = {"dtype": dtype, "device": device}
        cross = {"t2v_cross_attn": WanT2VCrossAttention, "i2v_cross_attn": WanI2VCrossAttention}[cross_attn_type]
        self.dim, self.num_heads, self.eps = dim, num_heads, eps
        self.norm1 = operations.LayerNorm(dim, eps, elementwise_affine=False, **place)
        self.self_attn = WanSelfAttention(dim, num_heads, qk_norm, eps, place, operations)
        self.norm3 = (
            operations.LayerNorm(dim, eps, elementwise_affine=True, **place) if cross_attn_norm else nn.Identity()
        )
        self.cross_attn = cross(dim, num_heads, qk_norm, eps, place, operations)
        self.norm2 = operations.LayerNorm(dim, eps, elementwise_affine=False, **place)
        self.ffn = nn.Sequential(
            operations.Linear(dim, ffn_dim, **place), nn.GELU("tanh"), operations.Linear(ffn_dim, dim, **place)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim, **place), requires_grad=False)

    @dit.stage
    def _into_attention(
        self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attn = self.self_attn
        normed = norm_modulate(x, scale, shift, self.eps)
        q, k = attn.normed(attn.norm_q, attn.q(normed), table), attn.normed(attn.norm_k, attn.k(normed), table)
        return q, k, heads_of(attn.v(normed), self.num_heads)

    @dit.stage
    def _after_attention(
        self, x: torch.Tensor, out: torch.Tensor, gate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x with the self-attention's output [B, L, C], and the queries [B, H, L, D] of the attention to text."""
        x = add_gated(x, self.self_attn.o(out), gate)
        cross = self.cross_attn
        return x, cross.normed(cross.norm_q, cross.q(self.norm3(x)))

    @dit.stage
    def _mlp(
        self, x: torch.Tensor, out: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        x = x + self.cross_attn.o(out)
        return add_gated(x, mlp_gelu(self.ffn, norm_modulate(x, scale, shift, self.eps)), gate)

    def on_tokens(self, x: torch.Tensor, state: dit.DiTState, call: dit.DenoiserCall) -> torch.Tensor:
        """The block on a stream x [B, L, C] that is sharded as the state's `img` is, with the state's other values."""
        rows = state.local("rows") if "rows" in state.tokenwise else None
        vec = comfy.ops.cast_to_input(self.modulation, x, copy=False).unsqueeze(0) + state.sample["vec"]
        shift, scale, gate, *mlp = (spread_rows(part, rows) for part in vec.unbind(dim=2))
        image, context = state.tokens("img"), state.sample["txt"]
        meeting = meet(AttentionSpec(self.num_heads, image, layer=call.layer), call)
        meeting.send(*self._into_attention(x, shift, scale, state.local("pe").transpose(1, 2)))
        keys = self.cross_attn.keys(context, state.sample["context_img_len"])  # while tokens are exchanged
        meeting.attend()
        meeting.send_back()
        x, q = self._after_attention(x, joined_heads(meeting.result()), gate)
        out = None
        for k, v in keys:
            spec = AttentionSpec(self.num_heads, image, dit.Tokens((k.shape[2],)))
            part = attention(q, k, v, spec, call)
            out = part if out is None else out + part
        assert out is not None
        return self._mlp(x, out, *mlp)

    def forward_state(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The block on the stream `img`."""
        return state.with_stream("img", self.on_tokens(state.streams["img"], state, call))

    def forward(
        self,
        x: torch.Tensor,
        e: torch.Tensor,
        freqs: torch.Tensor,
        context: torch.Tensor,
        context_img_len: int | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Whole x [B, L, C], e [B, n, 6, C], freqs [1, L, 1, D/2, 2, 2], context [B, m, C] -> [B, L, C]."""
        call = dit.call_of(transformer_options)
        state = block_state(x, e, freqs, context, context_img_len)
        return self.forward_state(state.shard(call.plan), call).whole("img")


def block_state(
    x: torch.Tensor, e: torch.Tensor, freqs: torch.Tensor, context: torch.Tensor, context_img_len: int | None
) -> dit.DiTState:
    """The whole state of the blocks; arguments as of `WanAttentionBlock.forward`."""
    tokenwise = {"pe": dit.TokenAxis(freqs, ("img",), 1)}
    if e.shape[1] > 1:
        tokenwise["rows"] = dit.TokenAxis(token_rows(e.shape[1], x.shape[1], x.device), ("img",), 0)
    sample = {"txt": context, "vec": e, "context_img_len": context_img_len}
    return dit.DiTState({"img": x}, tokenwise, sample)


class Head(nn.Module):
    """Tokens to patches, modulated by the time."""

    def __init__(
        self, dim: int, out_dim: int, patch_size: tuple[int, ...], eps: float, dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        volume = patch_size[0] * patch_size[1] * patch_size[2]
        self.eps = eps
        self.norm = operations.LayerNorm(dim, eps, elementwise_affine=False, **place)
        self.head = operations.Linear(dim, volume * out_dim, **place)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim, **place), requires_grad=False)

    def forward(self, x: torch.Tensor | dit.DiTState, e: torch.Tensor | None = None) -> torch.Tensor:
        """x [B, L, C], e [B, n, C] of the time -> [B, L, patch * out_dim]; of a state's stream `img`, whole."""
        if isinstance(x, dit.DiTState):
            rows = x.local("rows") if "rows" in x.tokenwise else None
            return x.with_stream("img", self._patches(x.streams["img"], x.sample["time"], rows)).whole("img")
        assert e is not None
        return self._patches(x, e, token_rows(e.shape[1], x.shape[1], x.device) if e.shape[1] > 1 else None)

    def _patches(self, x: torch.Tensor, e: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        table = comfy.ops.cast_to_input(self.modulation, x, copy=False).unsqueeze(0) + e.unsqueeze(2)
        shift, scale = (spread_rows(part, rows) for part in table.unbind(dim=2))
        return self.head(norm_modulate(x, scale, shift, self.eps))


class MLPProj(nn.Module):
    """CLIP vision tokens [B, n, in_dim] -> [B, n, out_dim]; with positions for those of two pictures."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        flf_pos_embed_token_number: int | None,
        dtype: Any,
        device: Any,
        operations: Any,
    ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.proj = nn.Sequential(
            operations.LayerNorm(in_dim, **place), operations.Linear(in_dim, in_dim, **place), nn.GELU(),
            operations.Linear(in_dim, out_dim, **place), operations.LayerNorm(out_dim, **place),
        )  # fmt: skip
        self.emb_pos = None
        if flf_pos_embed_token_number is not None:
            table = torch.empty((1, flf_pos_embed_token_number, in_dim), **place)
            self.emb_pos = nn.Parameter(table, requires_grad=False)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        if self.emb_pos is not None:
            count = min(image_embeds.shape[1], self.emb_pos.shape[1])
            positions = comfy.ops.cast_to_input(self.emb_pos[:, :count], image_embeds)
            image_embeds = image_embeds[:, :count] + positions
        return self.proj(image_embeds)


class WanModel(nn.Module):
    """The diffusion transformer of Wan 2.1 (text to video, image to video, Fun) and of Wan 2.2."""

    def __init__(
        self, model_type: str = "t2v", patch_size: tuple[int, ...] = (1, 2, 2), text_len: int = 512, in_dim: int = 16,
        dim: int = 2048, ffn_dim: int = 8192, freq_dim: int = 256, text_dim: int = 4096, out_dim: int = 16,
        num_heads: int = 16, num_layers: int = 32, window_size: tuple[int, ...] = (-1, -1), qk_norm: bool = True,
        cross_attn_norm: bool = True, eps: float = 1e-6, flf_pos_embed_token_number: int | None = None,
        in_dim_ref_conv: int | None = None, clip_dim: int = 1280, image_model: str | None = None, dtype: Any = None,
        device: Any = None, operations: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_heads < 1 or dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(
                f"dim {dim} cannot be split into {num_heads} heads of an even size; check the configuration"
            )
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device}
        self.dtype, self.model_type = dtype, model_type
        self.patch_size = tuple(patch_size)
        self.dim = self.hidden_size = dim
        self.in_dim, self.out_dim, self.ffn_dim, self.freq_dim = in_dim, out_dim, ffn_dim, freq_dim
        self.num_heads, self.num_layers, self.text_len, self.eps = num_heads, num_layers, text_len, eps
        # Weights of the patch embedding are fp32 in the files, and patches are embedded in fp32.
        conv = operations.Conv3d if operations.Conv3d.comfy_cast_weights else comfy.ops.manual_cast.Conv3d
        self.patch_embedding = conv(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size, **place)
        linear = operations.Linear
        self.text_embedding = nn.Sequential(linear(text_dim, dim, **place), nn.GELU("tanh"), linear(dim, dim, **place))
        self.time_embedding = nn.Sequential(linear(freq_dim, dim, **place), nn.SiLU(), linear(dim, dim, **place))
        self.time_projection = nn.Sequential(nn.SiLU(), linear(dim, dim * 6, **place))
        kind = "i2v_cross_attn" if model_type in ("i2v", "camera") else "t2v_cross_attn"
        self.block_settings = {
            "dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads, "qk_norm": qk_norm,
            "cross_attn_norm": cross_attn_norm, "eps": eps, "operations": operations, **place,
        }  # fmt: skip
        self.blocks = nn.ModuleList(WanAttentionBlock(kind, **self.block_settings) for _ in range(num_layers))
        self.head = Head(dim, out_dim, self.patch_size, eps, operations=operations, **place)
        rest = dim // num_heads // 6 * 2
        self.rope_embedder = EmbedND(dim // num_heads, 10000, [dim // num_heads - 2 * rest, rest, rest])
        self.img_emb = None
        if kind == "i2v_cross_attn":
            self.img_emb = MLPProj(clip_dim, dim, flf_pos_embed_token_number, operations=operations, **place)
        self.ref_conv = None
        if in_dim_ref_conv is not None:
            self.ref_conv = operations.Conv2d(in_dim_ref_conv, dim, self.patch_size[1:], self.patch_size[1:], **place)

    # --- the contract: embed, blocks, head ---------------------------------------------------------------------

    def patches(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Padded latents [B, in_dim, F, h, w] -> embedded patches [B, C, F/p, h/p, w/p], computed in fp32."""
        return self.patch_embedding(x.float()).to(x.dtype)

    def embed(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        freqs: torch.Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dit.DiTState:
        """Padded latents [B, in_dim, F, h, w], times [B] or [B, n] (one for each frame), text [B, m, text_dim],
        CLIP tokens [B, k, clip_dim] -> whole state with the stream `img`. freqs: a rotary table to use.
        """
        if x.ndim != 5:
            raise ValueError(f"Wan works on videos [B, C, frames, height, width], got a latent {tuple(x.shape)}")
        tokens = self.patches(x, **kwargs).flatten(2).transpose(1, 2)
        features = timestep_embedding(t.flatten(), self.freq_dim, time_factor=1.0).to(tokens.dtype)
        e = self.time_embedding(features).unflatten(0, (t.shape[0], -1))
        e0 = self.time_projection(e).unflatten(-1, (6, self.dim))
        reference = kwargs.get("reference_latent")
        if self.ref_conv is not None and reference is not None:
            tokens = torch.cat((self.ref_conv(reference).flatten(2).transpose(1, 2), tokens), dim=1)
        text, clip_tokens = self.text_embedding(context), None
        if clip_fea is not None and self.img_emb is not None:
            pictures = self.img_emb(clip_fea)
            clip_tokens, text = pictures.shape[1], torch.cat((pictures, text), dim=1)
        if freqs is None:
            frames = x.shape[2] + (1 if self.ref_conv is not None and reference is not None else 0)
            height, width = x.shape[3:]
            freqs = self.rope_encode(frames, height, width, device=x.device, transformer_options=transformer_options)
        state = block_state(tokens, e0, freqs, text, clip_tokens)
        return state.replace(sample={**state.sample, "time": e})

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        return tuple(
            dit.Block(
                f"blocks.{i}", block, ARGUMENTS, i, replace_key=("double_block", i), patches_after=("double_block",),
            )
            for i, block in enumerate(self.blocks)
        )  # fmt: skip

    def run(self, state: dit.DiTState, call: dit.DenoiserCall) -> dit.DiTState:
        """The blocks on the state."""
        return dit.run_blocks(self, state, call)

    def forward_orig(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        freqs: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature, which custom nodes inspect)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embed, blocks and head on padded latents [B, in_dim, F, h, w] -> [B, out_dim, F, h, w]."""
        call = dit.call_of(transformer_options)
        state = self.embed(x, t, context, clip_fea, freqs, transformer_options, **kwargs)
        grid = tuple(size // patch for size, patch in zip(x.shape[2:], self.patch_size))
        out = self.head(self.run(state, call))
        return self.unpatchify(out[:, out.shape[1] - grid[0] * grid[1] * grid[2] :], grid)

    def unpatchify(self, x: torch.Tensor, grid_sizes: tuple[int, ...]) -> torch.Tensor:
        """[B, L, patch * out_dim] with patches as (frame, row, column, channel) -> [B, out_dim, F, h, w]."""
        out = x.reshape(x.shape[0], *grid_sizes, *self.patch_size, self.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.reshape(
            x.shape[0], self.out_dim, *(size * patch for size, patch in zip(grid_sizes, self.patch_size))
        )

    # --- positions ---------------------------------------------------------------------------------------------

    def rope_encode(
        self, t: int, h: int, w: int, t_start: int = 0, device: Any = None, dtype: Any = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Rotary table [1, L, 1, D/2, 2, 2] fp32 of latents of t x h x w cells whose first frame is `t_start`.

        `rope_options` of the transformer options scale and shift the positions of each axis.
        """
        options = (transformer_options or {}).get("rope_options") or {}
        axes = []
        for axis, size, patch in zip("tyx", (t, h, w), self.patch_size):
            places = torch.arange((size + patch // 2) // patch, device=device, dtype=torch.float32)
            scaled = places * options.get(f"scale_{axis}", 1.0) + options.get(f"shift_{axis}", 0.0)
            axes.append(scaled + (t_start if axis == "t" else 0))
        ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, 3)
        return self.rope_embedder(ids).movedim(1, 2)

    # --- ComfyUI's entrance ------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        time_dim_concat: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, in_dim, F, h, w] at times [B] or [B, F] -> [B, out_dim, F, h, w].

        context: text [B, m, text_dim]. clip_fea: CLIP vision tokens. time_dim_concat: latents of reference pictures,
        appended as frames. reference_latent [B, C, h, w]: a picture in front, for models that have a layer for it.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timestep, context, clip_fea, time_dim_concat, transformer_options, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        time_dim_concat: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        sizes = x.shape[2:]
        x = pad_to_patch_size(x, self.patch_size)
        if time_dim_concat is not None:
            references = pad_to_patch_size(time_dim_concat.to(x), self.patch_size)
            x = torch.cat((x, references.expand(x.shape[0], *references.shape[1:])), dim=2)
        out = self.forward_orig(
            x, timestep, context, clip_fea=clip_fea, transformer_options=transformer_options, **kwargs
        )
        return out[:, :, : sizes[0], : sizes[1], : sizes[2]]
