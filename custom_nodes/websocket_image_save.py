"""Pictures sent over the WebSocket instead of written to disk."""

from __future__ import annotations

import time

import numpy as np
import torch
from PIL import Image

import comfy.utils


class SaveImageWebsocket:
    """Each picture goes to the client as a PNG in a preview frame of full size."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",)}}

    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "api/image"

    def save_images(self, images: torch.Tensor):
        progress = comfy.utils.ProgressBar(len(images))
        for step, image in enumerate(images):
            pixels = (255.0 * image.cpu().numpy()).clip(0, 255).astype(np.uint8)
            progress.update_absolute(step, len(images), ("PNG", Image.fromarray(pixels), None))
        return {}

    @classmethod
    def IS_CHANGED(cls, images: torch.Tensor):
        return time.time()


NODE_CLASS_MAPPINGS = {"SaveImageWebsocket": SaveImageWebsocket}
