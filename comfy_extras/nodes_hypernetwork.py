"""Hypernetworks: small networks on keys and values of attention."""

from __future__ import annotations

import logging
from typing import Any

import torch

import comfy.utils
import folder_paths
from comfy_nodes.fields import number
from comfy_nodes.model_files import watches_files

ACTIVATIONS = {
    "linear": torch.nn.Identity,
    "relu": torch.nn.ReLU,
    "leakyrelu": torch.nn.LeakyReLU,
    "elu": torch.nn.ELU,
    "swish": torch.nn.Hardswish,
    "tanh": torch.nn.Tanh,
    "sigmoid": torch.nn.Sigmoid,
    "softsign": torch.nn.Softsign,
    "mish": torch.nn.Mish,
}


def build(weights: dict[str, torch.Tensor], settings: dict[str, Any]) -> torch.nn.Sequential:
    """One network: linear layers, each with an activation and perhaps a norm."""
    activation = settings.get("activation_func") or "linear"
    layers: list[torch.nn.Module] = []
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    linear = [name for name in names if weights[f"{name}.weight"].ndim == 2]
    for place, name in enumerate(names):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        is_linear = name in linear
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0]) if is_linear else torch.nn.LayerNorm(weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
        is_last = place == len(names) - 1
        if is_linear and activation != "linear" and (not is_last or settings.get("activate_output", False)):
            layers.append(ACTIVATIONS[activation]())
    return torch.nn.Sequential(*layers).eval()


class HypernetworkPatch:
    """Attention patch: adds to k and v what the network of their width makes of them."""

    rows_independent = True

    def __init__(self, networks: dict[int, tuple[torch.nn.Module, torch.nn.Module]], strength: float) -> None:
        self.networks = networks
        self.strength = strength

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]):
        pair = self.networks.get(k.shape[-1])
        if pair is not None:
            k = k + pair[0](k) * self.strength
            v = v + pair[1](v) * self.strength
        return q, k, v

    def to(self, device: Any) -> HypernetworkPatch:
        for pair in self.networks.values():
            for network in pair:
                network.to(device)
        return self


def load_hypernetwork_patch(path: str, strength: float) -> HypernetworkPatch | None:
    """A patch from a file of AUTOMATIC1111's layout. None, with a log line, for an activation that is unknown."""
    content = comfy.utils.load_torch_file(path, safe_load=True)
    activation = content.get("activation_func") or "linear"
    if activation not in ACTIVATIONS:
        logging.error("unsupported hypernetwork format: %s has activation %s", path, activation)
        return None
    widths = {int(key): value for key, value in content.items() if str(key).isdigit()}
    return HypernetworkPatch(
        {width: (build(pair[0], content), build(pair[1], content)) for width, pair in widths.items()}, strength
    )


@watches_files(hypernetwork_name="hypernetworks")
class HypernetworkLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "hypernetwork_name": (folder_paths.get_filename_list("hypernetworks"),),
                "strength": number(1.0, -10.0, 10.0, 0.01),
            }
        }

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load_hypernetwork"
    CATEGORY = "loaders"

    def load_hypernetwork(self, model: Any, hypernetwork_name: str, strength: float):
        path = folder_paths.get_full_path_or_raise("hypernetworks", hypernetwork_name)
        model = model.clone()
        patch = load_hypernetwork_patch(path, strength)
        if patch is not None:
            model.set_model_attn1_patch(patch)
            model.set_model_attn2_patch(patch)
        return (model,)


NODE_CLASS_MAPPINGS = {"HypernetworkLoader": HypernetworkLoader}
