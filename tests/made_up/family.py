"""The record of a made-up family, Pebble. It is the example of docs/adding_a_model.md."""

from __future__ import annotations

from typing import Any

import torch

import comfy.conds
import comfy.latent_formats
import comfy.model_base
from comfy import supported_models_base
from comfy.families.base import Family, Sizes, Split, StateDict
from comfy.model_detection import count_blocks


class PebbleLatent(comfy.latent_formats.LatentFormat):
    """Pebble's latents."""

    scale_factor = 0.5


class PebbleModel(comfy.model_base.BaseModel):
    """Which conditionings go in: the prompt, and the mask of its padding."""

    def __init__(self, model_config: Any, model_type: Any = None, device: Any = None) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=FAMILY.network_class())

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        out["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        if kwargs.get("attention_mask") is not None:
            out["attention_mask"] = comfy.conds.CONDRegular(kwargs["attention_mask"])
        return out


class Pebble(supported_models_base.BASE):
    """Sampling defaults, memory, dtypes."""

    unet_config = {"image_model": "pebble"}
    latent_format = PebbleLatent
    memory_usage_factor = 1.5
    sampling_settings = {"multiplier": 1.0, "shift": 2.0}
    supported_inference_dtypes = (torch.float32,)

    def model_type(self, state_dict: StateDict, prefix: str = "") -> comfy.model_base.ModelType:
        return comfy.model_base.ModelType.FLOW

    def get_model(self, state_dict: StateDict, prefix: str = "", device: Any = None) -> Any:
        return PebbleModel(self, self.model_type(state_dict, prefix), device)


def detect(sd: StateDict, prefix: str, metadata: dict[str, str] | None) -> dict[str, Any] | None:
    """Told by the key of the patch embedding; sizes from shapes. Heads have 24 channels in every model."""
    patches = sd.get(f"{prefix}pebble_in.weight")
    if patches is None:
        return None
    hidden = patches.shape[0]
    return {
        "image_model": "pebble",
        "hidden_size": hidden,
        "num_heads": hidden // 24,
        "kv_heads": sd[f"{prefix}blocks.0.kv.weight"].shape[0] // 48,
        "depth": count_blocks(sd, prefix + "blocks.{}."),
        "channels": patches.shape[1] // 4,
        "text_size": sd[f"{prefix}txt_in.weight"].shape[1],
    }


def lora_keys(network: Any) -> dict[str, Any]:
    """Adapters of Pebble's own trainer say `pebble_0_q`."""
    names = ("q", "kv", "out", "up", "down")
    return {
        f"pebble_{i}_{name}": f"diffusion_model.blocks.{i}.{name}.weight"
        for i in range(len(network.blocks))
        for name in names
    }


def sizes(network: Any) -> Sizes:
    head = network.hidden_size // network.num_heads
    kv = network.blocks[0].kv_heads * head
    group = network.hidden_size // network.blocks[0].kv_heads  # query heads with their key head
    return {"heads": (network.hidden_size, group), "kv": (kv, head), "mlp": (3 * network.hidden_size, 1)}


FAMILY = Family(
    name="pebble",
    network="tests.made_up.network:Pebble",
    detect=detect,
    configurations={"Pebble": Pebble},
    models={"Pebble": PebbleModel},
    latent_formats={"Pebble": PebbleLatent},
    lora_keys=lora_keys,
    splits={
        "blocks.*.mod": Split("gathered"),
        "blocks.*.q": Split("column", ("heads",)),
        "blocks.*.kv": Split("column", ("kv", "kv")),
        "blocks.*.out": Split("row", ("heads",)),
        "blocks.*.cross_q": Split("column", ("heads",)),
        "blocks.*.cross_kv": Split("column", ("heads", "heads"), tokens=()),
        "blocks.*.cross_out": Split("row", ("heads",)),
        "blocks.*.up": Split("column", ("mlp",)),
        "blocks.*.down": Split("row", ("mlp",)),
    },
    sizes=sizes,
    sizes_from_tensors=True,
    full_precision=("blocks.*.mod",),
)
