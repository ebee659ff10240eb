"""Nodes of audio encoders."""

from __future__ import annotations

from typing import Any

import comfy.utils
import folder_paths
from comfy_api.latest import io
from comfy_nodes.model_files import watches_files
from comfy_nodes.v3 import extension


@watches_files(audio_encoder_name="audio_encoders")
class AudioEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("audio_encoders")
        name = io.Combo.Input("audio_encoder_name", options=names, tooltip="A file of models/audio_encoders.")
        return io.Schema(
            node_id="AudioEncoderLoader", category="loaders", inputs=[name], outputs=[io.AudioEncoder.Output()]
        )

    @classmethod
    def execute(cls, audio_encoder_name: str):
        from comfy.audio_encoders.audio_encoders import load_audio_encoder_from_sd

        path = folder_paths.get_full_path_or_raise("audio_encoders", audio_encoder_name)
        return io.NodeOutput(load_audio_encoder_from_sd(comfy.utils.load_torch_file(path, safe_load=True)))


class AudioEncoderEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AudioEncoderEncode", category="conditioning",
            inputs=[io.AudioEncoder.Input("audio_encoder"), io.Audio.Input("audio")],
            outputs=[io.AudioEncoderOutput.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, audio_encoder: Any, audio: dict[str, Any]):
        return io.NodeOutput(audio_encoder.encode_audio(audio["waveform"], audio["sample_rate"]))


comfy_entrypoint = extension(AudioEncoderLoader, AudioEncoderEncode)
