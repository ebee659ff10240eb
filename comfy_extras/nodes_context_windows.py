"""Sampling of long latents in overlapping windows."""

from __future__ import annotations

from typing import Any

import comfy.context_windows as windows
from comfy_api.latest import io
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.v3 import extension

SCHEDULES = [windows.STATIC, windows.UNIFORM, windows.LOOPED, windows.BATCHED]
FUSE_METHODS = [windows.PYRAMID, windows.RELATIVE, windows.FLAT, windows.OVERLAP_LINEAR]


def _shared() -> list[Any]:
    return [
        io.Combo.Input("context_schedule", options=SCHEDULES, tooltip="How windows are laid over the frames."),
        io.Int.Input("context_stride", min=1, default=1, tooltip="How many distances between frames; uniform only."),
        io.Boolean.Input("closed_loop", default=False, tooltip="Windows may go on at the beginning; looped only."),
        io.Combo.Input("fuse_method", options=FUSE_METHODS, default=windows.PYRAMID, tooltip="How they are blended."),
    ]


def with_windows(model: Any, context_schedule: str, fuse_method: str, **settings: Any) -> Any:
    """A clone of a model that predicts in windows."""
    model = model.clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(context_schedule),
        windows.get_matching_fuse_method(fuse_method),
        **settings,
    )
    windows.create_prepare_sampling_wrapper(model)
    return model


class ContextWindowsManualNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextWindowsManual",
            display_name="Context Windows (Manual)",
            category="context",
            is_experimental=True,
            description="Predicts long latents in overlapping windows.",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("context_length", min=1, default=16),
                io.Int.Input("context_overlap", min=0, default=4),
                *_shared(),
                io.Int.Input("dim", min=0, max=5, default=0, tooltip="Axis of the latent that is cut."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        context_length: int,
        context_overlap: int,
        context_schedule: str,
        context_stride: int,
        closed_loop: bool,
        fuse_method: str,
        dim: int,
    ):
        return io.NodeOutput(
            with_windows(
                model,
                context_schedule,
                fuse_method,
                context_length=context_length,
                context_overlap=context_overlap,
                context_stride=context_stride,
                closed_loop=closed_loop,
                dim=dim,
            )
        )


class WanContextWindowsManualNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        length = io.Int.Input("context_length", min=1, max=MAX_RESOLUTION, step=4, default=81, tooltip="In frames.")
        return io.Schema(
            node_id="WanContextWindowsManual",
            display_name="WAN Context Windows (Manual)",
            category="context",
            is_experimental=True,
            description="Predicts long videos of Wan in overlapping windows.",
            inputs=[
                io.Model.Input("model"),
                length,
                io.Int.Input("context_overlap", min=0, default=30, tooltip="In frames."),
                *_shared(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, context_length: int, context_overlap: int, context_schedule: str, context_stride: int,
        closed_loop: bool, fuse_method: str,
    ):  # fmt: skip
        """Windows in frames of the video, of which a latent frame after the first is four."""
        windowed = with_windows(
            model, context_schedule, fuse_method, context_length=max((context_length - 1) // 4 + 1, 1),
            context_overlap=max((context_overlap - 1) // 4 + 1, 0), context_stride=context_stride,
            closed_loop=closed_loop, dim=2,
        )  # fmt: skip
        return io.NodeOutput(windowed)


comfy_entrypoint = extension(ContextWindowsManualNode, WanContextWindowsManualNode)
