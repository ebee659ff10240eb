"""Saving pictures and sounds in several formats, and comparing pictures in the page."""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import numpy as np
import torch

import folder_paths
from comfy_api.latest import io, ui
from comfy_nodes.files import metadata_texts
from comfy_nodes.v3 import extension

Audio = dict[str, Any]
PNG_HEADER_END = 33  # signature and IHDR
# display value -> light, IEC 61966-2-1
SRGB_KNEE, SRGB_SLOPE, SRGB_OFFSET, SRGB_POWER = 0.04045, 12.92, 0.055, 2.4


def png_16_bit(pixels: np.ndarray, texts: dict[str, str]) -> bytes:
    """A PNG of [H, W, 3 or 4] in 0..1 with 16 bits per channel, which Pillow cannot write."""
    kind = "rgb48be" if pixels.shape[-1] == 3 else "rgba64be"
    data = _encoded((pixels * 65535).round().clip(0, 65535).astype(np.uint16), "png", kind)
    chunks = b""
    for key, text in texts.items():
        body = b"tEXt" + key.encode("latin-1") + b"\0" + text.encode("latin-1", "backslashreplace")
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:PNG_HEADER_END] + chunks + data[PNG_HEADER_END:]


def _encoded(pixels: np.ndarray, codec: str, kind: str) -> bytes:
    """One picture through a codec of PyAV."""
    from fractions import Fraction

    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kind)
    frame.pts, frame.time_base = 0, Fraction(1, 1)
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = pixels.shape[:2]
    context.pix_fmt, context.time_base = kind, Fraction(1, 1)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def to_light(pixels: np.ndarray) -> np.ndarray:
    """Display values (sRGB) -> linear light."""
    dark = pixels / SRGB_SLOPE
    bright = ((np.maximum(pixels, 0) + SRGB_OFFSET) / (1 + SRGB_OFFSET)) ** SRGB_POWER
    return np.where(pixels <= SRGB_KNEE, dark, bright)


def exr_32_bit(pixels: np.ndarray, color_space: str) -> bytes:
    """An OpenEXR file of [H, W, 3] in linear light, with 32 bit floats."""
    light = to_light(pixels) if color_space == "sRGB" else pixels
    return _encoded(light[..., :3].astype(np.float32), "exr", "gbrpf32le")


class SaveImageAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def bits(*options: str) -> Any:
            return io.Combo.Input("bit_depth", options=list(options), default=options[0], advanced=True)

        def space(*options: str) -> Any:
            return io.Combo.Input("input_color_space", options=list(options), default=options[0], advanced=True)

        formats = [
            io.DynamicCombo.Option("png", [bits("8-bit", "16-bit"), space("sRGB")]),
            io.DynamicCombo.Option("exr", [bits("32-bit float"), space("sRGB", "linear")]),
        ]
        return io.Schema(
            node_id="SaveImageAdvanced",
            display_name="Save Image (Advanced)",
            category="image",
            is_output_node=True,
            description="Saves pictures as PNG of 8 or 16 bits, or as OpenEXR.",
            inputs=[
                io.Image.Input("images"),
                io.String.Input("filename_prefix", default="ComfyUI"),
                io.DynamicCombo.Input("format", options=formats),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, filename_prefix: str, format: dict[str, Any]):
        kind = format["format"]
        if kind == "png" and format["bit_depth"] == "8-bit":
            shown = ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls)
            return io.NodeOutput(images, ui=shown)
        texts = metadata_texts(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), images.shape[2], images.shape[1]
        )
        results = []
        for position, image in enumerate(images.cpu().float().numpy()):
            data = png_16_bit(image, texts) if kind == "png" else exr_32_bit(image, format["input_color_space"])
            file = f"{name.replace('%batch_num%', str(position))}_{counter + position:05}_.{kind}"
            with open(os.path.join(folder, file), "wb") as stream:
                stream.write(data)
            results.append(ui.SavedResult(file, subfolder, io.FolderType.output))
        return io.NodeOutput(images, ui=ui.SavedImages(results))


class SaveAudioAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        def quality(*options: str, default: str) -> list[Any]:
            return [io.Combo.Input("quality", options=list(options), default=default)]

        formats = [
            io.DynamicCombo.Option("flac", []),
            io.DynamicCombo.Option("mp3", quality("V0", "128k", "320k", default="V0")),
            io.DynamicCombo.Option("opus", quality("64k", "96k", "128k", "192k", "320k", default="128k")),
        ]
        return io.Schema(
            node_id="SaveAudioAdvanced",
            display_name="Save Audio (Advanced)",
            category="audio",
            is_output_node=True,
            description="Saves a sound as flac, mp3 or opus.",
            inputs=[
                io.Audio.Input("audio"),
                io.String.Input("filename_prefix", default="audio/ComfyUI"),
                io.DynamicCombo.Input("format", options=formats),
            ],
            outputs=[io.Audio.Output(display_name="audio")],
        )

    @classmethod
    def execute(cls, audio: Audio, filename_prefix: str, format: dict[str, Any]):
        quality = format.get("quality", "128k")
        shown = ui.AudioSaveHelper.get_save_audio_ui(audio, filename_prefix, cls, format["format"], quality)
        return io.NodeOutput(audio, ui=shown)


class ImageCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ImageCompare",
            display_name="Image Compare",
            category="image",
            is_experimental=True,
            is_output_node=True,
            description="Shows two pictures with a slider between them.",
            inputs=[
                io.Image.Input("image_a", optional=True),
                io.Image.Input("image_b", optional=True),
                io.ImageCompare.Input("compare_view", optional=True),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, image_a: Any = None, image_b: Any = None, compare_view: Any = None):
        pictures = {"a_images": image_a, "b_images": image_b}
        return io.NodeOutput(
            ui={
                name: [] if images is None or len(images) == 0 else ui.PreviewImage(images, cls=cls).values
                for name, images in pictures.items()
            }
        )


comfy_entrypoint = extension(SaveImageAdvanced, SaveAudioAdvanced, ImageCompare)
