"""Nodes of LTX-Video. Latents are [B, 128, F, h, w] with F = (length - 1) / 8 + 1 and 32 pixels a cell and side."""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.model_management
import comfy.model_sampling
import node_helpers
from comfy.missing import missing_names
from comfy_api.latest import io
from comfy_extras.nodes_model_advanced import with_sampling
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.image import scaled
from comfy_nodes.v3 import batch, extension, share, side
from comfy_nodes.vae import need_vae

CHANNELS, CELL, STEP = 128, 32, 8
FEWEST, MOST = 1024, 4096  # tokens at which the base and the largest shift hold


def size_inputs(least: int) -> list[Any]:
    """Size and length of the video, and how many at once."""
    frames = io.Int.Input("length", default=97, min=least, max=MAX_RESOLUTION, step=STEP)
    return [side("width", 768, low=64, step=CELL), side("height", 512, low=64, step=CELL), frames, batch()]


def empty(width: int, height: int, length: int, count: int) -> torch.Tensor:
    """A latent of zeros."""
    shape = (count, CHANNELS, (length - 1) // STEP + 1, height // CELL, width // CELL)
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())


def prompts() -> list[Any]:
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative")]


def prompt_outputs() -> list[Any]:
    return [io.Conditioning.Output(display_name=name) for name in ("positive", "negative")]


def get_keyframe_idxs(cond: Any) -> tuple[torch.Tensor | None, int]:
    """(places of the guides' cells [B, 3, n] or None, frames of guides) of a conditioning."""
    places = next((f["keyframe_idxs"] for _, f in cond if f.get("keyframe_idxs") is not None), None)
    return (None, 0) if places is None else (places, torch.unique(places[:, 0]).numel())


def get_noise_mask(latent: dict[str, Any]) -> torch.Tensor:
    """A latent's mask, a copy; without one, ones [B, 1, F, 1, 1]."""
    mask = latent.get("noise_mask")
    if mask is not None:
        return mask.clone()
    samples = latent["samples"]
    return torch.ones((samples.shape[0], 1, samples.shape[2], 1, 1), dtype=torch.float32, device=samples.device)


class EmptyLTXVLatentVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=cls.__name__, category="latent/video/ltxv", inputs=size_inputs(1), outputs=[io.Latent.Output()]
        )

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int = 1):
        return io.NodeOutput({"samples": empty(width, height, length, batch_size)})

    generate = execute


class LTXVImgToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = io.Float.Input("strength", default=1.0, min=0.0, max=1.0)
        inputs = [*prompts(), io.Vae.Input("vae"), io.Image.Input("image"), *size_inputs(9), strength]
        outputs = [*prompt_outputs(), io.Latent.Output(display_name="latent")]
        return io.Schema(node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, image: torch.Tensor, width: int, height: int, length: int,
        batch_size: int, strength: float,
    ):  # fmt: skip
        """The video begins with the picture; below a strength of 1 it may differ."""
        need_vae(vae)
        known = vae.encode(scaled(image, width, height, "bilinear", "center")[..., :3])
        latent = empty(width, height, length, batch_size)
        mask = latent.new_ones((batch_size, 1, latent.shape[2], 1, 1))
        latent[:, :, : known.shape[2]] = known
        mask[:, :, : known.shape[2]] = 1.0 - strength
        return io.NodeOutput(positive, negative, {"samples": latent, "noise_mask": mask})

    generate = execute


class LTXVConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        rate = share("frame_rate", 25.0, high=1000.0)
        inputs = [*prompts(), rate]
        return io.Schema(
            node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=prompt_outputs()
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any, frame_rate: float):
        values = {"frame_rate": frame_rate}
        return io.NodeOutput(*(node_helpers.conditioning_set_values(c, values) for c in (positive, negative)))

    append = execute


class LTXVCropGuides(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        outputs = [*prompt_outputs(), io.Latent.Output(display_name="latent")]
        inputs = [*prompts(), io.Latent.Input("latent")]
        return io.Schema(node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(cls, positive: Any, negative: Any, latent: dict[str, Any]):
        """Takes away the frames of guides, which are at the end."""
        _, guides = get_keyframe_idxs(positive)
        if not guides:
            return io.NodeOutput(positive, negative, latent)
        kept = latent["samples"].shape[2] - guides
        out = {"samples": latent["samples"][:, :, :kept]}
        if latent.get("noise_mask") is not None:
            out["noise_mask"] = latent["noise_mask"][:, :, :kept]
        without = [node_helpers.conditioning_set_values(c, {"keyframe_idxs": None}) for c in (positive, negative)]
        return io.NodeOutput(*without, out)

    crop = execute


def shift_of(max_shift: float, base_shift: float, latent: dict[str, Any] | None) -> float:
    """The shift for a latent's number of tokens, on the line through both ends; that of 4096 without a latent."""
    tokens = MOST if latent is None else math.prod(latent["samples"].shape[2:])
    slope = (max_shift - base_shift) / (MOST - FEWEST)
    return tokens * slope + base_shift - slope * FEWEST


def shifts() -> list[Any]:
    return [share("max_shift", 2.05, high=100.0), share("base_shift", 0.95, high=100.0)]


class ModelSamplingLTXV(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model"), *shifts(), io.Latent.Input("latent", optional=True)]
        return io.Schema(node_id=cls.__name__, category="advanced/model", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: Any, max_shift: float, base_shift: float, latent: dict[str, Any] | None = None):
        kinds = comfy.model_sampling
        shift = shift_of(max_shift, base_shift, latent)
        return io.NodeOutput(with_sampling(model, kinds.ModelSamplingFlux, kinds.CONST, shift=shift))

    patch = execute


class LTXVScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        stretch = io.Boolean.Input(
            "stretch", default=True, tooltip="Stretch the sigmas so that the last one before 0 is `terminal`."
        )
        terminal = share("terminal", 0.1, high=0.99, tooltip="The last sigma before 0, with `stretch`.")
        inputs = [io.Int.Input("steps", default=20, min=1, max=10000), *shifts(), stretch, terminal]
        return io.Schema(
            node_id=cls.__name__, category="sampling/custom_sampling/schedulers",
            inputs=[*inputs, io.Latent.Input("latent", optional=True)], outputs=[io.Sigmas.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, steps: int, max_shift: float, base_shift: float, stretch: bool, terminal: float,
        latent: dict[str, Any] | None = None,
    ):  # fmt: skip
        """e^s / (e^s + 1 / u - 1) for u from 1 to 0; s grows with the number of tokens."""
        power = math.exp(shift_of(max_shift, base_shift, latent))
        u = torch.linspace(1.0, 0.0, steps + 1)
        sigmas = torch.where(u > 0, power / (power + (1 / u.clamp(min=1e-9) - 1)), 0.0)
        if stretch:
            last = 1 - sigmas[-2]
            stretched = 1 - (1 - sigmas[:-1]) / (last / (1 - terminal)) if last > 0 else sigmas[:-1]
            sigmas = torch.cat((stretched, sigmas[-1:]))
        return io.NodeOutput(sigmas)

    get_sigmas = execute


comfy_entrypoint = extension(
    EmptyLTXVLatentVideo, LTXVImgToVideo, ModelSamplingLTXV, LTXVConditioning, LTXVScheduler, LTXVCropGuides
)
_GUIDES = ("LTXVAddGuide", "LTXVPreprocess", "SymmetricPatchifier", "_append_guide_attention_entry")
__getattr__ = missing_names(__name__, dict.fromkeys(_GUIDES, "guides of LTX-Video, which need its VAE,"))
