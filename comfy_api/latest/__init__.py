"""The node interface, newest version: `io`, `ui`, `ComfyExtension`, `Input`, `InputImpl`, `Types`, `ComfyAPI`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from comfy_api.input import AudioInput, ImageInput, LatentInput, MaskInput, VideoInput
from comfy_api.latest import io, ui
from comfy_api.util import VideoCodec, VideoComponents, VideoContainer


class Input:
    """Types of values that nodes receive, for annotations."""

    Image = ImageInput
    Audio = AudioInput
    Mask = MaskInput
    Latent = LatentInput
    Video = VideoInput


class Types:
    """Types used with videos."""

    VideoCodec = VideoCodec
    VideoContainer = VideoContainer
    VideoComponents = VideoComponents


class _InputImpl:
    """Values that nodes may make; the video ones need PyAV, so they are imported when used."""

    def __getattr__(self, name: str) -> Any:
        from comfy_api import input_impl

        if name not in input_impl.__all__:
            raise AttributeError(name)
        return getattr(input_impl, name)


InputImpl = _InputImpl()


class ComfyExtension(ABC):
    """A pack of V3 nodes; its module has `async def comfy_entrypoint()` that returns one."""

    async def on_load(self) -> None:  # noqa: B027 - packs may leave it out
        """Called once before the nodes are listed."""

    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The pack's node classes."""


class Execution:
    """What a running node may tell the program."""

    async def set_progress(
        self,
        value: float,
        max_value: float,
        node_id: str | None = None,
        preview_image: Any = None,
        ignore_size_limit: bool = False,
    ) -> None:
        """Report progress of the running node (or of `node_id`), with a PIL image or [H, W, C] / [1, H, W, C] tensor.

        Raises ValueError outside of nodes when no node is named.
        """
        report_progress(value, max_value, node_id, preview_image, ignore_size_limit)


class ComfyAPI:
    """The program as seen by a node, for `async` code."""

    VERSION = "latest"
    STABLE = False

    def __init__(self) -> None:
        self.execution = Execution()


class _ExecutionSync:
    def set_progress(
        self,
        value: float,
        max_value: float,
        node_id: str | None = None,
        preview_image: Any = None,
        ignore_size_limit: bool = False,
    ) -> None:
        report_progress(value, max_value, node_id, preview_image, ignore_size_limit)


class ComfyAPISync:
    """The program as seen by a node, for ordinary code."""

    def __init__(self) -> None:
        self.execution = _ExecutionSync()


def report_progress(
    value: float, max_value: float, node_id: str | None, preview_image: Any, ignore_size_limit: bool
) -> None:
    import comfy.utils
    from comfy.cli_args import args
    from comfy_execution.utils import get_executing_context

    if node_id is None:
        context = get_executing_context()
        if context is None:
            raise ValueError("set_progress: no node is running; give node_id")
        node_id = context.node_id
    hook = comfy.utils.PROGRESS_BAR_HOOK
    if hook is None:
        return
    preview = None
    if preview_image is not None:
        preview = ("PNG", _picture(preview_image), None if ignore_size_limit else args.preview_size)
    hook(value, max_value, preview, node_id=node_id)


def _picture(image: Any) -> Any:
    if not hasattr(image, "movedim"):
        return image
    from comfy_api.latest.ui import ImageSaveHelper

    return ImageSaveHelper._pictures(image if image.ndim == 4 else image[None])[0]


__all__ = [
    "ComfyAPI",
    "ComfyAPISync",
    "ComfyExtension",
    "Input",
    "InputImpl",
    "Types",
    "io",
    "ui",
]
