"""Names of Wan's weights in files with diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping

from comfy.families.base import StateDict

_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
}
_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
}
_ATTENTION = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
}  # fmt: skip
_BLOCK.update(
    {
        f"{theirs}.{a}": f"{ours}.{b}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for a, b in _ATTENTION.items()
    }
)


def _renamed(name: str) -> str | None:
    """Our name of a parameter with diffusers' name, or None."""
    parts = name.split(".")
    table: Mapping[str, str] = _TOP
    head = ""
    if parts[0] in ("blocks", "vace_blocks") and len(parts) > 2:
        head, name, table = f"{parts[0]}.{parts[1]}.", ".".join(parts[2:]), _BLOCK
    if name in table:
        return head + table[name]
    stem, _, kind = name.rpartition(".")
    return f"{head}{table[stem]}.{kind}" if stem in table else None


def from_diffusers(state_dict: StateDict) -> StateDict | None:
    """A transformer of this family with diffusers' keys under ours, or None.

    Raises ValueError for a key that the family does not have.
    """
    if "condition_embedder.time_proj.weight" not in state_dict or "blocks.0.attn1.to_q.weight" not in state_dict:
        return None
    out = {}
    for key, value in state_dict.items():
        name = _renamed(key)
        if name is None:
            raise ValueError(f"{key} is not a weight of Wan as diffusers names them; this variant is not supported")
        out[name] = value
    return out
