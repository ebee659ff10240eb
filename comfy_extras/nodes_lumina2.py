"""Lumina 2: prompts after one of its two instructions, and guidance of bounded length."""

from __future__ import annotations

from typing import Any

import torch

from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.v3 import extension, share

# What Lumina-Image 2.0 was trained with before every prompt (its model card).
INSTRUCTIONS = {
    "superior": "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts.",
    "alignment": "You are an assistant designed to generate high-quality images with the highest degree of image-text "
    "alignment based on textual prompts.",
}


def _length(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)


class RenormCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RenormCFG",
            category="advanced/model",
            inputs=[io.Model.Input("model"), share("cfg_trunc", 100, 100.0), share("renorm_cfg", 1.0, 100.0)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, cfg_trunc: float, renorm_cfg: float):
        """Guidance only at sigmas below `cfg_trunc`, at most `renorm_cfg` times as long as the positive prediction."""
        channels = model.model.diffusion_model.in_channels

        def guide(arguments: dict[str, Any]) -> torch.Tensor:
            positive, negative = arguments["cond_denoised"], arguments["uncond_denoised"]
            own, rest = positive[:, :channels], positive[:, channels:]
            if arguments["timestep"][0] < cfg_trunc:
                guided = torch.lerp(negative[:, :channels], own, arguments["cond_scale"])
                if renorm_cfg > 0.0:
                    guided = guided * (_length(own) * renorm_cfg / _length(guided)).clamp(max=1.0)
                own = guided
            return arguments["input"] - torch.cat([own, rest], dim=1)

        model = model.clone()
        model.set_model_sampler_cfg_function(guide)
        return io.NodeOutput(model)


class CLIPTextEncodeLumina2(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CLIPTextEncodeLumina2",
            display_name="CLIP Text Encode for Lumina2",
            category="conditioning",
            description="Encodes an instruction of Lumina 2 and a prompt after it.",
            inputs=[
                io.Combo.Input(
                    "system_prompt",
                    options=list(INSTRUCTIONS),
                    tooltip=" ".join(f"{name}: {text}" for name, text in INSTRUCTIONS.items()),
                ),
                io.String.Input("user_prompt", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
                io.Clip.Input("clip", tooltip="Lumina 2's text encoder, Gemma 2."),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt as the model reads it.")],
        )

    @classmethod
    def execute(cls, clip: Any, user_prompt: str, system_prompt: str):
        need_clip(clip)
        tokens = clip.tokenize(f"{INSTRUCTIONS[system_prompt]} <Prompt Start> {user_prompt}")
        return io.NodeOutput(clip.encode_from_tokens_scheduled(tokens))

    encode = execute


comfy_entrypoint = extension(CLIPTextEncodeLumina2, RenormCFG)
