"""Reading, making and saving videos."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from typing import Any

import torch

import folder_paths
from comfy_api.input_impl import VideoFromComponents, VideoFromFile
from comfy_api.latest import io, ui
from comfy_api.util import VideoCodec, VideoComponents, VideoContainer
from comfy_nodes.files import input_files
from comfy_nodes.v3 import extension, share

VIDEO = "image/video"
WEBM_ENCODERS = {"vp9": ("libvpx-vp9", "yuv420p"), "av1": ("libsvtav1", "yuv420p10le")}


def _metadata(hidden: Any) -> dict[str, str]:
    from comfy_nodes.files import metadata_texts

    return metadata_texts(hidden.prompt, hidden.extra_pnginfo)


def _place(filename_prefix: str, width: int, height: int, extension: str) -> tuple[str, ui.SavedResult]:
    """Full path of the next video, and what the page is told about it."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory(), width, height
    )
    file = f"{name}_{counter:05}_.{extension}"
    return os.path.join(folder, file), ui.SavedResult(file, subfolder, io.FolderType.output)


class SaveWEBM(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaveWEBM",
            category=VIDEO,
            is_experimental=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images"),
                io.String.Input("filename_prefix", default="ComfyUI"),
                io.Combo.Input("codec", options=list(WEBM_ENCODERS)),
                share("fps", 24.0, 1000.0, 0.01),
                io.Float.Input("crf", default=32.0, min=0, max=63.0, step=1, tooltip="Higher is smaller and worse."),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, codec: str, fps: float, filename_prefix: str, crf: float):
        import av

        encoder, layout = WEBM_ENCODERS[codec]
        path, saved = _place(filename_prefix, images.shape[2], images.shape[1], "webm")
        options = {"crf": str(crf), **({"preset": "6"} if codec == "av1" else {})}
        with av.open(path, mode="w") as container:
            for key, text in _metadata(cls.hidden).items():
                container.metadata[key] = text
            stream = container.add_stream(encoder, rate=Fraction(round(fps * 1000), 1000), options=options)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = images.shape[2], images.shape[1], layout, 0
            for image in images:
                pixels = (image[..., :3] * 255).clamp(0, 255).byte().cpu().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return io.NodeOutput(ui=ui.PreviewVideo([saved]))

    save_images = execute


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaveVideo",
            display_name="Save Video",
            category=VIDEO,
            is_output_node=True,
            description="Saves the input video to your ComfyUI output directory.",
            inputs=[
                io.Video.Input("video"),
                io.String.Input("filename_prefix", default="video/ComfyUI"),
                io.Combo.Input("format", options=VideoContainer.as_input(), default="auto"),
                io.Combo.Input("codec", options=VideoCodec.as_input(), default="auto"),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, video: Any, filename_prefix: str, format: str, codec: str):
        path, saved = _place(filename_prefix, *video.get_dimensions(), VideoContainer.get_extension(format))
        metadata = {key: json.loads(text) for key, text in _metadata(cls.hidden).items()} or None
        video.save_to(path, format=VideoContainer(format), codec=VideoCodec(codec), metadata=metadata)
        return io.NodeOutput(ui=ui.PreviewVideo([saved]))

    save_video = execute


class CreateVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CreateVideo",
            display_name="Create Video",
            category=VIDEO,
            description="Create a video from images.",
            inputs=[
                io.Image.Input("images"),
                share("fps", 30.0, 120.0, 1.0, 1.0),
                io.Audio.Input("audio", optional=True),
            ],
            outputs=[io.Video.Output()],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, fps: float, audio: Any = None):
        return io.NodeOutput(VideoFromComponents(VideoComponents(images=images, frame_rate=Fraction(fps), audio=audio)))

    create_video = execute


class GetVideoComponents(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="GetVideoComponents",
            display_name="Get Video Components",
            category=VIDEO,
            description="Extracts all components from a video: frames, audio, and framerate.",
            inputs=[io.Video.Input("video")],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Audio.Output(display_name="audio"),
                io.Float.Output(display_name="fps"),
            ],
        )

    @classmethod
    def execute(cls, video: Any):
        parts = video.get_components()
        return io.NodeOutput(parts.images, parts.audio, float(parts.frame_rate))

    get_components = execute


class LoadVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadVideo",
            display_name="Load Video",
            category=VIDEO,
            inputs=[io.Combo.Input("file", options=input_files(["video"]), upload=io.UploadType.video)],
            outputs=[io.Video.Output()],
        )

    @classmethod
    def execute(cls, file: str):
        return io.NodeOutput(VideoFromFile(folder_paths.get_annotated_filepath(file)))

    @classmethod
    def fingerprint_inputs(cls, file: str):
        return os.path.getmtime(folder_paths.get_annotated_filepath(file))

    @classmethod
    def validate_inputs(cls, file: str):
        return True if folder_paths.exists_annotated_filepath(file) else f"Invalid video file: {file}"

    load_video = execute


def trimmed(parts: VideoComponents, start_time: float, duration: float) -> VideoComponents:
    """Frames and sound from `start_time` on (from the end when negative), for `duration` seconds (0: all)."""
    rate, total = float(parts.frame_rate), parts.images.shape[0]
    start = round(start_time * rate) + (total if start_time < 0 else 0)
    start = max(0, start)
    end = total if duration == 0 else min(total, start + round(duration * rate))
    audio = parts.audio
    if audio is not None:
        first, last = (round(frame / rate * audio["sample_rate"]) for frame in (start, end))
        audio = {**audio, "waveform": audio["waveform"][..., first:last]}
    return VideoComponents(parts.images[start:end], parts.frame_rate, audio, parts.metadata)


class VideoSlice(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        times = [
            share("start_time", 0.0, 1e5, -1e5, 0.001, tooltip="In seconds; below 0 from the end."),
            io.Float.Input("duration", default=0.0, min=0.0, step=0.001, tooltip="In seconds; 0 for all that is left."),
        ]
        return io.Schema(
            node_id="Video Slice",
            display_name="Video Slice",
            category=VIDEO,
            inputs=[
                io.Video.Input("video"),
                *times,
                io.Boolean.Input("strict_duration", default=False, tooltip="Fail when the video is too short."),
            ],
            outputs=[io.Video.Output()],
        )

    @classmethod
    def execute(cls, video: Any, start_time: float, duration: float, strict_duration: bool):
        whole = video.get_components()
        parts = trimmed(whole, start_time, duration)
        seconds = parts.images.shape[0] / float(parts.frame_rate)
        short = strict_duration and duration - seconds > 0.5 / float(parts.frame_rate)
        if parts.images.shape[0] == 0 or short:
            raise ValueError(
                f"the video lasts {whole.images.shape[0] / float(whole.frame_rate):.3f} s, so from {start_time} s on it has "
                f"{seconds:.3f} s, not {duration} s; use an earlier start or a shorter duration"
            )
        return io.NodeOutput(VideoFromComponents(parts))


comfy_entrypoint = extension(SaveWEBM, SaveVideo, CreateVideo, GetVideoComponents, LoadVideo, VideoSlice)
