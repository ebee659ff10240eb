"""Audio encoders of workflows: sounds to the features that video models take."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_management as model_management
import comfy.model_patcher
from comfy import weight_files
from comfy.audio_encoders import networks
from comfy.taco_dit.core.spread import spread_batch

StateDict = dict[str, torch.Tensor]


class AudioEncoderModel:
    """An audio encoder, where it computes and waits."""

    def __init__(self, sd: StateDict) -> None:
        """Take weights with transformers' names. Raises ValueError when they are of no known encoder, or incomplete."""
        files = weight_files.files_in(sd)
        network, weights = networks.from_state_dict(sd)
        self.load_device = model_management.text_encoder_device()
        self.dtype = model_management.text_encoder_dtype(self.load_device)
        self.model_sample_rate = networks.SAMPLE_RATE
        own = {key: value.to(self.dtype) for key, value in weights.items() if value.is_floating_point()}
        network.load_state_dict(own, strict=False, assign=True)
        empty = [name for name, parameter in network.named_parameters() if parameter.is_meta]
        if empty:
            raise ValueError(f"the audio encoder lacks {len(empty)} weights, first {empty[0]}; use a complete file")
        self.model = network.eval()
        self.patcher: Any = comfy.model_patcher.ModelPatcher(
            self.model, load_device=self.load_device, offload_device=model_management.text_encoder_offload_device()
        )
        self.patcher.weight_store.loaded_from |= files

    def get_sd(self) -> StateDict:
        """All weights."""
        return self.model.state_dict()

    def encode_audio(self, audio: torch.Tensor, sample_rate: int) -> dict[str, Any]:
        """Features of sounds [B, channels, n]: states [B, t, C] (`encoded_audio`), those before the first layer and after
        each (`encoded_audio_all_layers`), and the number of samples at 16 kHz (`audio_samples`).
        """
        from comfy_api.latest._audio import resample

        model_management.load_model_gpu(self.patcher)
        sound = resample(audio, sample_rate, self.model_sample_rate).mean(dim=1)
        home = model_management.intermediate_device()
        with torch.no_grad():
            states = spread_batch(sound, lambda some: tuple(self.model(some.to(self.load_device).float())))
        self.patcher.weight_store.check_files()
        layers = tuple(state.to(home) for state in states)
        return {
            "encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": sound.shape[-1],
        }  # fmt: skip


def load_audio_encoder_from_sd(sd: StateDict, prefix: str = "") -> AudioEncoderModel:
    """An encoder from the keys of a state dict that begin with `prefix`. Raises ValueError as `AudioEncoderModel` does."""
    return AudioEncoderModel({key[len(prefix) :]: value for key, value in sd.items() if key.startswith(prefix)})
