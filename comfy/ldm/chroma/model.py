"""Chroma (lodestone-rock, 2025): Flux.1 schnell with most of its modulation weights replaced by one small network."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

import comfy.ops
from comfy.ldm import dit
from comfy.ldm.flux.layers import EmbedND, timestep_embedding
from comfy.ldm.flux.model import Flux, FluxParams

from .layers import Approximator, DoubleStreamBlock, LastLayer, SingleStreamBlock, modulation_from

ROWS = 344  # rows that the small network makes, whatever the number of blocks
_TIME, _ROW = 16, 32  # width of the features of a time and of a row's number


class Chroma(Flux):
    """The whole network: Flux's patches, places, blocks and points for custom nodes."""

    final_layer: Any

    def __init__(
        self, image_model: str | None = None, final_layer: bool = True, dtype: Any = None, device: Any = None,
        operations: Any = None, in_dim: int = 64, out_dim: int = 3072, hidden_dim: int = 5120, n_layers: int = 5,
        in_channels: int = 64, out_channels: int = 64, context_in_dim: int = 4096, hidden_size: int = 3072,
        mlp_ratio: float = 4.0, num_heads: int = 24, depth: int = 19, depth_single_blocks: int = 38,
        axes_dim: Any = (16, 56, 56), theta: int = 10000, patch_size: int = 2, qkv_bias: bool = True, **unused: Any,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        operations = operations or comfy.ops.disable_weight_init
        place = {"dtype": dtype, "device": device, "operations": operations}
        linear = functools.partial(operations.Linear, dtype=dtype, device=device)
        self.dtype, self.patch_size = dtype, patch_size
        self.in_channels, self.out_channels = in_channels, out_channels // patch_size**2
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.params = FluxParams(
            in_channels=in_channels, out_channels=out_channels, vec_in_dim=0, context_in_dim=context_in_dim,
            hidden_size=hidden_size, mlp_ratio=mlp_ratio, num_heads=num_heads, depth=depth,
            depth_single_blocks=depth_single_blocks, axes_dim=list(axes_dim), theta=theta, patch_size=patch_size,
            qkv_bias=qkv_bias, guidance_embed=False,
        )  # fmt: skip
        if 3 * depth_single_blocks + 12 * depth + 2 > ROWS:
            raise ValueError(
                f"Chroma modulates at most {ROWS} rows; {depth} double and {depth_single_blocks} single blocks need "
                f"{3 * depth_single_blocks + 12 * depth + 2}"
            )
        self.pe_embedder = EmbedND(hidden_size // num_heads, theta, self.params.axes_dim)
        self.img_in = linear(in_channels, hidden_size)
        self.txt_in = linear(context_in_dim, hidden_size)
        self.distilled_guidance_layer = Approximator(in_dim, out_dim, hidden_dim, n_layers, **place)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, **place)
            for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, **place) for _ in range(depth_single_blocks)
        )
        if final_layer:
            self.final_layer = LastLayer(hidden_size, patch_size, out_channels, **place)

    def modulation_rows(self, timesteps: torch.Tensor, guidance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the small network makes of times and guidance [B] -> [B, ROWS, C]."""
        told = torch.cat([timestep_embedding(value, _TIME) for value in (timesteps, guidance)], dim=-1)
        numbers = timestep_embedding(torch.arange(ROWS, device=told.device, dtype=torch.float32), _ROW)
        batch = told.shape[0]
        rows = torch.cat(
            (told.unsqueeze(1).expand(-1, ROWS, -1), numbers.to(told).unsqueeze(0).expand(batch, -1, -1)), dim=-1
        )
        return self.distilled_guidance_layer(rows.to(dtype))

    def _modulations(self, rows: torch.Tensor) -> dict[str, Any]:
        """Each block's modulations by its name, and the last layer's (shift, scale).

        The rows are those of the single blocks, then of the pictures' and of the texts' halves of the double blocks; the
        last two are the last layer's.
        """
        out: dict[str, Any] = {"final": (rows[:, -2:-1], rows[:, -1:])}
        first = 3 * len(self.single_blocks)
        for i in range(len(self.single_blocks)):
            out[f"single_blocks.{i}"] = modulation_from(rows, 3 * i)
        for i in range(len(self.double_blocks)):
            starts = (first + 6 * i, first + 6 * (len(self.double_blocks) + i))
            out[f"double_blocks.{i}"] = tuple(
                (modulation_from(rows, start), modulation_from(rows, start + 3)) for start in starts
            )
        return out

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
        guidance = torch.zeros_like(timesteps) if guidance is None else guidance
        rows = self.modulation_rows(timesteps, guidance, img.dtype)
        values = {"img": self.img_in(img), "txt": self.txt_in(txt), "img_ids": img_ids, "txt_ids": txt_ids}
        values = dit.patched_inputs(call.options, values)
        pe = self.pe_embedder(torch.cat((values["txt_ids"], values["img_ids"]), dim=1))
        return dit.DiTState(
            streams={"txt": values["txt"], "img": values["img"]},
            tokenwise={"pe": dit.TokenAxis(pe, ("txt", "img"), 2, inside=True)},
            sample={"attn_mask": attn_mask, **self._modulations(rows)},
        )

    def block_list(self) -> tuple[dit.Block, ...]:
        """Flux's blocks; each is given its own modulations as `vec`."""
        return tuple(_with_modulation(block) for block in super().block_list())

    def prepared_layers(self, state: dit.DiTState) -> list[dit.PreparedLayer]:
        """None: the small network runs once, before the blocks."""
        return []

    def head(self, state: dit.DiTState) -> torch.Tensor:
        """Picture tokens of the state -> [B, L_img, patch^2 * channels], whole."""
        out = self.final_layer(state.streams["img"], state.sample["final"])
        return state.with_stream("img", out).whole("img")


def _with_modulation(block: dit.Block) -> dit.Block:
    """A block whose replacements get its modulations from the state under its name."""
    values = {**block.arguments.values, "vec": block.name}
    return dataclasses.replace(block, arguments=dataclasses.replace(block.arguments, values=values))
