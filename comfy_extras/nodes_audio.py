"""Sounds: {waveform [B, C, samples] in -1..1, sample_rate}."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

import comfy.model_management
import folder_paths
import node_helpers
from comfy_api.latest import io, ui
from comfy_api.latest._audio import audio_of, resample, save_audio
from comfy_nodes.fields import number, whole
from comfy_nodes.files import file_digest, input_files, metadata_texts

Audio = dict[str, Any]
LATENT_RATE = 44100
LATENT_STEP = 2048
LATENT_CHANNELS = 64
LONGEST = 0xFFFFFFFFFFFFFFFF


class _AudioNode:
    CATEGORY = "audio"
    RETURN_TYPES: tuple[str, ...] = ("AUDIO",)
    FUNCTION = "run"


# ---- latents ---------------------------------------------------------------------------------------------------------


class EmptyLatentAudio(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seconds": number(47.6, 1.0, 1000.0, 0.1),
                "batch_size": whole(1, 1, 4096, tooltip="How many are made at once."),
            }
        }

    RETURN_TYPES = ("LATENT",)
    CATEGORY = "latent/audio"

    def run(self, seconds: float, batch_size: int):
        length = round(seconds * LATENT_RATE / LATENT_STEP / 2) * 2
        device = comfy.model_management.intermediate_device()
        return ({"samples": torch.zeros(batch_size, LATENT_CHANNELS, length, device=device), "type": "audio"},)


class VAEEncodeAudio(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"audio": ("AUDIO",), "vae": ("VAE",)}}

    RETURN_TYPES = ("LATENT",)
    CATEGORY = "latent/audio"

    def run(self, vae: Any, audio: Audio):
        rate = getattr(vae, "audio_sample_rate", LATENT_RATE)
        waveform = resample(audio["waveform"], audio["sample_rate"], rate)
        return ({"samples": vae.encode(waveform.movedim(1, -1))},)


class VAEDecodeAudio(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}}

    CATEGORY = "latent/audio"

    def run(self, vae: Any, samples: dict[str, Any]):
        """Made quieter where it is loud: five standard deviations are at most 1."""
        waveform = vae.decode(samples["samples"]).movedim(-1, 1)
        loudness = (waveform.std(dim=(1, 2), keepdim=True) * 5.0).clamp(min=1.0)
        return ({"waveform": waveform / loudness, "sample_rate": getattr(vae, "audio_sample_rate", LATENT_RATE)},)


class ConditioningStableAudio:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "seconds_start": number(0.0, 0.0, 1000.0, 0.1),
                "seconds_total": number(47.0, 0.0, 1000.0, 0.1),
            }
        }

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "append"
    CATEGORY = "conditioning"

    def append(self, positive: Any, negative: Any, seconds_start: float, seconds_total: float):
        times = {"seconds_start": seconds_start, "seconds_total": seconds_total}
        return tuple(node_helpers.conditioning_set_values(cond, times) for cond in (positive, negative))


# ---- files -----------------------------------------------------------------------------------------------------------


class SaveAudio(_AudioNode):
    FORMAT = "flac"
    QUALITIES: tuple[str, ...] = ()
    DEFAULT = "128k"

    @classmethod
    def INPUT_TYPES(cls):
        required: dict[str, Any] = {
            "audio": ("AUDIO",),
            "filename_prefix": ("STRING", {"default": "audio/ComfyUI"}),
        }
        if cls.QUALITIES:
            required["quality"] = (list(cls.QUALITIES), {"default": cls.DEFAULT})
        return {"required": required, "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FOLDER = io.FolderType.output

    def run(
        self,
        audio: Audio,
        filename_prefix: str = "ComfyUI",
        quality: str = "128k",
        prompt: Any = None,
        extra_pnginfo: Any = None,
    ):
        texts = metadata_texts(prompt, extra_pnginfo)
        return {"ui": {"audio": save_audio(audio, filename_prefix, self.FOLDER, self.FORMAT, quality, texts)}}


class SaveAudioMP3(SaveAudio):
    FORMAT, QUALITIES, DEFAULT = "mp3", ("V0", "128k", "320k"), "V0"


class SaveAudioOpus(SaveAudio):
    FORMAT, QUALITIES = "opus", ("64k", "96k", "128k", "192k", "320k")


class PreviewAudio(SaveAudio):
    FOLDER = io.FolderType.temp

    @classmethod
    def INPUT_TYPES(cls):
        hidden = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
        return {"required": {"audio": ("AUDIO",)}, "hidden": hidden}

    def run(self, audio: Audio, prompt: Any = None, extra_pnginfo: Any = None):
        return {"ui": ui.PreviewAudio(audio).as_dict()}


class LoadAudio(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"audio": (input_files(["audio", "video"]), {"audio_upload": True})}}

    def run(self, audio: str):
        path = folder_paths.get_annotated_filepath(audio)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"Invalid audio file: {audio} is not in the input folder; upload it again")
        return (audio_of(path),)

    @classmethod
    def IS_CHANGED(cls, audio: str):
        return file_digest(folder_paths.get_annotated_filepath(audio))

    @classmethod
    def VALIDATE_INPUTS(cls, audio: str):
        return True if folder_paths.exists_annotated_filepath(audio) else f"Invalid audio file: {audio}"


class RecordAudio(LoadAudio):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"audio": ("AUDIO_RECORD", {})}}


# ---- changing sounds -------------------------------------------------------------------------------------------------


class TrimAudioDuration(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        start = {
            "default": 0.0,
            "min": -LONGEST,
            "max": LONGEST,
            "step": 0.01,
            "tooltip": "In seconds; below 0 from the end.",
        }
        return {
            "required": {
                "audio": ("AUDIO",),
                "start_index": ("FLOAT", start),
                "duration": ("FLOAT", {"default": 60.0, "min": 0.0, "step": 0.01, "tooltip": "In seconds."}),
            }
        }

    DESCRIPTION = "Trim audio tensor into chosen time range."

    def run(self, audio: Audio, start_index: float, duration: float):
        rate, length = audio["sample_rate"], audio["waveform"].shape[-1]
        start = round(start_index * rate) + (length if start_index < 0 else 0)
        start = max(0, min(start, length - 1))
        end = min(start + round(duration * rate), length)
        if start >= end:
            raise ValueError(
                f"nothing is left of {length / rate:.2f} s of sound from {start_index} s on for {duration} s; use a "
                "longer duration"
            )
        return ({"waveform": audio["waveform"][..., start:end], "sample_rate": rate},)


class SplitAudioChannels(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"audio": ("AUDIO",)}}

    RETURN_TYPES = ("AUDIO", "AUDIO")
    RETURN_NAMES = ("left", "right")
    DESCRIPTION = "Separates the audio into left and right channels."

    def run(self, audio: Audio):
        waveform = audio["waveform"]
        if waveform.shape[1] != 2:
            raise ValueError(f"the sound has {waveform.shape[1]} channel(s), but left and right need two")
        return tuple({**audio, "waveform": channel} for channel in waveform.split(1, dim=1))


def same_rate(first: Audio, second: Audio) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both waveforms at the higher of their rates."""
    rate = max(first["sample_rate"], second["sample_rate"])
    waveforms = [resample(audio["waveform"], audio["sample_rate"], rate) for audio in (first, second)]
    return waveforms[0], waveforms[1], rate


class AudioConcat(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        side = (["after", "before"], {"default": "after", "tooltip": "Where the second sound goes."})
        return {"required": {"audio1": ("AUDIO",), "audio2": ("AUDIO",), "direction": side}}

    DESCRIPTION = "Concatenates the audio1 to audio2 in the specified direction."

    def run(self, audio1: Audio, audio2: Audio, direction: str):
        *waveforms, rate = same_rate(audio1, audio2)
        stereo = [wave.repeat(1, 2, 1) if wave.shape[1] == 1 else wave for wave in waveforms]
        return ({"waveform": torch.cat(stereo if direction == "after" else stereo[::-1], dim=2), "sample_rate": rate},)


MERGES = {
    "add": lambda first, second: first + second,
    "mean": lambda first, second: (first + second) / 2,
    "subtract": lambda first, second: first - second,
    "multiply": lambda first, second: first * second,
}


class AudioMerge(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        method = (list(MERGES), {"tooltip": "How samples of both become one."})
        return {"required": {"audio1": ("AUDIO",), "audio2": ("AUDIO",), "merge_method": method}}

    DESCRIPTION = "Combine two audio tracks by overlaying their waveforms."

    def run(self, audio1: Audio, audio2: Audio, merge_method: str):
        """As long as the first; what would be louder than 1 is made quieter as a whole."""
        first, second, rate = same_rate(audio1, audio2)
        missing = first.shape[-1] - second.shape[-1]
        if missing < 0:
            logging.info("AudioMerge: the second sound is cut to the length of the first")
        second = second[..., : first.shape[-1]] if missing < 0 else torch.nn.functional.pad(second, (0, missing))
        merged = MERGES[merge_method](first, second)
        return ({"waveform": merged / merged.abs().max().clamp(min=1.0), "sample_rate": rate},)


class AudioAdjustVolume(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        volume = whole(1.0, -100, 100, tooltip="In decibels; 0 changes nothing, 6 doubles, -6 halves.")
        return {"required": {"audio": ("AUDIO",), "volume": volume}}

    def run(self, audio: Audio, volume: int):
        return ({**audio, "waveform": audio["waveform"] * 10 ** (volume / 20)},)


class EmptyAudio(_AudioNode):
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "duration": number(60.0, 0.0, LONGEST, 0.01, tooltip="In seconds."),
                "sample_rate": ("INT", {"default": 44100}),
                "channels": whole(2, 1, 2),
            }
        }

    def run(self, duration: float, sample_rate: int, channels: int):
        """Silence."""
        return ({"waveform": torch.zeros(1, channels, round(duration * sample_rate)), "sample_rate": sample_rate},)


_TITLES = {
    EmptyLatentAudio: "Empty Latent Audio",
    VAEEncodeAudio: "VAE Encode Audio",
    VAEDecodeAudio: "VAE Decode Audio",
    PreviewAudio: "Preview Audio",
    LoadAudio: "Load Audio",
    SaveAudio: "Save Audio (FLAC)",
    SaveAudioMP3: "Save Audio (MP3)",
    SaveAudioOpus: "Save Audio (Opus)",
    RecordAudio: "Record Audio",
    TrimAudioDuration: "Trim Audio Duration",
    SplitAudioChannels: "Split Audio Channels",
    AudioConcat: "Audio Concat",
    AudioMerge: "Audio Merge",
    AudioAdjustVolume: "Audio Adjust Volume",
    EmptyAudio: "Empty Audio",
}
NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in (*_TITLES, ConditioningStableAudio)}
NODE_DISPLAY_NAME_MAPPINGS = {cls.__name__: title for cls, title in _TITLES.items()}
