"""The UNet of Stable Diffusion 1, 2 and XL, and of networks distilled from them (Rombach et al. 2022, Podell et al. 2023).

It is under the module name that packs import, since they replace `forward_timestep_embed` and `apply_control` here; its
parts are in `comfy.ldm.unet`. Besides the patches of its transformers it has these:

    patches["emb_patch"]: `f(emb, model_channels, options) -> emb`
    patches["input_block_patch"], ["input_block_patch_after_skip"]: `f(h, options) -> h`, before and after the skip is kept
    patches["output_block_patch"]: `f(h, skip, options) -> (h, skip)`
    patches["forward_timestep_embed_patch"]: (layer class, handler) for layers that are not ours
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import comfy.ops
import comfy.patcher_extension
from comfy.ldm.modules.diffusionmodules.util import Timestep, timestep_embedding
from comfy.ldm.pace import Pace, is_long
from comfy.ldm.unet.blocks import GROUPS, Downsample, ResBlock, TimestepBlock, Upsample
from comfy.ldm.unet.transformer import BasicTransformerBlock, SpatialTransformer
from comfy.missing import missing, missing_class

__all__ = [
    "Downsample", "ResBlock", "SpatialTransformer", "Timestep", "TimestepBlock", "TimestepEmbedSequential",
    "UNetModel", "Upsample", "VideoResBlock", "apply_control", "forward_timestep_embed", "timestep_embedding",
]  # fmt: skip

ops = comfy.ops.disable_weight_init
VideoResBlock = missing_class("VideoResBlock", "the time axis of Stable Video Diffusion's UNet")


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """One input, middle or output block: layers that take different arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`forward_timestep_embed` on these layers."""
        return forward_timestep_embed(self, *args, **kwargs)


def forward_timestep_embed(
    ts: Any,
    x: torch.Tensor,
    emb: torch.Tensor,
    context: Any = None,
    transformer_options: dict[str, Any] = {},  # noqa: B006 (ComfyUI's signature)
    output_shape: Any = None,
    time_context: Any = None,
    num_video_frames: Any = None,
    image_only_indicator: Any = None,
) -> torch.Tensor:
    """x [B, C, h, w] through the layers `ts`, each with what it takes: emb [B, E], context [B, S, D], `output_shape`.

    The last three arguments are those of video UNets; they are handed to the handlers of foreign layers.
    """
    handlers = transformer_options.get("patches", {}).get("forward_timestep_embed_patch", ())
    for layer in ts:
        if isinstance(layer, TimestepBlock):
            x = layer(x, emb)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context, transformer_options)
            if "transformer_index" in transformer_options:
                transformer_options["transformer_index"] += 1
        elif isinstance(layer, Upsample):
            x = layer(x, output_shape=output_shape)
        else:
            handler = next((handle for kind, handle in handlers if isinstance(layer, kind)), None)
            if handler is None:
                x = layer(x)
            else:
                x = handler(
                    layer, x, emb, context, transformer_options, output_shape, time_context, num_video_frames,
                    image_only_indicator,
                )  # fmt: skip
    return x


def apply_control(h: torch.Tensor, control: Any, name: str) -> torch.Tensor:
    """h plus the next of the residuals `control[name]`, which is taken from the list's end (None adds nothing)."""
    residuals = None if control is None else control.get(name)
    if not residuals:
        return h
    residual = residuals.pop()
    if residual is None:
        return h
    try:
        return h + residual
    except RuntimeError:
        logging.warning(
            "a control residual of %s does not fit %s (%s); it is left out", list(residual.shape), list(h.shape), name
        )
        return h


class UNetModel(nn.Module):
    """Predicts noise or velocity of latents from their time, a text and a vector.

    num_res_blocks: by level (a level halves the size). channel_mult: width of a level / model_channels.
    transformer_depth: transformer blocks after each residual block, going down. transformer_depth_output: the same for
    the output blocks, in the order in which the input blocks that they mirror run (so it is read from its end).
    transformer_depth_middle: -1: the middle is one residual block, -2: there is none. num_classes: None, or
    "sequential" for a vector `y` of adm_in_channels. num_heads or num_head_channels: the other follows (-1).
    """

    default_num_video_frames: int | None = None
    row_unit: int
    """Rows of cells that are one row at the lowest level. A network that says so can be called with rows of a picture:
    its layers combine rows in torch's own functions only (convolutions, norms, attention, resizing)."""

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        transformer_depth: Sequence[int] = (),
        transformer_depth_output: Sequence[int] = (),
        transformer_depth_middle: int = -1,
        context_dim: int | None = None,
        use_linear_in_transformer: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_classes: str | None = None,
        adm_in_channels: int | None = None,
        attn_precision: torch.dtype | None = None,
        dropout: float = 0.0,
        use_temporal_attention: bool = False,
        use_temporal_resblock: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
        operations: Any = comfy.ops.disable_weight_init,
        **other: Any,
    ) -> None:
        super().__init__()
        if use_temporal_attention or use_temporal_resblock:
            missing("Stable Video Diffusion")
        if num_heads == -1 and num_head_channels == -1:
            raise ValueError("a UNet needs num_heads or num_head_channels; give one of them")
        if num_classes not in (None, "sequential"):
            raise ValueError(f"num_classes is {num_classes!r}; UNets here take None or 'sequential'")
        levels = len(channel_mult)
        self.row_unit = 1 << (levels - 1)
        self.num_res_blocks = [num_res_blocks] * levels if isinstance(num_res_blocks, int) else list(num_res_blocks)
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.channel_mult = list(channel_mult)
        self.transformer_depth = list(transformer_depth) or [0] * sum(self.num_res_blocks)
        self.transformer_depth_output = list(transformer_depth_output) or [0] * (sum(self.num_res_blocks) + levels)
        self.transformer_depth_middle = transformer_depth_middle
        self.context_dim, self.use_linear_in_transformer = context_dim, use_linear_in_transformer
        self.num_heads, self.num_head_channels = num_heads, num_head_channels
        self.num_classes, self.adm_in_channels = num_classes, adm_in_channels
        self.attn_precision, self.dropout, self.dtype = attn_precision, dropout, dtype
        self._operations = operations
        self._place: dict[str, Any] = {"dtype": dtype, "device": device}
        emb = model_channels * 4
        self.time_embed = self._embedding(model_channels, emb)
        if num_classes is not None:
            if adm_in_channels is None:
                raise ValueError("num_classes='sequential' needs adm_in_channels, the width of the vector")
            self.label_emb = nn.Sequential(self._embedding(adm_in_channels, emb))
        self._build(emb)
        del self._operations, self._place

    # --- parts -----------------------------------------------------------------------------------------------------

    def _embedding(self, width_in: int, width: int) -> nn.Sequential:
        linear = self._operations.Linear
        return nn.Sequential(
            linear(width_in, width, **self._place), nn.SiLU(), linear(width, width, **self._place)
        )  # fmt: skip

    def _res_block(self, width_in: int, emb: int, width: int) -> ResBlock:
        return ResBlock(
            width_in, emb, self.dropout, out_channels=width, operations=self._operations, **self._place
        )  # fmt: skip

    def _transformer(self, width: int, depth: int) -> SpatialTransformer:
        heads, size = self.num_heads, self.num_head_channels
        heads, size = (heads, width // heads) if size == -1 else (width // size, size)
        return SpatialTransformer(
            width, heads, size, depth=depth, context_dim=self.context_dim, use_linear=self.use_linear_in_transformer,
            attn_precision=self.attn_precision, operations=self._operations, **self._place,
        )  # fmt: skip

    def _resampling(self, kind: type[Any], width: int) -> Any:
        return kind(width, True, operations=self._operations, **self._place)

    def _build(self, emb: int) -> None:
        """All blocks: down, middle, up; each output block takes the skip of the input block that it mirrors."""
        conv, levels = self._operations.Conv2d, len(self.channel_mult)
        width, skips = self._build_down(emb)
        outputs = []
        depths = reversed(self.transformer_depth_output)
        for level in reversed(range(levels)):
            for i in range(self.num_res_blocks[level] + 1):
                layers: list[Any] = [
                    self._res_block(width + skips.pop(), emb, self.model_channels * self.channel_mult[level])
                ]
                width = layers[0].out_channels
                depth = next(depths)
                if depth > 0:
                    layers.append(self._transformer(width, depth))
                if level > 0 and i == self.num_res_blocks[level]:
                    layers.append(self._resampling(Upsample, width))
                outputs.append(TimestepEmbedSequential(*layers))
        self.output_blocks = nn.ModuleList(outputs)
        self.out = nn.Sequential(
            self._operations.GroupNorm(GROUPS, width, **self._place),
            nn.SiLU(),
            conv(width, self.out_channels, 3, padding=1, **self._place),
        )

    def _build_down(self, emb: int) -> tuple[int, list[int]]:
        """Input and middle blocks; (width of the middle, width of each input block's skip)."""
        levels = len(self.channel_mult)
        width = self.model_channels * self.channel_mult[0]
        first = self._operations.Conv2d(self.in_channels, width, 3, padding=1, **self._place)
        inputs = [TimestepEmbedSequential(first)]
        skips = [width]
        depths = iter(self.transformer_depth)
        for level, blocks in enumerate(self.num_res_blocks):
            for _ in range(blocks):
                layers: list[Any] = [self._res_block(width, emb, self.model_channels * self.channel_mult[level])]
                width = layers[0].out_channels
                depth = next(depths)
                if depth > 0:
                    layers.append(self._transformer(width, depth))
                inputs.append(TimestepEmbedSequential(*layers))
                skips.append(width)
            if level < levels - 1:
                inputs.append(TimestepEmbedSequential(self._resampling(Downsample, width)))
                skips.append(width)
        self.input_blocks = nn.ModuleList(inputs)
        self.middle_block = None if self.transformer_depth_middle < -1 else self._middle(width, emb)
        return width, skips

    def _middle(self, width: int, emb: int) -> TimestepEmbedSequential:
        layers: list[Any] = [self._res_block(width, emb, width)]
        if self.transformer_depth_middle >= 0:
            layers += [self._transformer(width, self.transformer_depth_middle), self._res_block(width, emb, width)]
        return TimestepEmbedSequential(*layers)

    def _transformer_blocks(self) -> Iterator[BasicTransformerBlock]:
        middle = [] if self.middle_block is None else [self.middle_block]
        for block in (*self.input_blocks, *middle, *self.output_blocks):
            for layer in block:
                yield from getattr(layer, "transformer_blocks", ())

    def replaced_attention(self) -> Any:
        """A function of a pack that stands in this network, or None: what it does to rows of a batch is unknown."""
        if forward_timestep_embed is not _FORWARD_TIMESTEP_EMBED:
            return forward_timestep_embed
        for block in self._transformer_blocks():
            if "forward" in vars(block) or type(block).forward is not _BLOCK_FORWARD:
                return block.forward
        return None

    # --- evaluation ------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: Any = None,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        """x [B, in_channels, h, w] at timesteps [B] given text [B, S, context_dim] -> [B, out_channels, h, w].

        y: [B, adm_in_channels]. control: residuals by `input`, `middle`, `output`, each list taken from its end.
        Raises ValueError when `y` is missing or given needlessly.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward,
            self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
            ),
        ).execute(x, timesteps, context, y, control, transformer_options, **kwargs)

    def _forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: Any = None,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (as above)
        **kwargs: Any,
    ) -> torch.Tensor:
        options = {**transformer_options, "original_shape": list(x.shape), "transformer_index": 0}
        patches = options.get("patches", {})
        residuals = None if control is None else {name: list(values or ()) for name, values in control.items()}
        emb = self._embed(x, timesteps, y, options)
        cells = x.shape[-2] * x.shape[-1] // 4
        pace = Pace(is_long(x.shape[0], cells, cells))
        video = {name: kwargs.get(name) for name in ("time_context", "num_video_frames", "image_only_indicator")}

        def run(block: Any, h: torch.Tensor, output_shape: Any = None) -> torch.Tensor:
            h = forward_timestep_embed(block, h, emb, context, options, output_shape=output_shape, **video)
            pace.step(h)
            return h

        h, skips = x, []
        for i, block in enumerate(self.input_blocks):
            options["block"] = ("input", i)
            h = apply_control(run(block, h), residuals, "input")
            for patch in patches.get("input_block_patch", ()):
                h = patch(h, options)
            skips.append(h)
            for patch in patches.get("input_block_patch_after_skip", ()):
                h = patch(h, options)
        options["block"] = ("middle", 0)
        if self.middle_block is not None:
            h = run(self.middle_block, h)
        h = apply_control(h, residuals, "middle")
        for i, block in enumerate(self.output_blocks):
            options["block"] = ("output", i)
            skip = apply_control(skips.pop(), residuals, "output")
            for patch in patches.get("output_block_patch", ()):
                h, skip = patch(h, skip, options)
            h = run(block, torch.cat([h, skip], dim=1), skips[-1].shape if skips else None)
        return self.out(h.to(x.dtype))

    def _embed(
        self, x: torch.Tensor, timesteps: torch.Tensor | None, y: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor:
        """Time and vector as [B, 4 * model_channels]."""
        if timesteps is None:
            raise ValueError("a UNet needs the timesteps of its latents")
        if (y is None) is not (self.num_classes is None):
            wanted = "no vector" if self.num_classes is None else f"a vector of {self.adm_in_channels} numbers"
            raise ValueError(f"this UNet takes {wanted} (y) besides the text; the conditioning is of another model")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(x.dtype))
        for patch in options.get("patches", {}).get("emb_patch", ()):
            emb = patch(emb, self.model_channels, options)
        if y is not None:
            if y.shape[0] != x.shape[0]:
                raise ValueError(f"{y.shape[0]} vectors (y) for a batch of {x.shape[0]}")
            emb = emb + self.label_emb(y.to(x.dtype))
        return emb


_FORWARD_TIMESTEP_EMBED = forward_timestep_embed
_BLOCK_FORWARD = BasicTransformerBlock.forward
