"""3D models shown and photographed in the page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.input_impl import VideoFromFile
from comfy_nodes.fields import whole
from comfy_nodes.files import LoadImage

MODELS = (".gltf", ".glb", ".obj", ".fbx", ".stl")
FOLDER = "3d"


def model_files(extensions: tuple[str, ...]) -> list[str]:
    """3D models in input/3d, as paths below the input folder."""
    root = Path(folder_paths.get_input_directory())
    found = (path for path in (root / FOLDER).rglob("*") if path.suffix.lower() in extensions)
    return sorted(str(path.relative_to(root)).replace(os.sep, "/") for path in found)


def picture(name: str) -> Any:
    """A picture [1, H, W, 3] and mask [1, H, W] the page made of the model."""
    image, mask = LoadImage().load_image(name)
    return image, mask


class Load3D:
    KIND = "LOAD_3D"
    EXTENSIONS = MODELS
    WITH_LINEART = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model_file": (model_files(cls.EXTENSIONS), {"file_upload": True}),
                "image": (cls.KIND, {}),
                "width": whole(1024, 1, 4096, 1),
                "height": whole(1024, 1, 4096, 1),
            }
        }

    RETURN_TYPES = ("IMAGE", "MASK", "STRING", "IMAGE", "IMAGE", "LOAD3D_CAMERA", "VIDEO")
    RETURN_NAMES = ("image", "mask", "mesh_path", "normal", "lineart", "camera_info", "recording_video")
    FUNCTION = "process"
    EXPERIMENTAL = True
    CATEGORY = "3d"

    def process(self, model_file: str, image: dict[str, Any], **size: int):
        """The page photographed the model when the prompt was queued: `image` names the files."""
        missing = [key for key in ("image", "mask", "normal") if not (image or {}).get(key)]
        if missing:
            raise ValueError(f"the page took no picture of {model_file} ({missing[0]}); queue it from the page")
        photo, _ = picture(image["image"])
        _, mask = picture(image["mask"])
        normal, _ = picture(image["normal"])
        lineart = [picture(image["lineart"])[0]] if self.WITH_LINEART else []
        recording = image.get("recording") or ""
        video = VideoFromFile(folder_paths.get_annotated_filepath(recording)) if recording else None
        return (photo, mask, model_file, normal, *lineart, image.get("camera_info"), video)


class Load3DAnimation(Load3D):
    KIND = "LOAD_3D_ANIMATION"
    EXTENSIONS = (".gltf", ".glb", ".fbx")
    WITH_LINEART = False

    RETURN_TYPES = ("IMAGE", "MASK", "STRING", "IMAGE", "LOAD3D_CAMERA", "VIDEO")
    RETURN_NAMES = ("image", "mask", "mesh_path", "normal", "camera_info", "recording_video")


class Preview3D:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model_file": ("STRING", {"default": "", "multiline": False})},
            "optional": {"camera_info": ("LOAD3D_CAMERA", {})},
        }

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "process"
    EXPERIMENTAL = True
    CATEGORY = "3d"

    def process(self, model_file: str, camera_info: Any = None):
        return {"ui": {"result": [model_file, camera_info]}}


class Preview3DAnimation(Preview3D):
    """The same, played."""


NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (Load3D, Load3DAnimation, Preview3D, Preview3DAnimation)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Load3D": "Load 3D",
    "Load3DAnimation": "Load 3D - Animation",
    "Preview3D": "Preview 3D",
    "Preview3DAnimation": "Preview 3D - Animation",
}
