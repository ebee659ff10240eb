"""Nodes that read and write pictures and latents."""

from __future__ import annotations

import os
import secrets
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch

import comfy.utils
import folder_paths
import node_helpers
from comfy import accounting, media
from comfy_execution import writers
from utils import atomic_files, json_text

# formats whose further frames are not a sequence of pictures
SINGLE_FRAME_FORMATS = ("MPO",)
NO_MASK_SIZE = (64, 64)


def file_digest(path: str) -> str:
    """Hash of a file's content, to notice that it changed."""
    digest = node_helpers.hasher()()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def input_files(content_types: list[Any] | None = None, extension: str = "") -> list[str]:
    """Names of the files (not folders) in the input directory, sorted."""
    root = folder_paths.get_input_directory()
    names = os.listdir(root) if os.path.isdir(root) else []
    names = [
        name for name in names if not name.startswith(atomic_files.PREFIX) and os.path.isfile(os.path.join(root, name))
    ]
    if content_types:
        names = folder_paths.filter_files_content_types(names, content_types)
    return sorted(name for name in names if name.endswith(extension))


def open_picture(name: str) -> AbstractContextManager[Any]:
    """`with open_picture(name) as picture`: the Pillow image of an annotated name, within the limits of `media`.

    Raises FileNotFoundError with the name when there is none, ValueError when it lies outside its folder.
    """
    path = folder_paths.get_annotated_filepath(name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Invalid image file: {name} is not in the input folder; upload it or choose another")
    return media.open_picture(path, name)


def _upright(frame: Any) -> Any:
    """A frame turned as its camera says; 16-bit-in-32 grey brought to 8 bits."""
    from PIL import ImageOps

    frame = node_helpers.pillow(ImageOps.exif_transpose, frame)
    return frame.point(lambda value: value * (1 / 255)) if frame.mode == "I" else frame


def _floats(channel: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(channel).astype(np.float32) / 255.0)


def _transparency(frame: Any) -> torch.Tensor:
    """Mask [H, W] that is 1 where a frame is transparent; a small empty one when it is opaque."""
    if frame.mode == "P" and "transparency" in frame.info:
        frame = frame.convert("RGBA")
    if "A" in frame.getbands():
        return 1.0 - _floats(frame.getchannel("A"))
    return torch.zeros(NO_MASK_SIZE)


class LoadImage:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": (input_files(["image"]), {"image_upload": True})}}

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    CATEGORY = "image"

    def load_image(self, image: str):
        """All frames of the size of the first one, and their transparency."""
        from PIL import ImageSequence

        frames, masks = [], []
        size: tuple[int, int] | None = None
        with open_picture(image) as picture:
            for frame in ImageSequence.Iterator(picture):
                frame = _upright(frame)
                size = size or frame.size
                if frame.size != size:
                    continue
                frames.append(_floats(frame.convert("RGB")))
                masks.append(_transparency(frame))
                if picture.format in SINGLE_FRAME_FORMATS:
                    break
        return (torch.stack(frames), torch.stack(masks))

    @classmethod
    def IS_CHANGED(cls, image: str):
        return file_digest(folder_paths.get_annotated_filepath(image))

    @classmethod
    def VALIDATE_INPUTS(cls, image: str):
        return True if folder_paths.exists_annotated_filepath(image) else f"Invalid image file: {image}"


class LoadImageMask:
    _color_channels = ["alpha", "red", "green", "blue"]

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "image": (input_files(), {"image_upload": True}),
                "channel": (cls._color_channels,),
            }
        }

    RETURN_TYPES = ("MASK",)
    FUNCTION = "load_image"
    CATEGORY = "mask"

    def load_image(self, image: str, channel: str):
        """One channel as mask [1, H, W]; alpha is inverted: transparent is 1."""
        with open_picture(image) as opened:
            picture = _upright(opened)
            picture.load()
        band = channel[0].upper()
        if picture.getbands() != ("R", "G", "B", "A"):
            opaque = band == "A" and "A" not in picture.getbands() and "transparency" not in picture.info
            if opaque:
                return (torch.zeros((1, *NO_MASK_SIZE)),)
            picture = picture.convert("RGBA")
        values = _floats(picture.getchannel(band))
        return ((1.0 - values if band == "A" else values).unsqueeze(0),)

    @classmethod
    def IS_CHANGED(cls, image: str, channel: str):
        return file_digest(folder_paths.get_annotated_filepath(image))

    @classmethod
    def VALIDATE_INPUTS(cls, image: str):
        return True if folder_paths.exists_annotated_filepath(image) else f"Invalid image file: {image}"


class LoadImageOutput(LoadImage):
    @classmethod
    def INPUT_TYPES(cls):
        remote = {"route": "/internal/files/output", "refresh_button": True, "control_after_refresh": "first"}
        options = {"image_upload": True, "image_folder": "output", "remote": remote}
        return {"required": {"image": ("COMBO", options)}}

    DESCRIPTION = "Load an image from the output folder."
    EXPERIMENTAL = True
    FUNCTION = "load_image"


def metadata_texts(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:
    """What is written beside a result, as JSON texts by key; nothing with --disable-metadata."""
    from comfy.cli_args import args

    if args.disable_metadata:
        return {}
    texts = {} if prompt is None else {"prompt": json_text.dumps(prompt)}
    texts.update({key: json_text.dumps(value) for key, value in (extra_pnginfo or {}).items()})
    return texts


class SaveImage:
    @classmethod
    def INPUT_TYPES(cls):
        prefix = {"default": "ComfyUI", "tooltip": "Start of the file name; may hold %date:yyyy-MM-dd% and folders."}
        return {
            "required": {
                "images": ("IMAGE", {"tooltip": "The images to save."}),
                "filename_prefix": ("STRING", prefix),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    RETURN_TYPES = ()
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"
    DESCRIPTION = "Saves the input images to your ComfyUI output directory."

    def __init__(self) -> None:
        self.output_dir = folder_paths.get_output_directory()
        self.type = "output"
        self.prefix_append = ""
        self.compress_level = 4

    def save_images(
        self, images: torch.Tensor, filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ):
        """PNG files that carry prompt and workflow; `%batch_num%` in the name is the position in the batch.

        They are complete on return, except when the executor calls the node itself: see `writers`.
        """
        from PIL.PngImagePlugin import PngInfo

        with accounting.phase("save"):
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
                filename_prefix + self.prefix_append, self.output_dir, images[0].shape[1], images[0].shape[0]
            )
            info = PngInfo()
            for key, text in metadata_texts(prompt, extra_pnginfo).items():
                info.add_text(key, text)
            files, results = {}, []
            for position, image in enumerate(images):
                pixels = (255.0 * image.cpu().float().numpy()).clip(0, 255).astype(np.uint8)
                file = f"{name.replace('%batch_num%', str(position))}_{counter + position:05}_.png"
                files[os.path.join(folder, file)] = partial(_encode_png, pixels, info, self.compress_level)
                results.append({"filename": file, "subfolder": subfolder, "type": self.type})
            writers.write(self if _is_core_saver(type(self)) else None, files)
        return {"ui": {"images": results}}


def _encode_png(pixels: np.ndarray, info: Any, compress_level: int, file: Any) -> None:
    """Write uint8 pixels [H, W, C] as PNG."""
    from PIL import Image

    picture = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    picture.save(file, format="PNG", pnginfo=info, compress_level=compress_level)


class PreviewImage(SaveImage):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"images": ("IMAGE",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    DESCRIPTION = "Shows the input images in the page."

    def __init__(self) -> None:
        super().__init__()
        self.output_dir = folder_paths.get_temp_directory()
        self.type = "temp"
        # not from `random`, whose global state belongs to the nodes' seeds
        self.prefix_append = "_temp_" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(5))
        self.compress_level = 1


_save_images = SaveImage.save_images


def _is_core_saver(cls: type) -> bool:
    """Whether a class saves with our code only: a pack's subclass, or its replacement of the function, may read files."""
    return cls in (SaveImage, PreviewImage) and cls.save_images is _save_images


class SaveLatent:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "samples": ("LATENT",),
                "filename_prefix": ("STRING", {"default": "latents/ComfyUI"}),
            },
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "_for_testing"

    def __init__(self) -> None:
        self.output_dir = folder_paths.get_output_directory()

    def save(
        self, samples: dict[str, Any], filename_prefix: str = "ComfyUI", prompt: Any = None, extra_pnginfo: Any = None
    ):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, self.output_dir)
        file = f"{name}_{counter:05}_.latent"
        tensors = {"latent_tensor": samples["samples"].contiguous(), "latent_format_version_0": torch.tensor([])}
        metadata = metadata_texts(prompt, extra_pnginfo) or None
        comfy.utils.save_torch_file(tensors, os.path.join(folder, file), metadata=metadata)
        return {"ui": {"latents": [{"filename": file, "subfolder": subfolder, "type": "output"}]}}


class LoadLatent:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": (input_files(extension=".latent"),)}}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "load"
    CATEGORY = "_for_testing"

    def load(self, latent: str):
        """Files without a version mark hold latents scaled for SD 1."""
        import safetensors.torch

        path = folder_paths.get_annotated_filepath(latent)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"Invalid latent file: {latent} is not in the input folder; put it there")
        tensors = safetensors.torch.load_file(path, device="cpu")
        factor = 1.0 if "latent_format_version_0" in tensors else 1.0 / 0.18215
        return ({"samples": tensors["latent_tensor"].float() * factor},)

    @classmethod
    def IS_CHANGED(cls, latent: str):
        return file_digest(folder_paths.get_annotated_filepath(latent))

    @classmethod
    def VALIDATE_INPUTS(cls, latent: str):
        return True if folder_paths.exists_annotated_filepath(latent) else f"Invalid latent file: {latent}"


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        LoadImage,
        LoadImageMask,
        LoadImageOutput,
        SaveImage,
        PreviewImage,
        SaveLatent,
        LoadLatent,
    )
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
    "LoadImage": "Load Image",
    "LoadImageMask": "Load Image (as Mask)",
    "LoadImageOutput": "Load Image (from Outputs)",
}
