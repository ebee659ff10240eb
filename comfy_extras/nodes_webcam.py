"""A picture taken by the page's camera."""

from __future__ import annotations

from comfy_nodes.fields import pixels
from comfy_nodes.files import LoadImage


class WebcamCapture(LoadImage):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": ("WEBCAM", {}),
                "width": pixels(0, 0, 1),
                "height": pixels(0, 0, 1),
                "capture_on_queue": ("BOOLEAN", {"default": True}),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "load_capture"

    def load_capture(self, image: str, **settings):
        """The page has uploaded the picture; size and moment of the capture were its business."""
        return (self.load_image(image)[0],)

    @classmethod
    def IS_CHANGED(cls, image: str, width: int, height: int, capture_on_queue: bool):
        return super().IS_CHANGED(image)


NODE_CLASS_MAPPINGS = {"WebcamCapture": WebcamCapture}
NODE_DISPLAY_NAME_MAPPINGS = {"WebcamCapture": "Webcam Capture"}
