"""HunyuanVideo and HunyuanImage 2.1: Flux's double and single blocks over video and refined text (Tencent 2024, 2025).

Shapes: B videos, L tokens in the order (frame, row, column), C channels, H heads, D head size. HunyuanImage 2.1 has no
frame axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.patcher_extension
from comfy.ldm import dit
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux.layers import (
    DoubleStreamBlock,
    EmbedND,
    LastLayer,
    MLPEmbedder,
    Modulation,
    SingleStreamBlock,
    timestep_embedding,
)
from comfy.ldm.modules.attention import AttentionSpec, attention

_DOUBLE = dit.BlockArguments(
    {"img": ("img",), "txt": ("txt",)},
    {
        "vec": "vec", "pe": "pe", "attention_mask": "attn_mask", "modulation_dims_img": "dims",
        "modulation_dims_txt": "dims_txt",
    },
    frozenset({"attention_mask", "modulation_dims_img", "modulation_dims_txt"}),
    renamed={"attention_mask": "attn_mask"},
)  # fmt: skip
_SINGLE = dit.BlockArguments(
    {"img": ("img", "txt")},
    {"vec": "vec", "pe": "pe", "attention_mask": "attn_mask", "modulation_dims": "dims"},
    frozenset({"attention_mask", "modulation_dims"}),
    first="img",
    renamed={"attention_mask": "attn_mask"},
)


@dataclass
class HunyuanVideoParams:
    """Sizes of the network, under ComfyUI's configuration names."""

    in_channels: int
    out_channels: int
    vec_in_dim: int | None
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list[int]
    theta: int
    patch_size: Sequence[int]
    qkv_bias: bool
    guidance_embed: bool
    byt5: bool = False
    meanflow: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} cannot be split into {self.num_heads} heads")
        if sum(self.axes_dim) != self.hidden_size // self.num_heads:
            raise ValueError(
                f"axes_dim {list(self.axes_dim)} must add up to the head size {self.hidden_size // self.num_heads}"
            )


class _RefinerAttention(nn.Module):
    def __init__(self, dim: int, heads: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = operations.Linear(dim, dim * 3, **place)
        self.proj = operations.Linear(dim, dim, **place)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, call: dit.DenoiserCall) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v, AttentionSpec(self.heads, dit.Tokens((x.shape[1],)), mask=mask), call))


class _RefinerBlock(nn.Module):
    """Text tokens attend to each other; both parts are gated by the conditioning vector."""

    def __init__(self, dim: int, heads: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.norm1 = operations.LayerNorm(dim, eps=1e-6, **place)
        self.self_attn = _RefinerAttention(dim, heads, place, operations)
        self.norm2 = operations.LayerNorm(dim, eps=1e-6, **place)
        inner, outer = operations.Linear(dim, dim * 4, **place), operations.Linear(dim * 4, dim, **place)
        self.mlp = nn.Sequential(inner, nn.SiLU(), outer)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, 2 * dim, **place))

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, mask: torch.Tensor | None, call: dit.DenoiserCall
    ) -> torch.Tensor:
        gates = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        x = x + self.self_attn(self.norm1(x), mask, call) * gates[0]
        return x + self.mlp(self.norm2(x)) * gates[1]


class _RefinerBlocks(nn.Module):
    def __init__(self, dim: int, heads: int, count: int, place: dict[str, Any], operations: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_RefinerBlock(dim, heads, place, operations) for _ in range(count))


class TokenRefiner(nn.Module):
    """Text features [B, m, text_dim] at times [B] -> text tokens [B, m, C]."""

    def __init__(
        self, text_dim: int, hidden_size: int, heads: int, num_blocks: int, dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.input_embedder = operations.Linear(text_dim, hidden_size, **place)
        self.t_embedder = MLPEmbedder(256, hidden_size, operations=operations, **place)
        self.c_embedder = MLPEmbedder(text_dim, hidden_size, operations=operations, **place)
        self.individual_token_refiner = _RefinerBlocks(hidden_size, heads, num_blocks, place, operations)

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, mask: torch.Tensor | None, call: dit.DenoiserCall
    ) -> torch.Tensor:
        """mask [B, m]: added to the scores of its tokens."""
        t = timestep_embedding(timesteps, 256, time_factor=1.0).to(x.dtype)
        c = self.t_embedder(t) + self.c_embedder(x.mean(dim=1))
        if mask is not None:
            mask = (mask[:, None, :] + mask[:, :, None]).unsqueeze(1)
        x = self.input_embedder(x)
        for block in self.individual_token_refiner.blocks:
            x = block(x, c, mask, call)
        return x


class ByT5Mapper(nn.Module):
    """Glyph features of ByT5 [B, n, in_dim] -> text tokens [B, n, out_dim]."""

    def __init__(
        self, in_dim: int, out_dim: int, hidden: int, out_dim1: int, dtype: Any, device: Any, operations: Any
    ) -> None:
        super().__init__()
        place = {"dtype": dtype, "device": device}
        self.layernorm = operations.LayerNorm(in_dim, **place)
        self.fc1 = operations.Linear(in_dim, hidden, **place)
        self.fc2 = operations.Linear(hidden, out_dim, **place)
        self.fc3 = operations.Linear(out_dim, out_dim1, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.fc1(self.layernorm(x)))
        return self.fc3(nn.functional.gelu(self.fc2(x)))


class PatchEmbed(nn.Module):
    """A strided convolution: latents [B, in, *sizes] -> tokens [B, L, C]."""

    def __init__(
        self, patch_size: Sequence[int], in_chans: int, embed_dim: int, place: dict[str, Any], operations: Any
    ):
        super().__init__()
        patch = tuple(patch_size)
        self.proj = operations.conv_nd(len(patch), in_chans, embed_dim, kernel_size=patch, stride=patch, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class HunyuanVideo(nn.Module):
    """The diffusion transformer of HunyuanVideo, SkyReels, HunyuanImage 2.1 and its refiner."""

    def __init__(
        self, image_model: str | None = None, final_layer: bool = True, dtype: Any = None, device: Any = None,
        operations: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        known = {f.name for f in fields(HunyuanVideoParams)}
        params = HunyuanVideoParams(**{name: value for name, value in kwargs.items() if name in known})
        operations = operations or comfy.ops.disable_weight_init
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        made: dict[str, Any] = {**place, "operations": operations}
        self.dtype, self.params = dtype, params
        self.patch_size = tuple(params.patch_size)
        self.in_channels, self.out_channels = params.in_channels, params.out_channels
        self.hidden_size, self.num_heads = dim, heads = params.hidden_size, params.num_heads
        self.pe_embedder = EmbedND(dim // heads, params.theta, list(params.axes_dim))
        self.img_in = PatchEmbed(self.patch_size, params.in_channels, dim, place, operations)
        self.time_in = MLPEmbedder(256, dim, **made)
        self.vector_in = None if params.vec_in_dim is None else MLPEmbedder(params.vec_in_dim, dim, **made)
        self.guidance_in = MLPEmbedder(256, dim, **made) if params.guidance_embed else nn.Identity()
        self.txt_in = TokenRefiner(params.context_in_dim, dim, heads, 2, **made)
        settings: dict[str, Any] = {"mlp_ratio": params.mlp_ratio, **made}
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(dim, heads, qkv_bias=params.qkv_bias, flipped_img_txt=True, **settings)
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(dim, heads, **settings) for _ in range(params.depth_single_blocks)
        )
        self.byt5_in = ByT5Mapper(1472, 2048, 2048, dim, **made) if params.byt5 else None
        self.time_r_in = MLPEmbedder(256, dim, **made) if params.meanflow else None
        if final_layer:
            self.final_layer = LastLayer(dim, self.patch_size[-1], self.out_channels, **made)

    # --- the contract: embed, blocks, head ---------------------------------------------------------------------

    def _vector(
        self, timesteps: torch.Tensor, y: torch.Tensor | None, guidance: torch.Tensor | None,
        guiding_frame_index: torch.Tensor | None, disable_time_r: bool, options: Any, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """What modulates: [B, C], or [B, 2, C] with a guiding frame, whose row is the first."""

        def of_time(t: torch.Tensor) -> torch.Tensor:
            return self.time_in(timestep_embedding(t, 256, time_factor=1.0).to(dtype))

        vec = of_time(timesteps)
        if self.time_r_in is not None and not disable_time_r:
            vec = self._with_next_time(vec, options)
        if guiding_frame_index is not None:
            frame = of_time(guiding_frame_index).expand_as(vec)
            vec = torch.stack((frame, vec), dim=1)
        extra = None
        if self.vector_in is not None and y is not None:
            extra = self.vector_in(y[:, : self.params.vec_in_dim])
        if self.params.guidance_embed and guidance is not None:
            scale = self.guidance_in(timestep_embedding(guidance, 256).to(dtype))
            extra = scale if extra is None else extra + scale
        if extra is None:
            return vec
        return vec + (extra.unsqueeze(1) if vec.ndim == 3 else extra)

    def _with_next_time(self, vec: torch.Tensor, options: Any) -> torch.Tensor:
        """MeanFlow: the mean of the vectors of this time and of the next one, where the sampler's times are known."""
        steps, now = options.get("sample_sigmas"), options.get("sigmas")
        if steps is None or now is None:
            return vec
        here = steps[:-1].to(vec.device) == now[0].to(vec.device)
        after = (here * steps[1:].to(vec.device)).sum().reshape(1)
        assert self.time_r_in is not None
        following = self.time_r_in(timestep_embedding(after, 256).to(vec.dtype))
        return torch.where(here.any(), (vec + following) / 2, vec)

    def embed(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None,
        txt_byt5: torch.Tensor | None,
        guidance: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        guiding_frame_index: torch.Tensor | None,
        ref_latent: torch.Tensor | None,
        disable_time_r: bool,
        call: dit.DenoiserCall,
    ) -> dit.DiTState:
        """Padded latents [B, in, *sizes] and what `forward` takes -> whole state with the streams `img` and `txt`."""
        img, ids = self.img_in(x), self._places(x)
        cells = ids.shape[1]
        if ref_latent is not None:
            reference = pad_to_patch_size(ref_latent, self.patch_size)
            places = self._places(reference)
            places[..., 0] = -1
            places[..., 2] += x.shape[-1] // self.patch_size[-1]
            tokens = self.img_in(reference)
            img = torch.cat((tokens.expand(img.shape[0], -1, -1), img), dim=1)
            ids = torch.cat((places, ids), dim=1)
        vec = self._vector(timesteps, y, guidance, guiding_frame_index, disable_time_r, call.options, img.dtype)
        mask = attention_mask
        if mask is not None and not mask.is_floating_point():
            mask = (mask - 1).to(img.dtype) * torch.finfo(img.dtype).max
        txt = self.txt_in(context, timesteps, mask, call)
        if self.byt5_in is not None and txt_byt5 is not None:
            txt = torch.cat((txt, self.byt5_in(txt_byt5)), dim=1)
        pe = self.pe_embedder(torch.cat((ids, ids.new_zeros((1, txt.shape[1], ids.shape[-1]))), dim=1))
        if mask is not None:
            mask = nn.functional.pad(mask.to(img), (img.shape[1], txt.shape[1] - mask.shape[1])).unsqueeze(1)
        tokenwise = {"pe": dit.TokenAxis(pe, ("img", "txt"), 2, inside=True)}
        sample: dict[str, Any] = {"vec": vec, "attn_mask": mask}
        if vec.ndim == 3:
            frame = cells // (x.shape[2] // self.patch_size[0])
            rows = (torch.arange(img.shape[1] + txt.shape[1], device=img.device) >= frame).long()
            tokenwise["rows"] = dit.TokenAxis(rows, ("img", "txt"), 0)
            sample |= {"dims": [(0, frame, 0), (frame, None, 1)], "dims_txt": [(0, None, 1)]}
        return dit.DiTState({"img": img, "txt": txt}, tokenwise, sample)

    def _places(self, x: torch.Tensor) -> torch.Tensor:
        """Positions [1, L, axes] of the patches of x [B, C, *sizes]."""
        axes = [
            torch.arange(size // patch, device=x.device, dtype=torch.float32)
            for size, patch in zip(x.shape[2:], self.patch_size)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, -1, len(axes))

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order."""
        double = [
            dit.Block(
                f"double_blocks.{i}", block, _DOUBLE, i, replace_key=("double_block", i),
                residual=dit.Residual("img", "input", i),
            )
            for i, block in enumerate(self.double_blocks)
        ]  # fmt: skip
        single = [
            dit.Block(
                f"single_blocks.{i}", block, _SINGLE, i, replace_key=("single_block", i),
                residual=dit.Residual("img", "output", i),
            )
            for i, block in enumerate(self.single_blocks)
        ]  # fmt: skip
        return (*double, *single)

    def prepared_layers(self, state: dit.DiTState) -> list[dit.PreparedLayer]:
        """All blocks' modulations, which need nothing but the conditioning vector [B, C]."""
        if state.sample["vec"].ndim != 2:
            return []
        vec = nn.functional.silu(state.sample["vec"])
        ours = [m for m in self.modules() if type(m) is Modulation and "forward" not in vars(m)]
        return [dit.PreparedLayer(m, m.lin.out_features, functools.partial(m.lin, vec)) for m in ours]

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Video tokens of the state -> [B, L, patch * out_channels], whole."""
        img, rows = state.streams["img"], None
        if "rows" in state.tokenwise:
            rows = state.local("rows")[: img.shape[1]]
        return state.with_stream("img", self.final_layer(img, state.sample["vec"], rows=rows)).whole("img")

    # --- ComfyUI's entrance ------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        txt_byt5: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        guiding_frame_index: torch.Tensor | None = None,
        ref_latent: torch.Tensor | None = None,
        disable_time_r: bool = False,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature, which custom nodes inspect)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, in, *sizes] at times [B] (1000 sigma) -> [B, out, *sizes].

        context: text [B, m, context_in_dim] with its mask [B, m]; y: pooled text; txt_byt5: glyphs [B, n, 1472];
        guidance [B]; guiding_frame_index [B]: the first frame is known; ref_latent: a picture beside the video.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(
            x, timestep, context, y, txt_byt5, guidance, attention_mask, guiding_frame_index, ref_latent, disable_time_r,
            control, transformer_options, **kwargs,
        )  # fmt: skip

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        txt_byt5: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        guiding_frame_index: torch.Tensor | None = None,
        ref_latent: torch.Tensor | None = None,
        disable_time_r: bool = False,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        if x.ndim != len(self.patch_size) + 2:
            raise ValueError(
                f"this model works on latents with {len(self.patch_size)} axes after the channels, got {tuple(x.shape)}; "
                "use its own empty latent node"
            )
        call = dit.call_of(transformer_options, control)
        padded = pad_to_patch_size(x, self.patch_size)
        state = self.embed(
            padded, timestep, context, y, txt_byt5, guidance, attention_mask, guiding_frame_index, ref_latent,
            disable_time_r, call,
        )  # fmt: skip
        out = self.head(dit.run_blocks(self, state, call))
        grid = [size // patch for size, patch in zip(padded.shape[2:], self.patch_size)]
        out = self._unpatchify(out[:, out.shape[1] - math.prod(grid) :], grid)
        for axis, size in enumerate(x.shape[2:], 2):
            out = out.narrow(axis, 0, size)
        return out

    def _unpatchify(self, out: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        """[B, L, out_channels * patch] -> [B, out_channels, *sizes]."""
        axes = len(grid)
        cells = out.reshape(out.shape[0], *grid, self.out_channels, *self.patch_size)
        pairs = [axis for i in range(axes) for axis in (1 + i, 2 + axes + i)]
        sizes = [count * patch for count, patch in zip(grid, self.patch_size)]
        return cells.permute(0, 1 + axes, *pairs).reshape(out.shape[0], self.out_channels, *sizes)
