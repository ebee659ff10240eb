"""ModelMergeBlocks with the parts of a model family as inputs.

A part is named by the beginning of its weights' names; `blocks.{}.` with a number of blocks stands for one part each.
"""

from __future__ import annotations

from typing import Any

from comfy_extras.nodes_model_merging import ModelMergeBlocks
from comfy_nodes.fields import number

Part = str | tuple[str, int]

UNET: tuple[Part, ...] = (
    "time_embed.",
    "label_emb.",
    ("input_blocks.{}.", 12),
    ("middle_block.{}.", 3),
    ("output_blocks.{}.", 12),
    "out.",
)
MMDIT: tuple[Part, ...] = ("pos_embed.", "x_embedder.", "context_embedder.", "y_embedder.", "t_embedder.")
COSMOS: tuple[Part, ...] = ("pos_embedder.", "extra_pos_embedder.", "x_embedder.", "t_embedder.", "affline_norm.")
COSMOS_PREDICT2: tuple[Part, ...] = ("pos_embedder.", "x_embedder.", "t_embedder.", "t_embedding_norm.")

FAMILIES: dict[str, tuple[Part, ...]] = {
    "SD1": UNET,
    "SD2": UNET,
    "SDXL": (
        "time_embed.",
        "label_emb.",
        ("input_blocks.{}", 9),
        ("middle_block.{}", 3),
        ("output_blocks.{}", 9),
        "out.",
    ),
    "SD3_2B": (*MMDIT, ("joint_blocks.{}.", 24), "final_layer."),
    "SD35_Large": (*MMDIT, ("joint_blocks.{}.", 38), "final_layer."),
    "Auraflow": (
        "init_x_linear.",
        "positional_encoding",
        "cond_seq_linear.",
        "register_tokens",
        "t_embedder.",
        ("double_layers.{}.", 4),
        ("single_layers.{}.", 32),
        "modF.",
        "final_linear.",
    ),
    "Flux1": (
        "img_in.",
        "time_in.",
        "guidance_in",
        "vector_in.",
        "txt_in.",
        ("double_blocks.{}.", 19),
        ("single_blocks.{}.", 38),
        "final_layer.",
    ),
    "MochiPreview": (
        "pos_frequencies.",
        "t_embedder.",
        "t5_y_embedder.",
        "t5_yproj.",
        ("blocks.{}.", 48),
        "final_layer.",
    ),
    "LTXV": (
        "patchify_proj.",
        "adaln_single.",
        "caption_projection.",
        ("transformer_blocks.{}.", 28),
        "scale_shift_table",
        "proj_out.",
    ),
    "Cosmos7B": (*COSMOS, ("blocks.block{}.", 28), "final_layer."),
    "Cosmos14B": (*COSMOS, ("blocks.block{}.", 36), "final_layer."),
    "CosmosPredict2_2B": (*COSMOS_PREDICT2, ("blocks.{}.", 28), "final_layer."),
    "CosmosPredict2_14B": (*COSMOS_PREDICT2, ("blocks.{}.", 36), "final_layer."),
    "WAN2_1": (
        "patch_embedding.",
        "time_embedding.",
        "time_projection.",
        "text_embedding.",
        "img_emb.",
        ("blocks.{}.", 40),
        "head.",
    ),
    "QwenImage": (
        "pos_embeds.",
        "img_in.",
        "txt_norm.",
        "txt_in.",
        "time_text_embed.",
        ("transformer_blocks.{}.", 60),
        "proj_out.",
    ),
}
DESCRIPTIONS = {
    "WAN2_1": "1.3B model has 30 blocks, 14B model has 40 blocks. Image to video model has the extra img_emb."
}


def names_of(parts: tuple[Part, ...]) -> list[str]:
    """One name per input."""
    names: list[str] = []
    for part in parts:
        names += [part] if isinstance(part, str) else [part[0].format(number) for number in range(part[1])]
    return names


def family_node(family: str, parts: tuple[Part, ...]) -> type[ModelMergeBlocks]:
    """The node of a family."""

    class FamilyMerge(ModelMergeBlocks):
        CATEGORY = "advanced/model_merging/model_specific"

        @classmethod
        def INPUT_TYPES(cls):
            shares = dict.fromkeys(names_of(parts), number(1.0, 0.0, 1.0, 0.01))
            return {"required": {"model1": ("MODEL",), "model2": ("MODEL",), **shares}}

    FamilyMerge.__name__ = FamilyMerge.__qualname__ = f"ModelMerge{family}"
    if family in DESCRIPTIONS:
        FamilyMerge.DESCRIPTION = DESCRIPTIONS[family]  # type: ignore[attr-defined]
    return FamilyMerge


NODE_CLASS_MAPPINGS: dict[str, Any] = {
    f"ModelMerge{family}": family_node(family, parts) for family, parts in FAMILIES.items()
}
