"""Reading and writing videos with PyAV."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from comfy import media
from comfy_api.input import VideoInput
from comfy_api.latest._audio import sound_bytes
from comfy_api.util import VideoCodec, VideoComponents, VideoContainer

H264_CRF = "23"


def _check(format: VideoContainer | str, codec: VideoCodec | str) -> None:
    if VideoContainer(format) not in (VideoContainer.AUTO, VideoContainer.MP4):
        raise ValueError(f"videos can be written as mp4 only, not {format}")
    if VideoCodec(codec) not in (VideoCodec.AUTO, VideoCodec.H264):
        raise ValueError(f"videos can be encoded as h264 only, not {codec}")


def container_to_output_format(container_format: str | None) -> str | None:
    """One format to write with, of the several that a container's header may stand for (`mov,mp4,m4a`).

    None, for the writer to choose by the file's name, where there is none.
    """
    return (container_format or "").partition(",")[0] or None


class VideoFromFile(VideoInput):
    """A video in a file or buffer."""

    def __init__(self, file: str | io.BytesIO) -> None:
        self._file = file

    def get_stream_source(self) -> str | io.BytesIO:
        if isinstance(self._file, io.BytesIO):
            self._file.seek(0)
        return self._file

    def _open(self) -> Any:
        return media.open_container(self.get_stream_source())

    def get_dimensions(self) -> tuple[int, int]:
        with self._open() as container:
            for stream in container.streams.video:
                return stream.width, stream.height
        raise ValueError(f"{self._file} holds no video")

    def get_components(self) -> VideoComponents:
        """Raises MediaError for a video larger than the limits."""
        import av

        taken = media.DecodedBytes(self._file)
        with self._open() as container:
            if not container.streams.video:
                raise ValueError(f"{self._file} holds no video")
            stream = container.streams.video[0]
            rate = Fraction(stream.average_rate) if stream.average_rate else Fraction(1)
            taken.declared(stream.frames, stream.width, stream.height)
            frames = []
            for frame in container.decode(stream):
                taken.frame(frame.width, frame.height)
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")).float() / 255.0)
            metadata = dict(container.metadata)
        images = torch.stack(frames) if frames else torch.zeros(0, 3, 0, 0)
        with self._open() as container:
            audio = None
            if container.streams.audio:
                stream = container.streams.audio[0]
                resampler = av.AudioResampler(format="fltp")
                parts = []
                for frame in container.decode(stream):
                    taken.take(sound_bytes(frame))
                    parts += [part.to_ndarray() for part in resampler.resample(frame)]
                if parts:
                    waveform = torch.from_numpy(np.concatenate(parts, axis=1)).unsqueeze(0)
                    audio = {"waveform": waveform, "sample_rate": int(stream.sample_rate)}
        return VideoComponents(images=images, frame_rate=rate, audio=audio, metadata=metadata)

    def save_to(
        self,
        path: str | io.BytesIO,
        format: VideoContainer = VideoContainer.AUTO,
        codec: VideoCodec = VideoCodec.AUTO,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Copied stream by stream when that gives what is asked for, else encoded again."""
        import av

        _check(format, codec)
        with self._open() as source:
            same_codec = VideoCodec(codec) is VideoCodec.AUTO or all(
                stream.codec.name == VideoCodec(codec).value for stream in source.streams.video
            )
            if not same_codec or "mp4" not in source.format.name.split(","):
                VideoFromComponents(self.get_components()).save_to(path, format, codec, metadata)
                return
            with av.open(path, mode="w", format="mp4", options={"movflags": "use_metadata_tags"}) as target:
                target.metadata.update(source.metadata)
                _add_metadata(target, metadata)
                streams = {
                    stream: target.add_stream_from_template(stream)
                    for stream in source.streams
                    if stream.type in ("video", "audio", "subtitle")
                }
                for packet in source.demux(*streams):
                    if packet.dts is not None:
                        packet.stream = streams[packet.stream]
                        target.mux(packet)


def _add_metadata(container: Any, metadata: dict[str, Any] | None) -> None:
    for key, value in (metadata or {}).items():
        container.metadata[key] = value if isinstance(value, str) else json.dumps(value)


class VideoFromComponents(VideoInput):
    """A video in memory."""

    def __init__(self, components: VideoComponents) -> None:
        self._components = components

    def get_components(self) -> VideoComponents:
        return self._components

    def save_to(
        self,
        path: str | io.BytesIO,
        format: VideoContainer = VideoContainer.AUTO,
        codec: VideoCodec = VideoCodec.AUTO,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """H.264 (and AAC) in mp4; odd sizes are cut to even ones, as H.264 needs."""
        import av

        _check(format, codec)
        parts = self._components
        height, width = (side // 2 * 2 for side in parts.images.shape[1:3])
        with av.open(path, mode="w", format="mp4", options={"movflags": "use_metadata_tags"}) as target:
            _add_metadata(target, metadata)
            rate = Fraction(parts.frame_rate).limit_denominator(1000)
            video = target.add_stream("h264", rate=rate, options={"crf": H264_CRF})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            sound = _sound(parts, rate)
            audio = target.add_stream("aac", rate=sound[1], layout=sound[2]) if sound else None
            for image in parts.images:
                pixels = (image[:height, :width, :3] * 255).clamp(0, 255).byte().cpu().numpy()
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                target.mux(video.encode(frame.reformat(format="yuv420p")))
            target.mux(video.encode(None))
            if audio is not None and sound is not None:
                samples = av.AudioFrame.from_ndarray(sound[0], format="fltp", layout=sound[2])
                samples.sample_rate, samples.pts = sound[1], 0
                target.mux(audio.encode(samples))
                target.mux(audio.encode(None))


def _sound(parts: VideoComponents, rate: Fraction) -> tuple[Any, int, str] | None:
    """Samples [channels, n] cut to the video's length, sample rate and channel layout."""
    if not parts.audio:
        return None
    sample_rate = int(parts.audio["sample_rate"])
    length = int(sample_rate / rate * parts.images.shape[0])
    waveform = parts.audio["waveform"][0, :, :length].float().cpu()
    if waveform.shape[0] == 1:
        return np.ascontiguousarray(waveform.numpy()), sample_rate, "mono"
    if waveform.shape[0] != 2:
        waveform = waveform.mean(0, keepdim=True).expand(2, -1)
    return np.ascontiguousarray(waveform.numpy()), sample_rate, "stereo"
