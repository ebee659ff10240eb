"""Growing and shrinking bright areas; pictures as luma and chroma."""

from __future__ import annotations

import torch

import comfy.model_management
from comfy_api.latest import io
from comfy_nodes.v3 import extension

# names of the node -> names of kornia.morphology
OPERATIONS = {
    "erode": "erosion",
    "dilate": "dilation",
    "open": "opening",
    "close": "closing",
    "gradient": "gradient",
    "bottom_hat": "bottom_hat",
    "top_hat": "top_hat",
}


class Morphology(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Morphology",
            display_name="ImageMorphology",
            category="image/postprocessing",
            inputs=[
                io.Image.Input("image"),
                io.Combo.Input("operation", options=list(OPERATIONS)),
                io.Int.Input("kernel_size", default=3, min=3, max=999, step=1),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, operation: str, kernel_size: int):
        import kornia.morphology

        device = comfy.model_management.get_torch_device()
        kernel = torch.ones(kernel_size, kernel_size, device=device)
        changed = getattr(kornia.morphology, OPERATIONS[operation])(image.to(device).movedim(-1, 1), kernel)
        return io.NodeOutput(changed.to(comfy.model_management.intermediate_device()).movedim(1, -1))


class ImageRGBToYUV(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageRGBToYUV",
            category="image/batch",
            inputs=[io.Image.Input("image")],
            outputs=[io.Image.Output(display_name=name) for name in "YUV"],
        )

    @classmethod
    def execute(cls, image: torch.Tensor):
        """Three grey pictures."""
        from kornia.color import rgb_to_yuv

        parts = rgb_to_yuv(image[..., :3].movedim(-1, 1)).movedim(1, -1).split(1, dim=-1)
        return io.NodeOutput(*(part.expand(-1, -1, -1, 3) for part in parts))


class ImageYUVToRGB(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageYUVToRGB",
            category="image/batch",
            inputs=[io.Image.Input(name) for name in "YUV"],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, Y: torch.Tensor, U: torch.Tensor, V: torch.Tensor):  # noqa: N803 - names of the inputs
        from kornia.color import yuv_to_rgb

        parts = torch.cat([part.mean(dim=-1, keepdim=True) for part in (Y, U, V)], dim=-1)
        return io.NodeOutput(yuv_to_rgb(parts.movedim(-1, 1)).movedim(1, -1))


comfy_entrypoint = extension(ImageRGBToYUV, ImageYUVToRGB, Morphology)
