"""Sends pictures to the page over the WebSocket instead of writing files: for programs that drive the server."""

from __future__ import annotations

import time

import numpy as np
from PIL import Image

import comfy.utils


class SaveImageWebsocket:
    """Each picture arrives as a binary preview message (event 1, format 2: PNG) while this node is executing."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",)}}

    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "api/image"

    def save_images(self, images):
        progress = comfy.utils.ProgressBar(images.shape[0])
        for done, image in enumerate(images):
            pixels = (255.0 * image.cpu().numpy()).clip(0, 255).astype(np.uint8)
            progress.update_absolute(done, images.shape[0], ("PNG", Image.fromarray(pixels), None))
        return {}

    @classmethod
    def IS_CHANGED(cls, images):
        # sent anew for each prompt, also when nothing changed
        return time.time()


NODE_CLASS_MAPPINGS = {"SaveImageWebsocket": SaveImageWebsocket}
