"""Kinds and parts of videos."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import Any


class _Choice(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    """Names a node can offer as a choice."""

    @classmethod
    def as_input(cls) -> list[str]:
        return [member.value for member in cls]


class VideoCodec(_Choice):
    """How the frames are encoded; AUTO leaves it to the writer."""

    AUTO = "auto"
    H264 = "h264"


class VideoContainer(_Choice):
    """What kind of file holds the streams; AUTO leaves it to the writer."""

    AUTO = "auto"
    MP4 = "mp4"

    @classmethod
    def get_extension(cls, value: Any) -> str:
        """File extension, without the dot, of a container or its name."""
        return "mp4" if cls(value) in (cls.AUTO, cls.MP4) else cls(value).value


@dataclass
class VideoComponents:
    """`images` [T, H, W, 3] in 0..1, `frame_rate` in frames per second, `audio` {waveform, sample_rate} or None."""

    images: Any
    frame_rate: Fraction
    audio: Any = None
    metadata: dict[str, Any] | None = None


__all__ = ["VideoCodec", "VideoComponents", "VideoContainer"]
