"""What V3 nodes show in the page: `io.NodeOutput(ui=ui.PreviewImage(images, cls=cls))`."""

from __future__ import annotations

import json
import os
import secrets
from functools import partial
from typing import Any

import torch

import folder_paths
from comfy_api.latest._types import FolderType
from comfy_execution import writers


class SavedResult(dict[str, Any]):
    """A file that was written: filename, sub-folder and directory (output, temp or input)."""

    def __init__(self, filename: str, subfolder: str, type: FolderType | str) -> None:
        kind = type.value if isinstance(type, FolderType) else type
        super().__init__(filename=filename, subfolder=subfolder, type=kind)

    @property
    def filename(self) -> str:
        return self["filename"]

    @property
    def subfolder(self) -> str:
        return self["subfolder"]

    @property
    def type(self) -> FolderType:
        return FolderType(self["type"])


class _UIOutput:
    def as_dict(self) -> dict[str, Any]:
        """The ui in the form V1 nodes return it."""
        raise NotImplementedError


class SavedImages(_UIOutput):
    """Pictures already written; `is_animated` for moving ones."""

    def __init__(self, results: list[SavedResult], is_animated: bool = False) -> None:
        self.results = results
        self.is_animated = is_animated

    def as_dict(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"images": list(self.results)}
        if self.is_animated:
            shown["animated"] = (True,)
        return shown


class SavedAudios(_UIOutput):
    """Sounds already written."""

    def __init__(self, results: list[SavedResult]) -> None:
        self.results = results

    def as_dict(self) -> dict[str, Any]:
        return {"audio": list(self.results)}


class AudioSaveHelper:
    """Writes sounds {waveform [B, C, samples], sample_rate} for a node class `cls`, with its prompt and workflow."""

    @staticmethod
    def save_audio(
        audio: dict[str, Any],
        filename_prefix: str,
        folder_type: FolderType,
        cls: Any = None,
        format: str = "flac",
        quality: str = "128k",
    ) -> list[SavedResult]:
        """One file per sound: flac, mp3 or opus."""
        from comfy_api.latest import _audio

        return _audio.save_audio(audio, filename_prefix, folder_type, format, quality, ImageSaveHelper._texts(cls))

    @classmethod
    def get_save_audio_ui(
        cls_, audio: dict[str, Any], filename_prefix: str, cls: Any = None, format: str = "flac", quality: str = "128k"
    ) -> SavedAudios:
        return SavedAudios(cls_.save_audio(audio, filename_prefix, FolderType.output, cls, format, quality))


class ImageSaveHelper:
    """Writes images [B, H, W, C] in 0..1 for a node class `cls`, whose hidden prompt and workflow go into the file."""

    @staticmethod
    def _texts(cls: Any) -> dict[str, str]:
        from comfy.cli_args import args

        if args.disable_metadata or cls is None or not getattr(cls, "hidden", None):
            return {}
        texts = {} if cls.hidden.prompt is None else {"prompt": json.dumps(cls.hidden.prompt)}
        for key, value in (cls.hidden.extra_pnginfo or {}).items():
            texts[key] = json.dumps(value)
        return texts

    @staticmethod
    def _pictures(images: torch.Tensor) -> list[Any]:
        import numpy as np
        from PIL import Image

        levels = (images.cpu().float().numpy() * 255.0).clip(0, 255).astype(np.uint8)
        return [Image.fromarray(level) for level in levels]

    @staticmethod
    def _place(filename_prefix: str, folder_type: FolderType, images: torch.Tensor) -> tuple[str, str, int, str]:
        root = folder_paths.get_directory_by_type(FolderType(folder_type).value)
        assert root is not None
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, root, images[0].shape[1], images[0].shape[0]
        )
        return folder, name, counter, subfolder

    @classmethod
    def save_images(
        cls_,
        images: torch.Tensor,
        filename_prefix: str,
        folder_type: FolderType,
        cls: Any = None,
        compress_level: int = 4,
    ) -> list[SavedResult]:
        """One PNG per image."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, text in cls_._texts(cls).items():
            info.add_text(key, text)
        folder, name, counter, subfolder = cls_._place(filename_prefix, folder_type, images)
        files, results = {}, []
        for position, picture in enumerate(cls_._pictures(images)):
            file = f"{name.replace('%batch_num%', str(position))}_{counter + position:05}_.png"
            save = partial(picture.save, format="PNG", pnginfo=info, compress_level=compress_level)
            files[os.path.join(folder, file)] = save
            results.append(SavedResult(file, subfolder, folder_type))
        writers.write(None, files)
        return results

    @classmethod
    def get_save_images_ui(
        cls_, images: torch.Tensor, filename_prefix: str, cls: Any = None, compress_level: int = 4
    ) -> SavedImages:
        return SavedImages(cls_.save_images(images, filename_prefix, FolderType.output, cls, compress_level))

    @classmethod
    def save_animated_webp(
        cls_,
        images: torch.Tensor,
        filename_prefix: str,
        folder_type: FolderType,
        cls: Any = None,
        fps: float = 6.0,
        lossless: bool = True,
        quality: int = 80,
        method: int = 4,
    ) -> SavedResult:
        """All images as frames of one webp; the texts go into EXIF tags, as ComfyUI writes them."""
        pictures = cls_._pictures(images)
        exif = pictures[0].getexif()
        texts = cls_._texts(cls)
        if "prompt" in texts:
            exif[0x0110] = f"prompt:{texts.pop('prompt')}"
        for tag, (key, text) in zip(range(0x010F, 0, -1), texts.items(), strict=False):
            exif[tag] = f"{key}:{text}"
        folder, name, counter, subfolder = cls_._place(filename_prefix, folder_type, images)
        file = f"{name}_{counter:05}_.webp"
        pictures[0].save(
            os.path.join(folder, file),
            save_all=True,
            duration=int(1000.0 / fps),
            append_images=pictures[1:],
            exif=exif,
            lossless=lossless,
            quality=quality,
            method=method,
        )
        return SavedResult(file, subfolder, folder_type)

    @classmethod
    def save_animated_png(
        cls_,
        images: torch.Tensor,
        filename_prefix: str,
        folder_type: FolderType,
        cls: Any = None,
        fps: float = 6.0,
        compress_level: int = 4,
    ) -> SavedResult:
        """All images as frames of one PNG; the texts go into `comf` chunks after the first frame."""
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, text in cls_._texts(cls).items():
            data = key.encode("latin-1", "strict") + b"\0" + text.encode("latin-1", "backslashreplace")
            info.add(b"comf", data, after_idat=True)
        pictures = cls_._pictures(images)
        folder, name, counter, subfolder = cls_._place(filename_prefix, folder_type, images)
        file = f"{name}_{counter:05}_.png"
        pictures[0].save(
            os.path.join(folder, file),
            pnginfo=info,
            compress_level=compress_level,
            save_all=True,
            duration=int(1000.0 / fps),
            append_images=pictures[1:],
        )
        return SavedResult(file, subfolder, folder_type)

    @classmethod
    def get_save_animated_webp_ui(
        cls_,
        images: torch.Tensor,
        filename_prefix: str,
        cls: Any = None,
        fps: float = 6.0,
        lossless: bool = True,
        quality: int = 80,
        method: int = 4,
    ) -> SavedImages:
        result = cls_.save_animated_webp(
            images, filename_prefix, FolderType.output, cls, fps, lossless, quality, method
        )
        return SavedImages([result], is_animated=True)

    @classmethod
    def get_save_animated_png_ui(
        cls_, images: torch.Tensor, filename_prefix: str, cls: Any = None, fps: float = 6.0, compress_level: int = 4
    ) -> SavedImages:
        result = cls_.save_animated_png(images, filename_prefix, FolderType.output, cls, fps, compress_level)
        return SavedImages([result], is_animated=True)


class PreviewImage(_UIOutput):
    """Shows images; they are written to the temp directory."""

    def __init__(self, image: torch.Tensor, animated: bool = False, cls: Any = None, **more: Any) -> None:
        prefix = "ComfyUI_temp_" + secrets.token_hex(3)
        self.values = ImageSaveHelper.save_images(image, prefix, FolderType.temp, cls, compress_level=1)
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (self.animated,)}


class PreviewMask(PreviewImage):
    """Shows a mask [B, H, W] in grey."""

    def __init__(self, mask: torch.Tensor, animated: bool = False, cls: Any = None, **more: Any) -> None:
        grey = mask.reshape((-1, 1, mask.shape[-2], mask.shape[-1])).movedim(1, -1).expand(-1, -1, -1, 3)
        super().__init__(grey, animated, cls, **more)


class PreviewAudio(_UIOutput):
    """Lets sounds be heard; they are written to the temp directory."""

    def __init__(self, audio: dict[str, Any], cls: Any = None, **more: Any) -> None:
        prefix = "ComfyUI_temp_" + secrets.token_hex(3)
        self.values = AudioSaveHelper.save_audio(audio, prefix, FolderType.temp, cls)

    def as_dict(self) -> dict[str, Any]:
        return {"audio": self.values}


class PreviewVideo(_UIOutput):
    """Shows videos already written."""

    def __init__(self, values: list[SavedResult], **more: Any) -> None:
        self.values = values

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (True,)}


class PreviewText(_UIOutput):
    """Shows a text."""

    def __init__(self, value: str, **more: Any) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}


class PreviewUI3D(_UIOutput):
    """Shows a 3D model file, seen by a camera."""

    def __init__(self, model_file: str, camera_info: Any = None, **more: Any) -> None:
        self.model_file = model_file
        self.camera_info = camera_info

    def as_dict(self) -> dict[str, Any]:
        return {"result": [self.model_file, self.camera_info]}
