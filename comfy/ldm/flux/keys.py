"""Diffusers' names of Flux weights, for loading its files and its adapters."""

from __future__ import annotations

from typing import Any

import torch

Target = str | tuple[Any, ...]


def swap_scale_shift(weight: torch.Tensor) -> torch.Tensor:
    """Exchange the halves of the first axis: diffusers stores (scale, shift), Flux (shift, scale)."""
    first, second = weight.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


_DOUBLE = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_TOP = {
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "controlnet_x_embedder": "pos_embed_input",
    **{
        f"time_text_embed.{theirs}_embedder.linear_{n}": f"{ours}_in.{'in' if n == 1 else 'out'}_layer"
        for theirs, ours in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
        for n in (1, 2)
    },
}


def diffusers_key_map(config: dict[str, Any], output_prefix: str = "") -> dict[str, Target]:
    """`{diffusers key: our key}`; fused weights map to `(key, (axis, start, length))`, swapped ones to
    `(key, None, transform)`. `config` needs `depth`, `depth_single_blocks` and `hidden_size`.
    """
    hidden = config["hidden_size"]
    mlp = int(hidden * config.get("mlp_ratio", 4.0))
    out: dict[str, Target] = {}

    def linear(theirs: str, ours: str, part: tuple[int, int, int] | None = None) -> None:
        for kind in ("weight", "bias"):
            key = f"{output_prefix}{ours}.{kind}"
            out[f"{theirs}.{kind}"] = key if part is None else (key, part)

    for i in range(config.get("depth", 0)):
        theirs, ours = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        for position, name in enumerate("qkv"):
            part = (0, hidden * position, hidden)
            linear(f"{theirs}attn.to_{name}", f"{ours}img_attn.qkv", part)
            linear(f"{theirs}attn.add_{name}_proj", f"{ours}txt_attn.qkv", part)
        for a, b in _DOUBLE.items():
            linear(theirs + a, ours + b)
        for a, b in _DOUBLE_NORMS.items():
            out[f"{theirs}{a}.weight"] = f"{output_prefix}{ours}{b}.scale"
    for i in range(config.get("depth_single_blocks", 0)):
        theirs, ours = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        for position, name in enumerate("qkv"):
            linear(f"{theirs}attn.to_{name}", f"{ours}linear1", (0, hidden * position, hidden))
        linear(f"{theirs}proj_mlp", f"{ours}linear1", (0, hidden * 3, mlp))
        for a, b in _SINGLE.items():
            linear(theirs + a, ours + b)
        for a, b in _SINGLE_NORMS.items():
            out[f"{theirs}{a}.weight"] = f"{output_prefix}{ours}{b}.scale"
    for a, b in _TOP.items():
        linear(a, b)
    for kind in ("weight", "bias"):
        key = f"{output_prefix}final_layer.adaLN_modulation.1.{kind}"
        out[f"norm_out.linear.{kind}"] = (key, None, swap_scale_shift)
    return out


def lora_keys(network: Any) -> dict[str, Any]:
    """Adapter key prefixes beyond the weights' own names: diffusers' in three spellings, and fused q/k/v."""
    prefixes: dict[str, Any] = {}
    for theirs, target in diffusers_key_map(vars(network.params), "diffusion_model.").items():
        if theirs.endswith(".weight"):
            stem = theirs.removesuffix(".weight")
            prefixes[f"transformer.{stem}"] = target
            for spelling in ("lycoris_", "lora_transformer_"):
                prefixes[spelling + stem.replace(".", "_")] = target
    for i in range(len(network.single_blocks)):
        name = f"diffusion_model.single_blocks.{i}.linear1"
        prefixes[f"{name}_qkv"] = (f"{name}.weight", (0, 0, 3 * network.hidden_size))
    return prefixes


def from_diffusers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Flux transformer's diffusers state dict -> Black Forest Labs' keys; fused weights are put together.

    Raises ValueError when a part of a fused weight is missing.
    """
    hidden = state_dict["x_embedder.bias"].shape[0]
    blocks = {"transformer_blocks": 0, "single_transformer_blocks": 0}
    for key in state_dict:
        name, _, rest = key.partition(".")
        if name in blocks:
            blocks[name] = max(blocks[name], int(rest.split(".")[0]) + 1)
    single = state_dict.get("single_transformer_blocks.0.proj_mlp.weight")
    double = state_dict.get("transformer_blocks.0.ff.net.0.proj.weight")
    wide = single if single is not None else double
    config = {
        "hidden_size": hidden,
        "depth": blocks["transformer_blocks"],
        "depth_single_blocks": blocks["single_transformer_blocks"],
        "mlp_ratio": 4.0 if wide is None else wide.shape[0] / hidden,
    }
    return put_together(state_dict, diffusers_key_map(config))


def put_together(state_dict: dict[str, torch.Tensor], key_map: dict[str, Target]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict under the keys of a map as `diffusers_key_map` gives it; fused weights are joined.

    Raises ValueError when a part of a fused weight is missing.
    """
    out: dict[str, torch.Tensor] = {}
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for theirs, target in key_map.items():
        value = state_dict.get(theirs)
        if value is None:
            continue
        if isinstance(target, str):
            out[target] = value
        elif target[1] is None:
            out[target[0]] = target[2](value)
        else:
            parts.setdefault(target[0], []).append((target[1][1], value))
    for key, pieces in parts.items():
        wanted = 4 if ".linear1." in key else 3
        if len(pieces) != wanted:
            raise ValueError(f"{key} needs {wanted} diffusers tensors but the file has {len(pieces)}; it is incomplete")
        out[key] = torch.cat([value for _, value in sorted(pieces, key=lambda piece: piece[0])], dim=0)
    return out
