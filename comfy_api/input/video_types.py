"""What a video is between nodes."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

from comfy_api.util import VideoCodec, VideoComponents, VideoContainer


class VideoInput(ABC):
    """A video, in a file or in memory."""

    @abstractmethod
    def get_components(self) -> VideoComponents:
        """Frames, frame rate and sound."""

    @abstractmethod
    def save_to(
        self,
        path: str | io.BytesIO,
        format: VideoContainer = VideoContainer.AUTO,
        codec: VideoCodec = VideoCodec.AUTO,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write it as a file."""

    def get_stream_source(self) -> str | io.BytesIO:
        """A path or buffer that can be read."""
        buffer = io.BytesIO()
        self.save_to(buffer)
        buffer.seek(0)
        return buffer

    def get_dimensions(self) -> tuple[int, int]:
        """Width and height in pixels."""
        images = self.get_components().images
        return images.shape[2], images.shape[1]

    def get_duration(self) -> float:
        """Seconds."""
        parts = self.get_components()
        return float(parts.images.shape[0] / parts.frame_rate)

    def get_frame_count(self) -> int:
        return int(self.get_components().images.shape[0])

    def get_frame_rate(self) -> Fraction:
        return Fraction(self.get_components().frame_rate)

    def get_container_format(self) -> str:
        """Name of the container, as in the file's header."""
        from comfy import media

        with media.open_container(self.get_stream_source()) as container:
            return container.format.name
