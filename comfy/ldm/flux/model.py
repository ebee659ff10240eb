"""Flux: `embed -> blocks -> head` over picture and text tokens (Black Forest Labs, 2024)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

import comfy.ldm.common_dit
import comfy.ops
import comfy.patcher_extension
from comfy.ldm import dit

from .layers import (
    DoubleStreamBlock,
    EmbedND,
    LastLayer,
    MLPEmbedder,
    Modulation,
    SingleStreamBlock,
    replaced_attention,
    timestep_embedding,
)

_VALUES = {"vec": "vec", "pe": "pe", "attn_mask": "attn_mask"}
_DOUBLE = dit.BlockArguments({"img": ("img",), "txt": ("txt",)}, _VALUES, frozenset({"attn_mask"}))
_SINGLE = dit.BlockArguments({"img": ("txt", "img")}, _VALUES, frozenset({"attn_mask"}), first="img")


@dataclass
class FluxParams:
    """Sizes of a Flux network, under ComfyUI's configuration names."""

    in_channels: int
    out_channels: int
    vec_in_dim: int
    context_in_dim: int
    hidden_size: int
    mlp_ratio: float
    num_heads: int
    depth: int
    depth_single_blocks: int
    axes_dim: list[int]
    theta: int
    patch_size: int
    qkv_bias: bool
    guidance_embed: bool

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        head_size = self.hidden_size // self.num_heads
        if sum(self.axes_dim) != head_size:
            raise ValueError(f"axes_dim {self.axes_dim} must add up to the head size {head_size}")


class Flux(nn.Module):
    """The diffusion transformer of FLUX.1 (dev, schnell, Fill, Kontext) and its relatives."""

    def __init__(
        self, image_model: str | None = None, final_layer: bool = True, dtype: Any = None, device: Any = None,
        operations: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        known = {f.name for f in fields(FluxParams)}
        params = FluxParams(**{name: value for name, value in kwargs.items() if name in known})
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device, "operations": operations}
        self.dtype = dtype
        self.params = params
        self.patch_size = params.patch_size
        self.in_channels = params.in_channels * params.patch_size**2
        self.out_channels = params.out_channels
        self.hidden_size = params.hidden_size
        self.num_heads = params.num_heads
        self.pe_embedder = EmbedND(params.hidden_size // params.num_heads, params.theta, params.axes_dim)
        self.img_in = operations.Linear(self.in_channels, self.hidden_size, bias=True, dtype=dtype, device=device)
        self.time_in = MLPEmbedder(256, self.hidden_size, **place)
        self.vector_in = MLPEmbedder(params.vec_in_dim, self.hidden_size, **place)
        self.guidance_in = MLPEmbedder(256, self.hidden_size, **place) if params.guidance_embed else nn.Identity()
        self.txt_in = operations.Linear(params.context_in_dim, self.hidden_size, dtype=dtype, device=device)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(
                self.hidden_size, self.num_heads, mlp_ratio=params.mlp_ratio, qkv_bias=params.qkv_bias, **place
            )
            for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(self.hidden_size, self.num_heads, mlp_ratio=params.mlp_ratio, **place)
            for _ in range(params.depth_single_blocks)
        )
        if final_layer:
            self.final_layer = LastLayer(self.hidden_size, params.patch_size, params.out_channels, **place)

    replaced_attention = staticmethod(replaced_attention)

    # --- the contract: embed, blocks, head ---------------------------------------------------------------------

    def embed(
        self,
        img: torch.Tensor,
        img_ids: torch.Tensor,
        txt: torch.Tensor,
        txt_ids: torch.Tensor,
        timesteps: torch.Tensor,
        y: torch.Tensor | None,
        guidance: torch.Tensor | None,
        call: dit.DenoiserCall,
        attn_mask: torch.Tensor | None = None,
    ) -> dit.DiTState:
        """Patches [B, L_img, in] and text [B, L_txt, context] -> whole state with streams `txt` and `img`."""
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError(f"img and txt must be [B, L, C], got {tuple(img.shape)} and {tuple(txt.shape)}")
        img = self.img_in(img)
        vec = self.conditioning_vector(timesteps, y, guidance, img)
        values = {"img": img, "txt": self.txt_in(txt), "img_ids": img_ids, "txt_ids": txt_ids}
        values = dit.patched_inputs(call.options, values)
        pe = self.pe_embedder(torch.cat((values["txt_ids"], values["img_ids"]), dim=1))
        return dit.DiTState(
            streams={"txt": values["txt"], "img": values["img"]},
            tokenwise={"pe": dit.TokenAxis(pe, ("txt", "img"), 2, inside=True)},
            sample={"vec": vec, "attn_mask": attn_mask},
        )

    def conditioning_vector(
        self, timesteps: torch.Tensor, y: torch.Tensor | None, guidance: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor:
        """Times [B], pooled text [B, vec_in_dim] and guidance [B] -> [B, C], in the dtype of tokens `like` [B, L, C]."""
        if y is None:
            y = torch.zeros((like.shape[0], self.params.vec_in_dim), device=like.device, dtype=like.dtype)
        vec = self.time_in(timestep_embedding(timesteps, 256).to(like.dtype))
        if self.params.guidance_embed and guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(guidance, 256).to(like.dtype))
        return vec + self.vector_in(y[:, : self.params.vec_in_dim])

    def block_list(self) -> tuple[dit.Block, ...]:
        """The blocks in order; each multiplies every token by 12 C^2 weights and attends once, so they cost the same."""
        double = [
            dit.Block(
                f"double_blocks.{i}", block, _DOUBLE, i, replace_key=("double_block", i),
                patches_after=("double_block",), residual=dit.Residual("img", "input", i),
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
        """All blocks' modulations: they need nothing but the conditioning vector [B, C]."""
        if state.sample["vec"].ndim != 2:
            return []
        ours = [m for m in self.modules() if type(m) is Modulation and "forward" not in vars(m)]
        # Wide and narrow ones in turn, so that equal shares of the list are equal shares of the weights.
        wide, narrow = [m for m in ours if m.is_double], [m for m in ours if not m.is_double]
        modules = [m for pair in itertools.zip_longest(wide, narrow) for m in pair if m is not None]
        vec = nn.functional.silu(state.sample["vec"])
        return [dit.PreparedLayer(m, m.lin.out_features, functools.partial(m.lin, vec)) for m in modules]

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Picture tokens of the state -> [B, L_img, patch^2 * out_channels], whole."""
        out = self.final_layer(state.streams["img"], state.sample["vec"])
        return state.with_stream("img", out).whole("img")

    def forward_orig(
        self,
        img: torch.Tensor,
        img_ids: torch.Tensor,
        txt: torch.Tensor,
        txt_ids: torch.Tensor,
        timesteps: torch.Tensor,
        y: torch.Tensor | None,
        guidance: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature, which custom nodes inspect)
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed, blocks and head on whole patch tokens: [B, L_img, in] -> [B, L_img, patch^2 * out_channels]."""
        call = dit.call_of(transformer_options, control)
        state = self.embed(img, img_ids, txt, txt_ids, timesteps, y, guidance, call, attn_mask)
        return self.head(dit.run_blocks(self, state, call))

    # --- latents to patches and back ---------------------------------------------------------------------------

    def process_img(
        self, x: torch.Tensor, index: int = 0, h_offset: int = 0, w_offset: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent [B, C, H, W] -> patches [B, L, C*p*p] and position ids [B, L, 3] (picture index, row, column)."""
        patch = self.patch_size
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
        batch, channels, height, width = x.shape
        rows, cols = height // patch, width // patch
        tokens = x.reshape(batch, channels, rows, patch, cols, patch).permute(0, 2, 4, 1, 3, 5)
        tokens = tokens.reshape(batch, rows * cols, channels * patch * patch)
        first_row, first_col = ((offset + patch // 2) // patch for offset in (h_offset, w_offset))
        place: dict[str, Any] = {"device": x.device, "dtype": torch.float32}
        ids = torch.zeros((rows, cols, 3), **place)
        ids[..., 0] = index
        ids[..., 1] = torch.arange(first_row, first_row + rows, **place).unsqueeze(1)
        ids[..., 2] = torch.arange(first_col, first_col + cols, **place).unsqueeze(0)
        return tokens, ids.reshape(1, rows * cols, 3).expand(batch, -1, -1)

    def _with_references(
        self, img: torch.Tensor, img_ids: torch.Tensor, shape: torch.Size, refs: list[torch.Tensor], method: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append reference latents [B, C, h, w] as tokens placed next to, diagonal to, or behind the picture."""
        patch = self.patch_size
        height = width = index = 0
        for ref in refs:
            h_offset = w_offset = 0
            if method == "index":
                index += 1
            elif method == "uxo":
                h_offset = -(-shape[-2] // patch) * patch + height
                w_offset = -(-shape[-1] // patch) * patch + width
                height += ref.shape[-2]
                width += ref.shape[-1]
            else:
                index = 1
                if ref.shape[-2] + height > ref.shape[-1] + width:
                    w_offset = width
                else:
                    h_offset = height
                height = max(height, ref.shape[-2] + h_offset)
                width = max(width, ref.shape[-1] + w_offset)
            tokens, ids = self.process_img(ref, index=index, h_offset=h_offset, w_offset=w_offset)
            img, img_ids = torch.cat([img, tokens], dim=1), torch.cat([img_ids, ids], dim=1)
        return img, img_ids

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: list[torch.Tensor] | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        """Predict the flow of latents x [B, C, H, W] at times [B] given text [B, L, context_in_dim].

        y: pooled text [B, vec_in_dim]; guidance: [B]; ref_latents: reference pictures. Returns [B, C_out, H, W].
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: list[torch.Tensor] | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        batch, _, height, width = x.shape
        patch = self.patch_size
        img, img_ids = self.process_img(x)
        own_tokens = img.shape[1]
        if ref_latents is not None:
            method = kwargs.get("ref_latents_method", "offset")
            img, img_ids = self._with_references(img, img_ids, x.shape, ref_latents, method)
        txt_ids = torch.zeros((batch, context.shape[1], 3), device=x.device, dtype=torch.float32)
        out = self.forward_orig(
            img, img_ids, context, txt_ids, timestep, y, guidance, control, transformer_options,
            attn_mask=kwargs.get("attention_mask"),
        )[:, :own_tokens]  # fmt: skip
        rows, cols = -(-height // patch), -(-width // patch)
        out = out.reshape(batch, rows, cols, self.out_channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, self.out_channels, rows * patch, cols * patch)[:, :, :height, :width]
