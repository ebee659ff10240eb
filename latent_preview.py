"""Small pictures of a latent while it is being sampled.

The latent is made small before it becomes a picture, so that a preview takes the same memory and time for every size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

import comfy.utils
import folder_paths
from comfy.cli_args import LatentPreviewMethod, args
from comfy.taesd.taesd import TAESD

Preview = tuple[str, Any, int]
_METHODS = ", ".join(method.value for method in LatentPreviewMethod)
TINY_VAE_FACTOR = 8  # pixels per latent cell and side that a tiny VAE decodes


def preview_to_image(latent_image: torch.Tensor) -> Any:
    """PIL image of [H, W, 3] in -1..1."""
    from PIL import Image

    levels = ((latent_image + 1.0) / 2.0).clamp(0, 1).mul(255).to(device="cpu", dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def first_small(x0: torch.Tensor, longest: int) -> torch.Tensor:
    """[1, C, h, w]: the first entry and frame of a latent [B, C, h, w] or [B, C, T, h, w], at most `longest` cells a side.

    Cells are averaged where there are more.
    """
    first = x0[:1, :, 0] if x0.ndim == 5 else x0[:1]
    sides = first.shape[-2:]
    if max(sides) <= longest:
        return first
    small = [max(1, side * longest // max(sides)) for side in sides]
    return torch.nn.functional.interpolate(first, size=small, mode="area")


class LatentPreviewer:
    """Turns a denoised latent [B, C, h, w] (or [B, C, T, h, w]) into a picture of its first entry and frame."""

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Any:
        raise NotImplementedError

    def decode_latent_to_preview_image(self, preview_format: str, x0: torch.Tensor) -> Preview:
        """What progress hooks take: (format, PIL image, longest side)."""
        return "JPEG", self.decode_latent_to_preview(x0), args.preview_size


class TAESDPreviewerImpl(LatentPreviewer):
    """Decodes with a tiny VAE."""

    def __init__(self, taesd: Any) -> None:
        self.taesd = taesd

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Any:
        longest = max(1, 2 * args.preview_size // TINY_VAE_FACTOR)  # twice the preview's side, which is sharper
        return preview_to_image(self.taesd.decode(first_small(x0, longest))[0].movedim(0, 2))


class Latent2RGBPreviewer(LatentPreviewer):
    """A linear map from channels to colours: `latent_rgb_factors` [C][3], `latent_rgb_factors_bias` [3] or None."""

    def __init__(self, latent_rgb_factors: Any, latent_rgb_factors_bias: Any = None) -> None:
        self.latent_rgb_factors = torch.tensor(latent_rgb_factors, device="cpu").transpose(0, 1)
        self.latent_rgb_factors_bias = (
            None if latent_rgb_factors_bias is None else torch.tensor(latent_rgb_factors_bias, device="cpu")
        )

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Any:
        first = first_small(x0, max(1, args.preview_size))[0]
        weight = self.latent_rgb_factors.to(first)
        bias = None if self.latent_rgb_factors_bias is None else self.latent_rgb_factors_bias.to(first)
        return preview_to_image(torch.nn.functional.linear(first.movedim(0, -1), weight, bias=bias))


def _tiny_vae(device: Any, latent_format: Any) -> LatentPreviewer | None:
    name = latent_format.taesd_decoder_name
    if name is None:
        return None
    files = [file for file in folder_paths.get_filename_list("vae_approx") if file.startswith(name)]
    if not files:
        logging.warning("Warning: TAESD previews enabled, but could not find models/vae_approx/%s", name)
        return None
    path = folder_paths.get_full_path_or_raise("vae_approx", files[0])
    return TAESDPreviewerImpl(TAESD(None, path, latent_channels=latent_format.latent_channels).to(device))


@contextmanager
def previews_of(extra_data: Any) -> Iterator[None]:
    """Inside, previews are made by the method a prompt asks for: `preview_method` of its extra_data, if it names one.

    Without it, and with "default", --preview-method decides. What a node sets inside stays.
    """
    before = args.preview_method
    wanted = extra_data.get("preview_method") if isinstance(extra_data, Mapping) else None
    try:
        method = before if wanted in (None, "default") else LatentPreviewMethod(wanted)
    except ValueError:
        logging.warning("preview_method %.50r is not one of default, %s: ignored", wanted, _METHODS)
        method = before
    args.preview_method = method
    try:
        yield
    finally:
        if args.preview_method is method:
            args.preview_method = before


def get_previewer(device: Any, latent_format: Any) -> LatentPreviewer | None:
    """The previewer asked for by --preview-method, as far as this latent format has one."""
    method = args.preview_method
    if method == LatentPreviewMethod.NoPreviews:
        return None
    previewer = _tiny_vae(device, latent_format) if method == LatentPreviewMethod.TAESD else None
    if previewer is None and latent_format.latent_rgb_factors is not None:
        bias = getattr(latent_format, "latent_rgb_factors_bias", None)
        previewer = Latent2RGBPreviewer(latent_format.latent_rgb_factors, bias)
    return previewer


def prepare_callback(
    model: Any, steps: int, x0_output_dict: dict[str, Any] | None = None
) -> Callable[[int, torch.Tensor, torch.Tensor, int], None]:
    """The callback of a sampler: reports the step, with a preview, and leaves the latest `x0` in `x0_output_dict`."""
    previewer = get_previewer(model.load_device, model.model.latent_format)
    progress = comfy.utils.ProgressBar(steps)

    def callback(step: int, x0: torch.Tensor, x: torch.Tensor, total_steps: int) -> None:
        if x0_output_dict is not None:
            x0_output_dict["x0"] = x0
        preview = None
        # nobody looks where there is no hook, as on ranks that follow
        if previewer is not None and comfy.utils.PROGRESS_BAR_HOOK is not None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0)
        progress.update_absolute(step + 1, total_steps, preview)

    return callback
