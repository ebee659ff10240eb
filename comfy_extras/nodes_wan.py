"""What nodes of video models do with latents alone; the models themselves are not in this version."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_nodes.v3 import extension

MOST_FRAMES = 99999
FRAMES = 2  # axis of [B, C, T, H, W]


class TrimVideoLatent(io.ComfyNode):
    """Takes away reference frames that were put before a video."""

    @classmethod
    def define_schema(cls):
        count = io.Int.Input("trim_amount", default=0, min=0, max=MOST_FRAMES)
        return io.Schema(
            node_id=cls.__name__,
            category="latent/video",
            inputs=[io.Latent.Input("samples"), count],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], trim_amount: int):
        video = samples["samples"]
        if video.ndim <= FRAMES + 2:
            raise ValueError(f"a latent of shape {list(video.shape)} is no video; trimming needs one with frames")
        kept = max(0, video.shape[FRAMES] - trim_amount)
        trimmed = video.narrow(FRAMES, video.shape[FRAMES] - kept, kept)
        return io.NodeOutput({**samples, "samples": trimmed})


comfy_entrypoint = extension(TrimVideoLatent)
