"""Nodes for Flux models."""

from __future__ import annotations

import math
from typing import Any

import torch

import comfy.model_management
import node_helpers
from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.image import scaled
from comfy_nodes.v3 import batch, extension, prompt, share, side

CATEGORY = "advanced/conditioning/flux"

# width and height of the pictures FLUX.1 Kontext was trained on (model card); upright ones are these turned over
KONTEXT_SIZES = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
]
PREFERED_KONTEXT_RESOLUTIONS = KONTEXT_SIZES + [(b, a) for a, b in reversed(KONTEXT_SIZES[:-1])]


class CLIPTextEncodeFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodeFlux",
            category=CATEGORY,
            inputs=[io.Clip.Input("clip"), prompt("clip_l"), prompt("t5xxl"), share("guidance", 3.5, 100.0, step=0.1)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, clip_l: str, t5xxl: str, guidance: float):
        need_clip(clip)
        tokens = {**clip.tokenize(clip_l), "t5xxl": clip.tokenize(t5xxl)["t5xxl"]}
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": guidance}))

    encode = execute


class FluxGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FluxGuidance",
            category=CATEGORY,
            inputs=[io.Conditioning.Input("conditioning"), share("guidance", 3.5, 100.0, step=0.1)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: Any, guidance: float):
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, {"guidance": guidance}))

    append = execute


class FluxDisableGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FluxDisableGuidance",
            category=CATEGORY,
            description="This node completely disables the guidance embed on Flux and Flux like models",
            inputs=[io.Conditioning.Input("conditioning")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: Any):
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, {"guidance": None}))

    append = execute


class FluxKontextImageScale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FluxKontextImageScale",
            category=CATEGORY,
            description="This node resizes the image to one that is more optimal for flux kontext.",
            inputs=[io.Image.Input("image")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor):
        """The trained size whose shape is nearest, reached by scaling and cropping centrally."""
        shape = image.shape[2] / image.shape[1]
        width, height = min(PREFERED_KONTEXT_RESOLUTIONS, key=lambda size: (abs(shape - size[0] / size[1]), size))
        return io.NodeOutput(scaled(image, width, height, "lanczos", "center"))

    scale = execute


class FluxKontextMultiReferenceLatentMethod(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FluxKontextMultiReferenceLatentMethod",
            category=CATEGORY,
            inputs=[
                io.Conditioning.Input("conditioning"),
                io.Combo.Input(
                    "reference_latents_method", options=["offset", "index", "uxo/uno", "index_timestep_zero"]
                ),
            ],
            outputs=[io.Conditioning.Output()],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, conditioning: Any, reference_latents_method: str):
        method = "uxo" if reference_latents_method.startswith(("uxo", "uso")) else reference_latents_method
        values = {"reference_latents_method": method}
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, values))

    append = execute


class EmptyFlux2LatentImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmptyFlux2LatentImage",
            display_name="Empty Flux 2 Latent",
            category="latent",
            inputs=[side("width"), side("height"), batch()],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int = 1):
        """128 channels, a cell for 16 x 16 pixels."""
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput({"samples": torch.zeros(batch_size, 128, height // 16, width // 16, device=device)})


# Black Forest Labs' fit of the shift to tokens: slope and offset at 10 and at 200 steps, and the tokens above which the
# number of steps plays no part
SHIFT_AT_10, SHIFT_AT_200, MANY_TOKENS = (8.73809524e-05, 1.89833333), (0.00016927, 0.45666666), 4300


def flux2_shift(tokens: int, steps: int) -> float:
    """mu of the schedule of Flux 2."""
    few, many = (slope * tokens + offset for slope, offset in (SHIFT_AT_10, SHIFT_AT_200))
    return many if tokens > MANY_TOKENS else many + (many - few) / 190 * (steps - 200)


class Flux2Scheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2Scheduler",
            category="sampling/custom_sampling/schedulers",
            inputs=[
                io.Int.Input("steps", default=20, min=1, max=4096),
                side("width", step=1),
                side("height", step=1),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps: int, width: int, height: int):
        factor = math.exp(flux2_shift(round(width * height / 256), steps))
        times = torch.linspace(1, 0, steps + 1)
        return io.NodeOutput(factor * times / (factor * times + 1 - times))


comfy_entrypoint = extension(
    CLIPTextEncodeFlux,
    FluxGuidance,
    FluxDisableGuidance,
    FluxKontextImageScale,
    FluxKontextMultiReferenceLatentMethod,
    EmptyFlux2LatentImage,
    Flux2Scheduler,
)
