"""Videos: from a file, or from frames."""

from comfy_api.input_impl.video_types import VideoFromComponents, VideoFromFile

__all__ = ["VideoFromComponents", "VideoFromFile"]
