"""Nodes for Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import torch

import comfy.model_management
from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.controlnet import with_control
from comfy_nodes.layer_skip import layer_numbers, with_skipped_layers
from comfy_nodes.loaders import files, load_text_encoders
from comfy_nodes.model_files import watches_files
from comfy_nodes.v3 import batch, extension, prompt, share, side


@watches_files(**{f"clip_name{number}": "text_encoders" for number in range(1, 4)})
class TripleCLIPLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = ("clip_name1", "clip_name2", "clip_name3")
        return io.Schema(
            node_id="TripleCLIPLoader",
            category="advanced/loaders",
            description="Loads three text encoder files: for sd3 clip-l, clip-g and t5.",
            inputs=[io.Combo.Input(name, options=files("text_encoders")) for name in names],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, clip_name1: str, clip_name2: str, clip_name3: str):
        return io.NodeOutput(*load_text_encoders([clip_name1, clip_name2, clip_name3], "sd3"))

    load_clip = execute


class EmptySD3LatentImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="EmptySD3LatentImage",
            category="latent/sd3",
            inputs=[side("width"), side("height"), batch()],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int = 1):
        shape = (batch_size, 16, height // 8, width // 8)
        return io.NodeOutput({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())})

    generate = execute


def pad_alike(tokens: dict[str, Any], empty: dict[str, Any]) -> None:
    """Add empty sections to CLIP-L's or CLIP-G's tokens until both have equally many."""
    missing = len(tokens["g"]) - len(tokens["l"])
    shorter = "l" if missing > 0 else "g"
    for _ in range(abs(missing)):
        tokens[shorter] = tokens[shorter] + empty[shorter]


class CLIPTextEncodeSD3(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodeSD3",
            category="advanced/conditioning",
            inputs=[
                io.Clip.Input("clip"),
                prompt("clip_l"),
                prompt("clip_g"),
                prompt("t5xxl"),
                io.Combo.Input("empty_padding", options=["none", "empty_prompt"]),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, clip: Any, clip_l: str, clip_g: str, t5xxl: str, empty_padding: str):
        """A text for each encoder; an empty one is left out when `empty_padding` is none."""
        need_clip(clip)
        tokens = {
            encoder: [] if not text and empty_padding == "none" else clip.tokenize(text)[encoder]
            for encoder, text in (("g", clip_g), ("l", clip_l), ("t5xxl", t5xxl))
        }
        pad_alike(tokens, clip.tokenize(""))
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens))

    encode = execute


class ControlNetApplySD3(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ControlNetApplySD3",
            display_name="Apply Controlnet with VAE",
            category="conditioning/controlnet",
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.ControlNet.Input("control_net"),
                io.Vae.Input("vae"),
                io.Image.Input("image"),
                share("strength", 1.0, 10.0),
                share("start_percent", 0.0, step=0.001),
                share("end_percent", 1.0, step=0.001),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
            ],
            is_deprecated=True,
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        negative: Any,
        control_net: Any,
        image: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        vae: Any = None,
    ):
        interval = (start_percent, end_percent)
        return io.NodeOutput(*with_control([positive, negative], control_net, image, strength, interval, vae))

    apply_controlnet = execute


class SkipLayerGuidanceSD3(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SkipLayerGuidanceSD3",
            category="advanced/guidance",
            description="Generic version of SkipLayerGuidance node that can be used on every DiT model.",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("layers", default="7, 8, 9", multiline=False),
                share("scale", 3.0, 10.0, step=0.1),
                share("start_percent", 0.01, step=0.001),
                share("end_percent", 0.15, step=0.001),
            ],
            outputs=[io.Model.Output()],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, model: Any, layers: str, scale: float, start_percent: float, end_percent: float):
        numbers = {"double_block": layer_numbers(layers)}
        return io.NodeOutput(with_skipped_layers(model, numbers, scale, start_percent, end_percent))

    skip_guidance = execute


comfy_entrypoint = extension(
    TripleCLIPLoader, EmptySD3LatentImage, CLIPTextEncodeSD3, ControlNetApplySD3, SkipLayerGuidanceSD3
)
