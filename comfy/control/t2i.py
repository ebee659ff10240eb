"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): features of a hint for a UNet's levels, without the latent or time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import comfy.image_scaling
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils

from .base import ControlBase, Residuals

StateDict = dict[str, torch.Tensor]

_LEVELS = 4


class _Down(nn.Module):
    """Half the size, rounded up: a convolution of stride 2, or a mean of 2 x 2 cells."""

    def __init__(self, width: int, convolution: bool, place: dict[str, Any]) -> None:
        super().__init__()
        self.op = comfy.ops.manual_cast.Conv2d(width, width, 3, stride=2, padding=1, **place) if convolution else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, C, h / 2, w / 2]. Odd sizes are padded with zeros on both sides, and those count."""
        if self.op is not None:
            return self.op(x)
        return F.avg_pool2d(x, 2, 2, padding=(x.shape[2] % 2, x.shape[3] % 2))


class _Residual(nn.Module):
    """A convolution, ReLU and another one, plus the input; before them a smaller size and another width if asked for."""

    def __init__(
        self, inner: int, width: int, kernel: int, down: bool, convolution: bool, place: dict[str, Any]
    ) -> None:
        super().__init__()
        conv = comfy.ops.manual_cast.Conv2d
        self.down_opt = _Down(inner, convolution, place) if down else None
        self.in_conv = None if inner == width else conv(inner, width, kernel, padding=kernel // 2, **place)
        self.block1 = conv(width, width, 3, padding=1, **place)
        self.block2 = conv(width, width, kernel, padding=kernel // 2, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, width, h', w']."""
        x = x if self.down_opt is None else self.down_opt(x)
        x = x if self.in_conv is None else self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class _LightLevel(nn.Module):
    """Residual blocks at a quarter of the width."""

    def __init__(self, inner: int, width: int, blocks: int, down: bool, place: dict[str, Any]) -> None:
        super().__init__()
        conv, narrow = comfy.ops.manual_cast.Conv2d, width // 4
        self.down_opt = _Down(inner, False, place) if down else None
        self.in_conv = conv(inner, narrow, 1, **place)
        self.body = nn.Sequential(*(_Residual(narrow, narrow, 3, False, False, place) for _ in range(blocks)))
        self.out_conv = conv(narrow, width, 1, **place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] -> [B, width, h', w']."""
        x = x if self.down_opt is None else self.down_opt(x)
        return self.out_conv(self.body(self.in_conv(x)))


class Adapter(nn.Module):
    """From a hint picture to a feature map for each level of a UNet.

    Of SDXL the hint is folded 16 x 16 pixels a cell, and only the third level is smaller than the second.
    """

    def __init__(self, sd: StateDict, place: dict[str, Any]) -> None:
        """Sizes are those of the weights in `sd`."""
        super().__init__()
        channels, width = sd["conv_in.weight"].shape[1], sd["conv_in.weight"].shape[0]
        kernel = sd["body.0.block2.weight"].shape[2]
        convolution = any(key.endswith("down_opt.op.weight") for key in sd)
        self.xl = channels in (256, 768)
        self.unshuffle_amount = 16 if self.xl else 8
        self.input_channels = channels // self.unshuffle_amount**2
        smaller = (2,) if self.xl else (1, 2, 3)
        widths = [width, 2 * width, 4 * width, 4 * width]
        self.conv_in = comfy.ops.manual_cast.Conv2d(channels, width, 3, padding=1, **place)
        blocks = []
        for level in range(_LEVELS):
            before = widths[max(level - 1, 0)] if level in smaller or (self.xl and level == 1) else widths[level]
            blocks.append(_Residual(before, widths[level], kernel, level in smaller, convolution, place))
            blocks.append(_Residual(widths[level], widths[level], kernel, False, convolution, place))
        self.body = nn.ModuleList(blocks)

    def forward(self, hint: torch.Tensor) -> dict[str, list[torch.Tensor | None]]:
        """Hint [B, channels, H, W] -> residuals of input blocks, the last block's first, and of SDXL's middle block."""
        x = self.conv_in(F.pixel_unshuffle(hint, self.unshuffle_amount))
        found: list[torch.Tensor | None] = []
        for level in range(_LEVELS):
            x = self.body[2 * level + 1](self.body[2 * level](x))
            # after input blocks 3, 5, 8 and the middle block of SDXL, 2, 5, 8 and 11 of the others
            skipped = {0: 3, 2: 2}.get(level, 1) if self.xl else 2
            found += [None] * skipped + [x]
        found.reverse()
        return {"input": found[1:], "middle": found[:1]} if self.xl else {"input": found}


class AdapterLight(nn.Module):
    """The small adapter, for Stable Diffusion 1."""

    xl = False
    unshuffle_amount = 8

    def __init__(self, sd: StateDict, place: dict[str, Any]) -> None:
        """Sizes are those of the weights in `sd`."""
        super().__init__()
        channels = sd["body.0.in_conv.weight"].shape[1]
        self.input_channels = channels // self.unshuffle_amount**2
        widths = [channels, *(sd[f"body.{level}.out_conv.weight"].shape[0] for level in range(_LEVELS))]
        blocks = len({key.split(".")[3] for key in sd if key.startswith("body.0.body.")})
        self.body = nn.ModuleList(
            _LightLevel(widths[level], widths[level + 1], blocks, level > 0, place) for level in range(_LEVELS)
        )

    def forward(self, hint: torch.Tensor) -> dict[str, list[torch.Tensor | None]]:
        """See `Adapter.forward`."""
        x, found = F.pixel_unshuffle(hint, self.unshuffle_amount), []
        for level in self.body:
            x = level(x)
            found += [None, None, x]
        return {"input": found[::-1]}


class T2IAdapter(ControlBase):
    """An adapter as one conditioning uses it. Its features are the same at every step and made once a size."""

    def __init__(
        self, t2i_model: Any, channels_in: int, compression_ratio: int = 8, upscale_algorithm: str = "nearest-exact",
        device: Any = None, patcher: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.t2i_model = t2i_model
        self.channels_in = channels_in
        self.compression_ratio = compression_ratio
        self.upscale_algorithm = upscale_algorithm
        self.device = device or comfy.model_management.get_torch_device()
        self._patcher = patcher or comfy.model_patcher.ModelPatcher(
            t2i_model, load_device=self.device, offload_device=comfy.model_management.unet_offload_device()
        )
        self._features: dict[tuple[int, int], dict[str, list[Any]]] = {}

    def scale_image_to(self, width: int, height: int) -> tuple[int, int]:
        """Pixels, up to whole cells of the adapter."""
        cell = self.t2i_model.unshuffle_amount
        return math.ceil(width / cell) * cell, math.ceil(height / cell) * cell

    def prepare_hint(self, x_noisy: torch.Tensor) -> None:
        """Features of all hints, for latents of this size."""
        size = (x_noisy.shape[-2], x_noisy.shape[-1])
        if size in self._features:
            return
        width, height = self.scale_image_to(*(side * self.compression_ratio for side in size[::-1]))
        upscale = comfy.image_scaling.common_upscale
        hint = upscale(self.cond_hint_original, width, height, self.upscale_algorithm, "center").float()
        if self.channels_in == 1 and hint.shape[1] > 1:
            hint = hint.mean(dim=1, keepdim=True)
        self.cond_hint = hint.to(x_noisy)
        self._features[size] = self.t2i_model(self.cond_hint)

    def get_control(
        self, x_noisy: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], batched_number: int,
        transformer_options: Mapping[str, Any],
    ) -> Residuals | None:  # fmt: skip
        """See `ControlBase.get_control`."""
        before = self.previous_residuals(x_noisy, t, cond, batched_number, transformer_options)
        if not self.is_active(t):
            return before
        self.prepare_hint(x_noisy)
        features = self._features[x_noisy.shape[-2], x_noisy.shape[-1]]
        rows = {
            kind: [None if f is None else self.hint_rows(f, x_noisy.shape[0], batched_number) for f in values]
            for kind, values in features.items()
        }
        return self.control_merge(rows, before, x_noisy.dtype)

    def copy(self) -> Any:
        """Another use of the same network."""
        other = type(self)(
            self.t2i_model, self.channels_in, self.compression_ratio, self.upscale_algorithm, self.device, self._patcher
        )
        self.copy_to(other)
        return other

    def get_models(self) -> list[Any]:
        """Patchers of the chain's networks."""
        return [*super().get_models(), self._patcher]

    def cleanup(self) -> None:
        """See `ControlBase.cleanup`."""
        self._features = {}
        super().cleanup()


def _own_names(sd: StateDict) -> StateDict:
    """Diffusers' names as the authors'."""
    if "adapter.body.0.resnets.0.block1.weight" not in sd:
        return sd
    names = {f"adapter.body.{i}.resnets.{j}.": f"body.{2 * i + j}." for i in range(_LEVELS) for j in range(2)}
    names |= {f"adapter.body.{i}.": f"body.{2 * i}." for i in range(_LEVELS)}
    return comfy.utils.state_dict_prefix_replace(dict(sd), {**names, "adapter.": ""})


def load_t2i_adapter(t2i_data: Any, model_options: dict[str, Any] | None = None) -> T2IAdapter | None:
    """The adapter of a state dict, or None when it is of no known kind. Raises ValueError for an incomplete one."""
    sd = _own_names(t2i_data.get("adapter", t2i_data))
    kind: Any = AdapterLight if "body.0.out_conv.weight" in sd else Adapter if "body.0.block2.weight" in sd else None
    if kind is None:
        return None
    place = {"device": torch.device("meta"), "dtype": comfy.utils.weight_dtype(sd)}
    try:
        network = kind(sd, place)
        network.load_state_dict(sd, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the T2I-Adapter is incomplete ({error}); use a complete file") from error
    return T2IAdapter(network.eval().requires_grad_(False), network.input_channels)


def load(sd: StateDict, model: Any, options: dict[str, Any]) -> Any:
    """See `load_t2i_adapter`."""
    return load_t2i_adapter(sd, options)
