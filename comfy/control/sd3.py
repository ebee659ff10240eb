"""Control networks for SD3 and SD3.5: diffusers' layout (InstantX, Alimama), and Stability AI's blur, canny and depth."""

from __future__ import annotations

from typing import Any

import torch

import comfy.latent_formats
import comfy.model_detection
from comfy.cldm.dit_embedder import ControlNetEmbedder
from comfy.cldm.mmdit import ControlNet as Network
from comfy.families import key_maps, sd3

from .loading import StateDict, placement, with_weights
from .network import ControlNet

# a latent's channels and a mask
_WITH_MASK = 17
_CANNY, _DEPTH = 1, 2


def diffusers(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNet:
    """A copy of the model's first blocks, with a latent as hint, perhaps with a mask."""
    depth = sd["pos_embed.proj.weight"].shape[0] // 64
    blocks = comfy.model_detection.count_blocks(sd, "transformer_blocks.{}.")
    targets = sd3.diffusers_targets(depth, blocks)
    if blocks == depth:  # the text of the last block goes on here, as that of the others
        last = depth - 1
        ours = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
        targets |= key_maps.linears({f"transformer_blocks.{last}.norm1_context.linear": ours})
    converted = key_maps.assembled(sd, targets)
    converted |= {k: v for k, v in sd.items() if k.startswith(("controlnet_blocks.", "pos_embed_input."))}
    config = comfy.model_detection.model_config_from_unet(converted, "")
    if config is None:
        raise ValueError("the file has the keys of an SD3 ControlNet but not its blocks; use a complete file")
    place = placement(converted, config, options)
    channels = converted["pos_embed_input.proj.weight"].shape[1]
    sizes = {**config.unet_config, "num_blocks": blocks, "control_latent_channels": channels}
    network = with_weights(Network(**sizes, **place.arguments()), converted, place.dtype)
    latent_format = comfy.latent_formats.SD3()
    latent_format.shift_factor = 0  # these networks were trained with latents that are not shifted
    return ControlNet(
        network, compression_ratio=1, latent_format=latent_format, concat_mask=channels == _WITH_MASK,
        load_device=place.device, manual_cast_dtype=place.cast,
    )  # fmt: skip


class ControlNetSD35(ControlNet):
    """One of Stability AI's, which has a part in common with the model and takes it from there."""

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        """See `ControlBase.pre_run`. Raises ValueError when the model is of another size."""
        own, its = self.control_model.borrows
        try:
            weights = getattr(model.diffusion_model, its).state_dict()
            for name, weight in getattr(self.control_model, own).state_dict().items():
                weight.copy_(weights[name])
        except (AttributeError, KeyError, RuntimeError) as error:
            raise ValueError(f"this ControlNet is for SD3.5 of another size than the model ({error})") from error
        super().pre_run(model, percent_to_timestep_function)


def _canny(image: torch.Tensor) -> torch.Tensor:
    return image * 255 * 0.5 + 0.5


def _depth(image: torch.Tensor) -> torch.Tensor:
    return 1.0 - image


def stability(sd: StateDict, model: Any, options: dict[str, Any]) -> ControlNetSD35:
    """Stability AI's for SD3.5 large and medium; the file says which kind of hint it takes."""
    sd = dict(sd)
    told = sd.pop("control_type", None)
    kind = -1 if told is None else round(told.item())
    renamed = key_maps.linears(
        {name: ours for name, ours in sd3.TOP.items() if ours.startswith(("x_embedder", "t_embedder", "y_embedder"))}
    )
    sd = {str(renamed.get(key, key)): value for key, value in sd.items()}
    width, inner = sd["y_embedder.mlp.0.weight"].shape
    double = width == inner
    blocks = comfy.model_detection.count_blocks(sd, "transformer_blocks.{}.")
    place = placement(sd, sd3.SD3({}), options)
    network = ControlNetEmbedder(
        depth=width // 64, num_layers=blocks, double_y_emb=double,
        **({} if double else {"adm_in_channels": inner}), **place.arguments(),
    )  # fmt: skip
    borrowed = {
        f"{network.borrows[0]}.{key}": torch.zeros(value.shape)
        for key, value in getattr(network, network.borrows[0]).state_dict().items()
    }
    network = with_weights(network, {**sd, **borrowed}, place.dtype)  # written to, so not the file's
    return ControlNetSD35(
        network, compression_ratio=1, latent_format=comfy.latent_formats.SD3(), load_device=place.device,
        manual_cast_dtype=place.cast, preprocess_image={_CANNY: _canny, _DEPTH: _depth}.get(kind),
    )  # fmt: skip
