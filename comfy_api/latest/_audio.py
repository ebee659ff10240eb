"""Sounds: reading and writing files with PyAV, and other sample rates."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from comfy import media

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 8: "7.1"}
CODECS = {"flac": "flac", "mp3": "libmp3lame", "opus": "libopus"}
BIT_RATES = {"64k": 64_000, "96k": 96_000, "128k": 128_000, "192k": 192_000, "256k": 256_000, "320k": 320_000}


def resample(waveform: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """[..., samples] at another sample rate, by a polyphase filter on the CPU."""
    if rate == new_rate:
        return waveform
    from scipy.signal import resample_poly

    common = math.gcd(rate, new_rate)
    samples = resample_poly(waveform.float().cpu().numpy(), new_rate // common, rate // common, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)).to(waveform.device)


def read_audio(path: Any) -> tuple[torch.Tensor, int]:
    """Samples [channels, n] in -1..1 of a file's first sound, and its rate. Raises ValueError when it has none."""
    import av

    taken = media.DecodedBytes(path)
    with media.open_container(path) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} holds no sound; choose another file")
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="fltp")
        frames = []
        for frame in container.decode(stream):
            taken.take(sound_bytes(frame))
            frames += resampler.resample(frame)
        frames += resampler.resample(None) if frames else []
        rate = int(stream.codec_context.sample_rate)
    if not frames:
        raise ValueError(f"the sound of {path} is empty; choose another file")
    return torch.from_numpy(np.concatenate([frame.to_ndarray() for frame in frames], axis=1)), rate


def sound_bytes(frame: Any) -> int:
    """Bytes of a frame of sound as float32."""
    return 4 * int(frame.samples) * len(frame.layout.channels)


def audio_of(path: Any) -> dict[str, Any]:
    """A file's sound as nodes pass it."""
    waveform, rate = read_audio(path)
    return {"waveform": waveform.unsqueeze(0), "sample_rate": rate}


def _rate_for(format: str, rate: int) -> int:
    if format != "opus":
        return rate
    return next((allowed for allowed in OPUS_RATES if allowed >= rate), OPUS_RATES[-1])


def write_audio(
    path: Any,
    waveform: torch.Tensor,
    rate: int,
    format: str,
    quality: str = "128k",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write samples [channels, n] as flac, mp3 or opus; `quality` is a bit rate, or V0 (mp3's best variable one)."""
    import av

    if format not in CODECS:
        raise ValueError(f"sounds cannot be written as {format!r}; choose one of {', '.join(CODECS)}")
    if waveform.shape[0] not in LAYOUTS:
        raise ValueError(f"a sound of {waveform.shape[0]} channels cannot be written; mix it down to two")
    new_rate, layout = _rate_for(format, rate), LAYOUTS[waveform.shape[0]]
    samples = resample(waveform.float().cpu(), rate, new_rate)
    with av.open(path, mode="w", format=format) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(CODECS[format], rate=new_rate, layout=layout)
        if format == "mp3" and quality == "V0":
            stream.codec_context.qscale = 1
        elif format != "flac":
            stream.bit_rate = BIT_RATES[quality]
        interleaved = np.ascontiguousarray(samples.T.reshape(1, -1).numpy())
        frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
        frame.sample_rate, frame.pts = new_rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def save_audio(
    audio: Mapping[str, Any],
    filename_prefix: str,
    folder_type: Any,
    format: str,
    quality: str,
    metadata: Mapping[str, str] | None,
) -> list[Any]:
    """One file per sound of the batch, in the output or temp folder; what the page is told of them."""
    import folder_paths
    from comfy_api.latest._types import FolderType
    from comfy_api.latest.ui import SavedResult

    kind = FolderType(folder_type)
    root = folder_paths.get_directory_by_type(kind.value)
    assert root is not None
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, root)
    results = []
    for position, waveform in enumerate(audio["waveform"]):
        file = f"{name.replace('%batch_num%', str(position))}_{counter + position:05}_.{format}"
        write_audio(os.path.join(folder, file), waveform, audio["sample_rate"], format, quality, metadata)
        results.append(SavedResult(file, subfolder, kind))
    return results
