"""Nodes that load control networks and hang them on conditionings."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_nodes.fields import number
from comfy_nodes.loaders import files
from comfy_nodes.model_files import watches_files

STRENGTH = number(1.0, 0.0, 10.0, 0.01)


def need_control_net(control_net: Any, name: str) -> Any:
    """Raises RuntimeError when the file held no control network."""
    if control_net is None:
        raise RuntimeError(f"{name} is not a ControlNet file, or of a kind that is not supported; choose another one")
    return control_net


@watches_files(control_net_name="controlnet")
class ControlNetLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"control_net_name": (files("controlnet"),)}}

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "load_controlnet"
    CATEGORY = "loaders"

    def load_controlnet(self, control_net_name: str):
        import comfy.controlnet

        path = folder_paths.get_full_path_or_raise("controlnet", control_net_name)
        return (need_control_net(comfy.controlnet.load_controlnet(path), control_net_name),)


@watches_files(control_net_name="controlnet")
class DiffControlNetLoader:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "control_net_name": (files("controlnet"),)}}

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "load_controlnet"
    CATEGORY = "loaders"

    def load_controlnet(self, model: Any, control_net_name: str):
        import comfy.controlnet

        path = folder_paths.get_full_path_or_raise("controlnet", control_net_name)
        return (need_control_net(comfy.controlnet.load_controlnet(path, model), control_net_name),)


def with_control(
    conditionings: list[Any],
    control_net: Any,
    image: Any,
    strength: float,
    interval: tuple[float, float],
    vae: Any = None,
    extra_concat: Any = None,
) -> tuple[Any, ...]:
    """Conditionings with the control network in front of the ones they have; equal chains share one network object."""
    if strength == 0:
        return tuple(conditionings)
    hint = image.movedim(-1, 1)
    chained: dict[int, Any] = {}
    result = []
    for conditioning in conditionings:
        entries = []
        for tensor, fields in conditioning:
            before = fields.get("control")
            if id(before) not in chained:
                net = control_net.copy().set_cond_hint(
                    hint, strength, interval, vae=vae, extra_concat=[] if extra_concat is None else extra_concat
                )
                net.set_previous_controlnet(before)
                chained[id(before)] = net
            entries.append([tensor, {**fields, "control": chained[id(before)], "control_apply_to_uncond": False}])
        result.append(entries)
    return tuple(result)


class ControlNetApply:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "control_net": ("CONTROL_NET",),
                "image": ("IMAGE",),
                "strength": STRENGTH,
            }
        }

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "apply_controlnet"
    CATEGORY = "conditioning/controlnet"
    DEPRECATED = True

    def apply_controlnet(self, conditioning: Any, control_net: Any, image: Any, strength: float):
        """Acts on the negative prompt as well."""
        if strength == 0:
            return (conditioning,)
        hint = image.movedim(-1, 1)
        entries = []
        for tensor, fields in conditioning:
            net = control_net.copy().set_cond_hint(hint, strength)
            if "control" in fields:
                net.set_previous_controlnet(fields["control"])
            entries.append([tensor, {**fields, "control": net, "control_apply_to_uncond": True}])
        return (entries,)


class ControlNetApplyAdvanced:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "control_net": ("CONTROL_NET",),
                "image": ("IMAGE",),
                "strength": STRENGTH,
                "start_percent": number(0.0, 0.0, 1.0, 0.001),
                "end_percent": number(1.0, 0.0, 1.0, 0.001),
            },
            "optional": {"vae": ("VAE",)},
        }

    RETURN_TYPES = ("CONDITIONING", "CONDITIONING")
    RETURN_NAMES = ("positive", "negative")
    FUNCTION = "apply_controlnet"
    CATEGORY = "conditioning/controlnet"

    def apply_controlnet(
        self,
        positive: Any,
        negative: Any,
        control_net: Any,
        image: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        vae: Any = None,
        extra_concat: Any = None,
    ):
        interval = (start_percent, end_percent)
        return with_control([positive, negative], control_net, image, strength, interval, vae, extra_concat)


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (ControlNetApply, ControlNetApplyAdvanced, ControlNetLoader, DiffControlNetLoader)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ControlNetApply": "Apply ControlNet (OLD)",
    "ControlNetApplyAdvanced": "Apply ControlNet",
    "ControlNetLoader": "Load ControlNet Model",
    "DiffControlNetLoader": "Load ControlNet Model (diff)",
}
