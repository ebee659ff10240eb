"""Names of UNet weights: diffusers' and ours, those in adapter files, and the sizes that names and shapes tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]
KINDS = ("weight", "bias")

# ours -> diffusers', by part
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VECTORS = {
    f"{theirs}.linear_{n}": f"label_emb.0.{2 * (n - 1)}"
    for theirs in ("class_embedding", "add_embedding")
    for n in (1, 2)
}

# The same tables under the names and in the form (diffusers' -> ours, (ours, diffusers') pairs) that packs import.
UNET_MAP_ATTENTIONS = {f"{name}.{kind}" for name in ("proj_in", "proj_out", "norm") for kind in KINDS}
TRANSFORMER_BLOCKS = (
    {f"norm{n}.{kind}" for n in (1, 2, 3) for kind in KINDS}
    | {f"attn{n}.to_{name}.weight" for n in (1, 2) for name in "qkv"}
    | {f"attn{n}.to_out.0.{kind}" for n in (1, 2) for kind in KINDS}
    | {f"ff.net.{name}.{kind}" for name in ("0.proj", "2") for kind in KINDS}
)
UNET_MAP_RESNET = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in _RESNET.items() for kind in KINDS}
UNET_MAP_BASIC = {
    (f"{ours}.{kind}", f"{theirs}.{kind}")
    for ours, theirs in (*_TOP.items(), *((ours, theirs) for theirs, ours in _VECTORS.items()))
    for kind in KINDS
}


def _resnet(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{own}" for own, name in UNET_MAP_RESNET.items()}


def _transformer(theirs: str, ours: str, depth: int) -> dict[str, str]:
    names = [*UNET_MAP_ATTENTIONS]
    names += [f"transformer_blocks.{i}.{name}" for i in range(depth) for name in TRANSFORMER_BLOCKS]
    return {f"{theirs}.{name}": f"{ours}.{name}" for name in names}


def unet_to_diffusers(unet_config: dict[str, Any]) -> dict[str, str]:
    """`{diffusers' key: our key}` of a UNet, of all weights that one of its shape may have.

    unet_config: needs num_res_blocks, channel_mult, transformer_depth, transformer_depth_output and
    transformer_depth_middle as in `UNetModel`; {} without them (the network is no UNet).
    """
    if "num_res_blocks" not in unet_config:
        return {}
    blocks, levels = unet_config["num_res_blocks"], len(unet_config["channel_mult"])
    out = {theirs: ours for ours, theirs in UNET_MAP_BASIC}
    place, depths = 1, iter(unet_config["transformer_depth"])
    for level in range(levels):
        for i in range(blocks[level]):
            out.update(_resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{place}.0"))
            depth = next(depths)
            if depth > 0:
                out.update(_transformer(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{place}.1", depth))
            place += 1
        for kind in KINDS:
            out[f"down_blocks.{level}.downsamplers.0.conv.{kind}"] = f"input_blocks.{place}.0.op.{kind}"
        place += 1
    out.update(_transformer("mid_block.attentions.0", "middle_block.1", unet_config["transformer_depth_middle"]))
    for i in (0, 1):
        out.update(_resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}"))
    place, depths = 0, reversed(unet_config["transformer_depth_output"])
    for level in range(levels):
        count = blocks[levels - 1 - level] + 1
        for i in range(count):
            out.update(_resnet(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{place}.0"))
            depth = next(depths)
            if depth > 0:
                out.update(_transformer(f"up_blocks.{level}.attentions.{i}", f"output_blocks.{place}.1", depth))
            if i == count - 1:
                for kind in KINDS:
                    ours = f"output_blocks.{place}.{2 if depth > 0 else 1}.conv.{kind}"
                    out[f"up_blocks.{level}.upsamplers.0.conv.{kind}"] = ours
            place += 1
    return out


def _spellings(theirs: str) -> Iterator[str]:
    """Adapter key prefixes for diffusers' name of a weight."""
    flat = theirs.replace(".", "_")
    yield from (f"lora_unet_{flat}", f"lycoris_{flat}")
    processor = theirs.replace(".to_", ".processor.to_")
    if processor.endswith(".to_out.0"):
        processor = processor.removesuffix(".0")
    yield from (processor, f"unet.{processor}")


def lora_keys(network: Any) -> dict[str, str]:
    """Adapter key prefixes beyond the weights' own names: diffusers' in four spellings."""
    out = {}
    for theirs, ours in unet_to_diffusers(vars(network)).items():
        if theirs.endswith(".weight"):
            for spelling in _spellings(theirs.removesuffix(".weight")):
                out[spelling] = f"diffusion_model.{ours}"
    return out


# --- sizes -------------------------------------------------------------------------------------------------------------


def _count(keys: Any, prefix: str) -> int:
    """How many of `prefix`0., `prefix`1., ... there are without a gap; keys: a state dict or set of names."""
    numbers = {key[len(prefix) :].partition(".")[0] for key in keys if key.startswith(prefix)}
    count = 0
    while str(count) in numbers:
        count += 1
    return count


class _Shapes:
    """What the weights below a prefix tell of a UNet's sizes."""

    def __init__(self, sd: StateDict, prefix: str) -> None:
        self.weights = {key[len(prefix) :]: value for key, value in sd.items() if key.startswith(prefix)}
        self.context_dim: int | None = None
        self.use_linear = False

    def shape(self, name: str) -> torch.Size:
        return self.weights[name].shape

    def transformer_depth(self, block: str) -> int:
        """Transformer blocks in layer 1 of a block; context width and kind of projection are noted on the way."""
        inner = f"{block}.1.transformer_blocks."
        first = f"{inner}0.attn2.to_k.weight"
        if first not in self.weights:
            return 0
        self.context_dim = self.shape(first)[1]
        self.use_linear = len(self.shape(f"{block}.1.proj_in.weight")) == 2
        return _count(self.weights, inner)

    def middle_depth(self) -> int:
        if "middle_block.1.proj_in.weight" in self.weights:
            return _count(self.weights, "middle_block.1.transformer_blocks.")
        return -1 if "middle_block.0.in_layers.0.weight" in self.weights else -2


def unet_config(sd: StateDict, prefix: str) -> dict[str, Any] | None:
    """Arguments of `UNetModel` (without heads) for the weights below `prefix`, or None when they are no UNet's."""
    if f"{prefix}input_blocks.0.0.weight" not in sd:
        return None
    found = _Shapes(sd, prefix)
    keys = found.weights
    width, in_channels = found.shape("input_blocks.0.0.weight")[:2]
    config: dict[str, Any] = {
        "use_checkpoint": False, "image_size": 32, "use_spatial_transformer": True, "legacy": False,
        "adm_in_channels": None, "in_channels": in_channels, "model_channels": width,
    }  # fmt: skip
    if "label_emb.0.0.weight" in keys:
        config["num_classes"] = "sequential"
        config["adm_in_channels"] = found.shape("label_emb.0.0.weight")[1]
    config["out_channels"] = found.shape("out.2.weight")[0] if "out.2.weight" in keys else 4
    count = _count(keys, "input_blocks.")
    blocks, mult, down, up = [0], [0], [], []
    for i in range(count):
        block, mirrored = f"input_blocks.{i}", f"output_blocks.{count - 1 - i}"
        if f"{block}.0.op.weight" in keys:
            blocks.append(0)
            mult.append(0)
        elif f"{block}.0.in_layers.0.weight" in keys:
            blocks[-1] += 1
            mult[-1] = found.shape(f"{block}.0.out_layers.3.weight")[0] // width
            down.append(found.transformer_depth(block))
        if f"{block}.0.op.weight" in keys or f"{mirrored}.0.in_layers.0.weight" in keys:
            up.append(found.transformer_depth(mirrored))
    config |= {
        "num_res_blocks": blocks, "transformer_depth": down, "transformer_depth_output": up, "channel_mult": mult,
        "transformer_depth_middle": found.middle_depth(), "use_linear_in_transformer": found.use_linear,
        "context_dim": found.context_dim,
    }  # fmt: skip
    temporal = any(".time_stack." in key or ".time_mixer." in key for key in keys)
    return {**config, "use_temporal_resblock": temporal, "use_temporal_attention": temporal}


def _diffusers_depths(sd: StateDict, side: str, level: int, resnets: int) -> list[int]:
    return [_count(sd, f"{side}.{level}.attentions.{i}.transformer_blocks.") for i in range(resnets)]


def from_diffusers(sd: StateDict) -> StateDict | None:
    """A UNet's diffusers state dict under our keys, or None when it is not one of those known here."""
    if "conv_in.weight" not in sd or "down_blocks.0.resnets.0.conv1.weight" not in sd:
        return None
    levels = _count(sd, "down_blocks.")
    blocks = [_count(sd, f"down_blocks.{level}.resnets.") for level in range(levels)]
    up: list[int] = []
    for level in range(levels):
        up += _diffusers_depths(sd, "up_blocks", level, blocks[levels - 1 - level] + 1)
    config = {
        "num_res_blocks": blocks,
        "channel_mult": [1] * levels,
        "transformer_depth": [
            depth for level in range(levels) for depth in _diffusers_depths(sd, "down_blocks", level, blocks[level])
        ],
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": _count(sd, "mid_block.attentions.0.transformer_blocks."),
    }
    return {ours: sd[theirs] for theirs, ours in unet_to_diffusers(config).items() if theirs in sd}
