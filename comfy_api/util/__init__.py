"""Kinds and parts of videos."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any


class VideoCodec(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    AUTO = "auto"
    H264 = "h264"

    @classmethod
    def as_input(cls) -> list[str]:
        """The names, for a choice."""
        return [member.value for member in cls]


class VideoContainer(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    AUTO = "auto"
    MP4 = "mp4"

    @classmethod
    def as_input(cls) -> list[str]:
        """The names, for a choice."""
        return [member.value for member in cls]

    @classmethod
    def get_extension(cls, value: VideoContainer | str) -> str:
        """File extension without the dot."""
        return {"mp4": "mp4", "auto": "mp4"}.get(VideoContainer(value).value, "")


@dataclass
class VideoComponents:
    """`images` [T, H, W, 3] in 0..1, `frame_rate` in frames per second, `audio` {waveform, sample_rate} or None."""

    images: Any
    frame_rate: Fraction
    audio: Any = None
    metadata: dict[str, Any] | None = None


__all__ = ["VideoCodec", "VideoComponents", "VideoContainer"]
