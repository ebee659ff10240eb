"""Model families that are known by the keys of their files and are not in this version, so that a file can be named.

Keys are those of the files that their authors or Comfy-Org publish, below the prefix of the diffusion network. A row whose
configuration a record in `comfy.families` has is skipped: adding the family needs no change here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import comfy.families


@dataclass(frozen=True)
class AbsentFamily:
    """A family by keys that all must be there. configuration: ComfyUI's name in `supported_models`. rows: those of the
    first key, where keys alone are shared with a family that is here."""

    name: str
    configuration: str
    keys: tuple[str, ...]
    rows: int | None = None

    def fits(self, weights: Mapping[str, torch.Tensor], prefix: str) -> bool:
        """Whether a file is of this family."""
        if any(prefix + key not in weights for key in self.keys):
            return False
        return self.rows is None or weights[prefix + self.keys[0]].shape[0] == self.rows


_FAMILIES = (
    AbsentFamily("Flux.2", "Flux2", ("double_stream_modulation_img.lin.weight",)),
    AbsentFamily("Flux.3", "Flux3", ("early_stream_modulations.image.lin.weight",)),
    AbsentFamily("Z-Image", "ZImage", ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"), 3840),
    AbsentFamily("Chroma Radiance", "ChromaRadiance", ("nerf_blocks.0.norm.scale",)),
    AbsentFamily("Chroma Radiance", "ChromaRadiance", ("nerf_blocks.0.norm.weight",)),
    AbsentFamily("HunyuanVideo 1.5", "HunyuanVideo15", ("vision_in.proj.0.weight", "txt_in.input_embedder.weight")),
    AbsentFamily("MiniMax H3", "MiniMaxH3", ("video_patch_proj.weight", "audio_patch_proj.weight")),
    AbsentFamily("LTX-2", "LTXAV", ("audio_adaln_single.linear.weight",)),
    AbsentFamily("HiDream-O1", "HiDreamO1", ("t_embedder1.mlp.0.weight", "x_embedder.proj1.weight")),
    AbsentFamily("HiDream", "HiDream", ("caption_projection.0.linear.weight",)),
    AbsentFamily("Hunyuan3D", "Hunyuan3Dv2", ("latent_in.weight",)),
    AbsentFamily("OmniGen2", "Omnigen2", ("time_caption_embed.timestep_embedder.linear_1.bias",)),
    AbsentFamily(
        "Lens", "Lens",
        ("transformer_blocks.0.attn.norm_added_q.weight", "transformer_blocks.0.img_mlp.w1.weight"),
    ),
    AbsentFamily("Mage-Flow", "MageFlow", ("txt_norm.weight", "img_in.weight"), 2560),
    AbsentFamily("Krea 2", "Krea2", ("txtfusion.projector.weight",)),
    AbsentFamily("Kandinsky 5", "Kandinsky5", ("visual_embeddings.in_layer.bias",)),
    AbsentFamily("Anima", "Anima", ("llm_adapter.blocks.0.cross_attn.q_proj.weight",)),
    AbsentFamily("Cosmos Predict 2", "CosmosT2IPredict2", ("blocks.0.mlp.layer1.weight",)),
    AbsentFamily("Cosmos", "CosmosT2V", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    AbsentFamily("Mochi", "GenmoMochi", ("t5_yproj.weight",)),
    AbsentFamily("ACE-Step", "ACEStep", ("genre_embedder.weight",)),
    AbsentFamily("Stable Audio", "StableAudio", ("preprocess_conv.weight", "to_timestep_embed.0.weight")),
    AbsentFamily("Stable Cascade, stage C", "Stable_Cascade_C", ("clip_txt_mapper.weight",)),
    AbsentFamily("Stable Cascade, stage B", "Stable_Cascade_B", ("clip_mapper.weight",)),
    AbsentFamily("SeedVR2", "SeedVR2", ("vid_in.proj.weight", "vid_out.proj.weight")),
    AbsentFamily("CogVideoX", "CogVideoX", ("patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight")),
)  # fmt: skip


def absent_family(weights: Mapping[str, torch.Tensor], prefix: str) -> str | None:
    """The name of the family of the network below `prefix` if it is known and not in this version."""
    here = {name for family in comfy.families.records() for name in family.configurations}
    return next(
        (family.name for family in _FAMILIES if family.configuration not in here and family.fits(weights, prefix)), None
    )
